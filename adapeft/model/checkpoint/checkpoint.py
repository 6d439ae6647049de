"""Reading a base model's weights from disk as transformers loads them, one tensor at a time where possible."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapeft.errors import AdapeftError
from adapeft.files.damage import reading
from adapeft.model.checkpoint.conversion import Conversion
from adapeft.model.checkpoint.files import has_weights, local_folder, weight_files
from adapeft.model.checkpoint.names import WeightNames
from adapeft.model.checkpoint.shard import can_be_mapped, opened
from adapeft.model.fingerprint import Entry, base_name, fingerprint, sample
from adapeft.model.structure import parameter_names
from adapeft.model.wrappers import wrapped_names


def open_checkpoint(base: str, structure: PreTrainedModel, revision: str | None = None) -> Checkpoint:
    """Open the weights of ``base`` for a model with the modules of ``structure``.

    Safetensors are read one tensor at a time. If transformers converts tensors (fused experts), or if the weights are
    pickled, transformers loads the whole model into the memory of this process, in the checkpoint's dtype: files that
    are written shard by shard would differ from the base's in more than the values.

    Args:
        base: folder or hub name.
        structure: the model, possibly on the meta device.
        revision: branch, tag or commit of a hub model.

    Raises:
        AdapeftError: the base does not exist or has no weights.
    """
    folder = local_folder(base, revision)
    found = open_stored(folder, base, structure)
    return found if found is not None and found.is_final else LoadedCheckpoint(folder, structure)


def open_stored(
    folder: Path, base: str, structure: PreTrainedModel, dtype: torch.dtype | None = None
) -> StoredCheckpoint | None:
    """Open the weights in ``folder`` to read them one tensor at a time; None if torch before 1.6 has pickled them.

    Args:
        folder: folder of the base model.
        base: name that the user gave for it, for messages.
        structure: the model, possibly on the meta device.
        dtype: see ``StoredCheckpoint``.

    Raises:
        AdapeftError: there are no weights.
    """
    files = weight_files(folder, base, getattr(structure.config, "transformers_weights", None))
    if not all(map(can_be_mapped, files)):
        return None
    return StoredCheckpoint(folder, files, structure, dtype)


def unmapped_bytes(folder: Path, base: str) -> int:
    """Return the bytes of the weight files in ``folder`` of which no single tensor can be read; see ``open_stored``."""
    return sum(file.stat().st_size for file in weight_files(folder, base) if not can_be_mapped(file))


def is_tied(folder: Path, structure: PreTrainedModel) -> bool:
    """Whether the head is tied to the embedding after transformers loads ``folder`` into a model like ``structure``.

    It is not if the folder holds a head with other values than the embedding, whatever its config says. If the weights
    cannot be read one tensor at a time, the config decides.
    """
    if has_weights(folder) or getattr(structure.config, "transformers_weights", None):
        found = open_stored(folder, str(folder), structure)
        if found is not None and found.obstacle is None:
            found.settle_ties()
    return structure.config.tie_word_embeddings


class Checkpoint(ABC):
    """Weights of a base model by the parameter names of ``structure``; a tied parameter has the first of its names.

    Attributes:
        folder: folder of the base model.
        structure: the model; ties of its config that the weights contradict are undone in it, as transformers does.
        mismatched: name → shape in the checkpoint, for tensors whose shape in the model differs; these are not stored.
        unknown: keys in the files that match no parameter or buffer of the model.
    """

    folder: Path
    structure: PreTrainedModel
    mismatched: dict[str, tuple[int, ...]]
    unknown: list[str]

    @abstractmethod
    def stored(self) -> set[str]:
        """Return the names of all tensors of the model that the checkpoint holds."""

    @abstractmethod
    def tensors(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of every stored tensor, or only of those in ``names``."""

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return the stored tensors among ``names``; no other weight is read."""
        return dict(self.tensors(names))

    def parameters(self, new: Collection[str] = ()) -> list[str]:
        """Return the names of the model's parameters, except the ``new`` ones, which no base checkpoint holds."""
        return [name for name, _ in self.structure.named_parameters() if name not in new]

    def fingerprint(self, new: Collection[str] = ()) -> str:
        """Return the fingerprint of the base model without its ``new`` parameters.

        Raises:
            AdapeftError: the checkpoint lacks a parameter.
        """
        return fingerprint(self.entries(new))

    def entries(self, new: Collection[str] = ()) -> Iterator[Entry]:
        """Yield the entries of the fingerprint; raises the same error as ``fingerprint``."""
        names = self.parameters(new)
        missing = sorted(set(names) - self.stored())
        if missing:
            raise AdapeftError(self._not_stored(missing))
        prefix = self.structure.base_model_prefix
        for name, tensor in self.tensors(names):
            yield base_name(name, prefix), sample(tensor), tuple(tensor.shape)

    def settle_ties(self) -> None:
        """Set ``tie_word_embeddings`` to false if the weights contradict every tie of the config."""
        configured = self.structure.get_expanded_tied_weights_keys(all_submodels=True)
        if configured and not self.structure.all_tied_weights_keys:
            self.structure.config.tie_word_embeddings = False

    def _not_stored(self, missing: list[str]) -> str:
        """Return the error message for parameters that transformers would initialize at random."""
        name, prefix = missing[0], self.structure.base_model_prefix
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        said = f"{self.folder}: the base checkpoint has no {name!r}{more}"
        if name in self.mismatched:
            shape = tuple(self.structure.get_parameter(name).shape)
            return (
                f"{self.folder}: {name!r} has shape {self.mismatched[name]} in the base checkpoint, but {shape} in the "
                f"model that its config and the delta's labels define. Give the base that the delta was trained on."
            )
        head = self.structure.get_output_embeddings()
        is_head_alone = len(missing) == 1 and not self.structure.config.tie_word_embeddings and head is not None
        if is_head_alone and self.structure.get_parameter(name) is getattr(head, "weight", None):
            return (
                f"{said}, and config.json has tie_word_embeddings = false: transformers initializes it at random each "
                f"time it loads this folder. Save the base model of the training with save_pretrained, or set "
                f"tie_word_embeddings to true if the head is the embedding."
            )
        if wrapped := wrapped_names(missing, self.unknown, prefix):
            return f"{said}: {wrapped}"
        similar = [key for key in self.unknown if key.endswith(base_name(name, prefix))]
        stored_as = f"; it has {similar[0]!r}, a name that transformers does not recognize" if similar else ""
        return (
            f"{said}{stored_as}: transformers initializes it at random when it loads this folder. Load the model in "
            f"Python, call save_pretrained, and give that folder."
        )


