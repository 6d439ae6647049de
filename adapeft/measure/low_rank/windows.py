"""The windows of a model, and shards that look through them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups
from adapeft.measure.shards.arriving import Receiver, Take
from adapeft.measure.shards.shards import Shards, Slice
from adapeft.model.input_sizes import InputSizes
from adapeft.model.places import places_of
from adapeft.model.structure import ParameterInfo
from adapeft.parts.layers.leaves import add_leaves, remove_leaves
from adapeft.parts.window import Window, random_window
from adapeft.ranks import Ranks
from adapeft.tasks.losses.micro_batches import Loss, LossPair


class Windows:
    """Windows of rank m on the matrices among the candidates; all other candidates are measured themselves.

    Each of a layer's fused experts, a tensor [E, out, in], has windows of its own. A matrix whose input is not wider
    than m, and any other tensor, are seen whole: their own gradient is no larger than a leaf's, or has no low-rank
    form.

    Attributes:
        names: names of the measured parameters: one per candidate, its right leaf or itself, then the left leaves.
        shapes: their shapes.
        groups: the groups of the candidates with the shapes of what is measured of them.
        matrices: indices of the candidates that have a window.
        rank: m.

    Args:
        model: changed until ``remove``; the loss stays the same.
        groups: groups of its candidates.
        rank: m.
        seed: random seed of the first windows.

    Raises:
        AdapeftError: no candidate is larger than the windows, or a quantized one is not.
    """

    def __init__(self, model: nn.Module, groups: Groups, rank: int, seed: int) -> None:
        self.rank = rank
        self._model = model
        self.matrices = matrices_of(groups, rank)
        if not self.matrices:
            raise AdapeftError(
                f"select.rank = {rank}: no matrix among the candidates is wider than that, so a low-rank measurement "
                "saves nothing. Lower select.rank, or set select.measure: exact."
            )
        narrow = [i for i, info in enumerate(groups.parameters) if info.is_quantized and i not in self.matrices]
        if narrow:
            info = groups.parameters[narrow[0]]
            raise AdapeftError(
                f"select.rank = {rank}: the quantized matrix {info.name!r} of shape {info.shape} is narrower than that "
                "and has no gradient of its own. Lower select.rank, or leave the matrix out with select.exclude."
            )
        self._seed, self._infos = seed, groups.parameters
        self._windows: dict[int, Window] = {}
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        names = [info.name for info in groups.parameters]
        shapes = [info.shape for info in groups.parameters]
        left_names = []
        places, paths = places_of(model), {module: path for path, module in model.named_modules()}
        for index in self.matrices:
            info = groups.parameters[index]
            outputs, inputs = sides_of(info)
            owners = places[info.name]
            device = owners[0][0].get_parameter(owners[0][1]).device
            windows = (self._random(index, side, sizes, device) for side, sizes in enumerate((outputs, inputs)))
            window = Window(info.output_dim or 0, *windows)
            leaves = {
                "left": nn.Parameter(torch.zeros(*inputs, rank, device=device)),
                "right": nn.Parameter(torch.zeros(*outputs, rank, device=device)),
            }
            added = [add_leaves(module, name, window, leaves) for module, name in owners]
            path = paths[owners[0][0]]
            names[index], shapes[index] = _joined(path, added[0]["right"]), (*outputs, rank)
            left_names.append(_joined(path, added[0]["left"]))
            self._windows[index], self._places[index] = window, owners
        self.names = (*names, *left_names)
        self.shapes = [*shapes, *((*sides_of(groups.parameters[index])[1], rank) for index in self.matrices)]
        seen = list(groups.parameters)
        for index, (info, shape) in enumerate(zip(groups.parameters, shapes, strict=True)):
            output_dim = 0 if index in self._windows and info.output_dim is not None else info.output_dim
            seen[index] = replace(info, shape=shape, output_dim=output_dim)
        self.groups = replace(groups, parameters=tuple(seen))

    def right_of(self, candidate: int) -> Tensor:
        """Return the right window V [..., in, m] of a candidate as its layers use it."""
        return self._buffers_of(candidate, "right")[0]

    def left_of(self, candidate: int) -> Tensor:
        """Return the left window Ω [..., out, m] of a candidate as its layers use it."""
        return self._buffers_of(candidate, "left")[0]

    def place_of(self, piece: Slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the row of each element of a slice of a right leaf and its direction, int64 [length].

        Directions are counted over the windows of all experts, m each.
        """
        flat = torch.arange(piece.start, piece.start + piece.length, device=device)
        row = flat // self.rank
        return row, row // self.shapes[piece.parameter][-2] * self.rank + flat % self.rank

    def look_along(self, right: Mapping[int, Tensor], left: Mapping[int, Tensor] | None = None) -> None:
        """Replace the windows of the matrices; without ``left``, stop using the left leaves."""
        for side, windows in (("right", right), ("left", left or {})):
            for candidate, window in windows.items():
                for buffer in self._buffers_of(candidate, side):
                    buffer.copy_(window)
        for one in self._windows.values():
            one.has_left = left is not None

    def views(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Return copies of the windows in use, right and left, to look along them again."""
        return (
            {candidate: self.right_of(candidate).clone() for candidate in self.matrices},
            {candidate: self.left_of(candidate).clone() for candidate in self.matrices},
        )

    def look_randomly(self) -> None:
        """Look through the random windows of the start again, on both sides."""
        sides = {index: sides_of(self._infos[index]) for index in self.matrices}
        device = self.right_of(self.matrices[0]).device
        self.look_along(
            {index: self._random(index, 1, inputs, device) for index, (_, inputs) in sides.items()},
            {index: self._random(index, 0, outputs, device) for index, (outputs, _) in sides.items()},
        )

    def remove(self) -> None:
        """Remove the windows from the model."""
        for module in self._model.modules():
            remove_leaves(module)

    def _buffers_of(self, candidate: int, side: str) -> list[Tensor]:
        return [module.get_buffer(f"{name}_leaf_{side}_window") for module, name in self._places[candidate]]

    def _random(self, candidate: int, side: int, sizes: tuple[int, ...], device: torch.device) -> Tensor:
        return random_window(sizes, self.rank, self._seed * 2**20 + 2 * candidate + side, device)


class SeenShards:
    """``Shards`` whose candidates are seen through windows: the slices are those of right leaves.

    Weights cannot be read or written through a window.

    Attributes:
        windows: the windows.
        all: shards of everything in ``windows.names``.
    """

    def __init__(self, shards: Shards, windows: Windows, candidates: Sequence[str]) -> None:
        self.windows, self.all = windows, shards
        self.ranks: Ranks = shards.ranks
        self.device = shards.device
        self.num_micro = shards.num_micro
        self.names = (*candidates, *shards.names[len(windows.names) :])
        self._leaves = dict(zip(shards.names[: len(candidates)], candidates, strict=True))
        self._kept = [place for place, piece in enumerate(shards.slices) if piece.parameter < len(candidates)]
        self._places = {place: own for own, place in enumerate(self._kept)}
        self.slices: tuple[Slice, ...] = tuple(shards.slices[place] for place in self._kept)

    @property
    def reached(self) -> set[str]:
        """See ``Shards.reached``."""
        return {self._leaves.get(name, name) for name in self.all.reached}

    @contextmanager
    def gradients(self, losses: Sequence[Loss]) -> Iterator[list[Tensor]]:
        """See ``Shards.gradients``."""
        with self.all.gradients(losses) as gradients:
            seen = self.own(gradients)
            yield seen
            seen.clear()

    def arriving(self, losses: Sequence[Loss], take: Take, *, by_micro_batch: bool = False) -> None:
        """See ``Shards.arriving``."""
        self.all.arriving(losses, self._seen(take), by_micro_batch=by_micro_batch)

    def arriving_both(self, pairs: Sequence[LossPair], receivers: Sequence[Receiver]) -> None:
        """See ``Shards.arriving_both``."""
        self.all.arriving_both(pairs, [one._replace(take=self._seen(one.take)) for one in receivers])

    def reach(self, losses: Sequence[Loss]) -> None:
        """See ``Shards.reach``."""
        self.all.reach(losses)

    def own(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Return those of ``pieces``, aligned with ``all.slices``, that belong to ``slices``."""
        return [pieces[place] for place in self._kept]

    def loss(self, losses: Sequence[Loss]) -> float:
        """See ``Shards.loss``."""
        return self.all.loss(losses)

    def weights(self) -> list[Tensor]:
        """Not available: see the class."""
        raise NotImplementedError("a window shows gradients, not weights")

    def write(self, candidates: Sequence[int], values: Mapping[int, Tensor]) -> None:
        """Not available: see the class."""
        raise NotImplementedError("a window shows gradients, not weights")

    def train_step(self, losses: Sequence[Loss], learning_rate: float) -> None:
        """See ``Shards.train_step``."""
        self.all.train_step(losses, learning_rate)

    def trained_inputs(self) -> AbstractContextManager[InputSizes]:
        """See ``Shards.trained_inputs``."""
        return self.all.trained_inputs()

    def trained_state(self) -> list[Tensor]:
        """See ``Shards.trained_state``."""
        return self.all.trained_state()

    def publish(self) -> None:
        """See ``Shards.publish``."""
        self.all.publish()

    def _seen(self, take: Take) -> Take:
        """Return a callback for the gradients of ``all`` that hands on those of ``slices``."""

        def take_seen(place: int, gradient: Tensor) -> None:
            if place in self._places:
                take(self._places[place], gradient)

        return take_seen


def gathered(
    shapes: Mapping[int, tuple[int, ...]], slices: Sequence[Slice], pieces: Sequence[Tensor], shards: Shards
) -> dict[int, Tensor]:
    """Return whole tensors on every rank from the pieces of all ranks. Collective.

    Args:
        shapes: parameter → shape of the tensors to return.
        slices: this rank's slices, also of other parameters.
        pieces: flat tensors aligned with ``slices``.
    """
    sizes = [prod(shape) for shape in shapes.values()]
    flat = torch.zeros(sum(sizes), device=shards.device)
    whole = dict(zip(shapes, flat.split(sizes), strict=True))
    for piece, values in zip(slices, pieces, strict=True):
        if piece.parameter in whole:
            whole[piece.parameter][piece.start : piece.start + piece.length] = values
    shards.ranks.all_reduce(flat)
    return {parameter: one.view(shapes[parameter]) for parameter, one in whole.items()}


def matrices_of(groups: Groups, rank: int) -> list[int]:
    """Return the indices of the candidates that windows of this rank are put on: matrices, and fused experts."""
    return [index for index, info in enumerate(groups.parameters) if _has_window(info, rank)]


def num_seen(groups: Groups, rank: int) -> int:
    """Return the number of elements of everything that is measured through windows of this rank."""
    return sum(
        rank * sum(map(prod, sides_of(info))) if _has_window(info, rank) else info.count for info in groups.parameters
    )


def sides_of(info: ParameterInfo) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes of a matrix, (out,) and (in,), or those of E fused experts, (E, out) and (E, in)."""
    if info.output_dim is None:
        *experts, out, width = info.shape
        return (*experts, out), (*experts, width)
    return (info.shape[info.output_dim],), (info.shape[1 - info.output_dim],)


def _has_window(info: ParameterInfo, rank: int) -> bool:
    if info.output_dim is not None and len(info.shape) == 2:
        return sides_of(info)[1][0] >= rank
    # Of fused experts, which side is the output does not matter. Kernels of convolutions are smaller than windows.
    return len(info.shape) == 3 and rank * sum(info.shape[1:]) < info.shape[1] * info.shape[2]


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