class StoredCheckpoint(Checkpoint):
    """Weight files, safetensors or pickled, that are read one tensor at a time.

    Args:
        folder: folder of the base model.
        shards: the files.
        structure: the model, possibly on the meta device.
        dtype: dtype to which parameters are cast before they are converted, as transformers does for that of the loaded
            model; None for that of the files.

    Attributes:
        shards: the files.
        obstacle: reason why the tensors cannot be read one at a time; None if they can.
        is_final: whether the files are safetensors whose tensors are used as they are.
    """

    def __init__(
        self, folder: Path, shards: list[Path], structure: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> None:
        self.folder, self.shards, self.structure = folder, shards, structure
        self.mismatched, self.unknown = {}, []
        self.obstacle: str | None = None
        self._dtype = dtype
        self._keys: dict[Path, dict[str, str]] = {shard: {} for shard in shards}  # key → name
        self._conversions: dict[str, Conversion] = {}  # first name → conversion
        self._find(WeightNames(structure))
        are_safe = all(shard.suffix == ".safetensors" for shard in shards)
        self.is_final = are_safe and not self._conversions and self.obstacle is None
        if self.obstacle is None:
            self._untie()
            self._drop_second_names()

    def _find(self, names: WeightNames) -> None:
        """Find what is stored and how it is converted, from the names and shapes in the files."""
        if names.unstable is not None:
            self.obstacle = f"transformers takes the name {names.unstable!r} of the model for an older one"
        shapes = {name: tuple(tensor.shape) for name, tensor in self.structure.state_dict().items()}
        for shard in self.shards:
            with opened(shard) as file:
                for key in file.keys():  # noqa: SIM118
                    name, pattern = names.find(key)
                    shape = file.shape(key)
                    if name is None:
                        self.unknown.append(key)
                    elif pattern is not None:
                        if name not in self._conversions:
                            self._conversions[name] = Conversion(name, names.converter(pattern), self.structure)
                        self._conversions[name].add(key, pattern, shard, shape)
                    elif shape == shapes[name]:
                        self._keys[shard][key] = name
                    else:
                        self.mismatched[name] = shape
        self._find_shapes(shapes)
        if self.obstacle is None:
            self._check_names()

    def _find_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Find what the conversions make, without reading values; ``shapes`` are those of the model."""
        for name, conversion in self._conversions.items():
            try:
                conversion.find_shapes()
            except Exception as error:  # an operation may need values, or other tensors than the files have
                self.obstacle = f"transformers cannot convert {name!r} alone ({error})"
                return
            wrong = {made: shape for made, shape in conversion.shapes.items() if shapes.get(made) != shape}
            self.unknown += wrong.keys() - shapes.keys()
            self.mismatched |= {made: shape for made, shape in wrong.items() if made in shapes}
            for made in wrong:
                del conversion.shapes[made]

    def _check_names(self) -> None:
        """Find an obstacle in the names of what is stored."""
        several = [name for name, count in Counter(self.order()).items() if count > 1]
        first = parameter_names(self.structure)
        second = [name for each in self._conversions.values() for name in each.shapes if first.get(name, name) != name]
        if several:
            self.obstacle = f"several of its tensors are {several[0]!r}"
        elif second:
            self.obstacle = f"{second[0]!r}, which transformers converts, is tied to {first[second[0]]!r}"

    def stored(self) -> set[str]:
        return set(self.order())

    def order(self) -> list[str]:
        """Return the names of the ``tensors``, in their order."""
        used = (name for keys in self._keys.values() for name in keys.values())
        return [*used, *(name for conversion in self._conversions.values() for name in conversion.shapes)]

    def tensors(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        for shard in self.shards:
            yield from self.in_shard(shard, names)
        for conversion in self._conversions.values():
            wanted = [name for name in conversion.shapes if names is None or name in names]
            made = conversion.convert(self._dtype) if wanted else {}
            for name in wanted:
                yield name, made.pop(name)

    def in_shard(self, shard: Path, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the ``tensors`` of one file that are used as they are."""
        wanted = {key: name for key, name in self._keys[shard].items() if names is None or name in names}
        if wanted:
            with opened(shard) as file:
                for key, name in wanted.items():
                    yield name, file.read(key)

    def _untie(self) -> None:
        """Undo ties between parameters that are both stored, with different values.

        ``PreTrainedModel.tie_weights`` does the same while loading: "both are present in the checkpoints with different
        values, so we will NOT tie them".
        """
        stored = self.stored()
        for target, source in list(self.structure.all_tied_weights_keys.items()):
            if target not in stored or source not in stored:
                continue
            values = self.read([target, source])
            if torch.equal(values[target].to(values[source].dtype), values[source]):
                continue
            owner, _, local_name = target.rpartition(".")
            own = nn.Parameter(torch.empty_like(self.structure.get_parameter(source)))
            setattr(self.structure.get_submodule(owner), local_name, own)
            del self.structure.all_tied_weights_keys[target]

    def _drop_second_names(self) -> None:
        """Keep every tied parameter once, under the first of its names."""
        first = parameter_names(self.structure)
        seen = {name for conversion in self._conversions.values() for name in conversion.shapes}
        for keys in self._keys.values():
            for key, name in list(keys.items()):
                keys[key] = known = first.get(name, name)
                if known in seen:
                    del keys[key]
                seen.add(known)


class LoadedCheckpoint(Checkpoint):
    """Weights of a model that transformers has loaded into memory; ``structure`` holds them."""

    def __init__(self, folder: Path, structure: PreTrainedModel) -> None:
        with reading(f"{folder}: transformers cannot load the base", "Give a base that transformers can load."):
            loaded: Any = type(structure).from_pretrained(
                folder,
                config=deepcopy(structure.config),
                dtype="auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
            )
        model, info = loaded
        self.folder, self.structure = folder, model.eval()
        self.mismatched = {name: tuple(shape) for name, shape, _ in info["mismatched_keys"]}
        self.unknown = sorted(info["unexpected_keys"])
        first = parameter_names(model)
        missing = {*info["missing_keys"], *self.mismatched}
        self._stored = {first.get(name, name) for name in model.state_dict() if name not in missing}

    def stored(self) -> set[str]:
        return self._stored

    def tensors(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """See ``Checkpoint.tensors``; yields copies, so that the caller may change them."""
        state = self.structure.state_dict()
        for name in sorted(self._stored):
            if names is None or name in names:
                yield name, state[name].clone()
