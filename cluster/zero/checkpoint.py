"""Checkpoints of training that can be loaded by any number of ranks at any ZeRO stage."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from adapeft.errors import AdapeftError
from adapeft.files.artifact import load_tensors
from adapeft.files.rank_files import rank_paths, save_on_ranks
from adapeft.finite import DIVERGED, check_finite, is_finite
from adapeft.measure.shards.always_trained import adam_state
from adapeft.ranks import Ranks
from adapeft.tune.attachment import attachment_of
from adapeft.tune.buffers import changed_buffers, set_buffers
from adapeft.tune.shards import Range
from cluster.zero.engine import head_rate_of, set_head_rate
from cluster.zero.master_weights import MasterWeights

_KIND = "training checkpoint"
_REMEDY = "Remove the folder to train from the start."
_BUFFER = "buffer."
_HEAD_RATE = "head_learning_rate"
_PART = ("offset", "start", "length")


class Checkpoints:
    """Resumable checkpoints of the parameters that ``engine`` trains, in folders ``step-N``; only the newest is kept.

    Each rank writes its part of every trained parameter (float32 values, Adam's moments and step count), the buffers
    that training changed and the peak learning rate of a new head, which are the same on every rank. When resuming,
    each rank reads the ranges that it now holds from the files that contain them. The restored state is bit-identical.
    """

    def __init__(self, folder: Path, engine: DeepSpeedEngine, ranks: Ranks) -> None:
        self._folder, self._engine, self._ranks = folder, engine, ranks
        self._masters = MasterWeights(engine, ranks)
        self._buffers_before = attachment_of(engine.module).buffers
        self._trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}

    def save(self, step: int, progress: Mapping[str, Any]) -> None:
        """Write ``step-N``, then remove older checkpoints. Collective.

        Raises:
            AdapeftError: a value or moment is not finite; older checkpoints are kept.
        """
        # At stage 0 every rank holds all values.
        places = self._places() if self._engine.zero_optimization_stage() or self._ranks.rank == 0 else {}
        # Saved whole, as the optimizer steps them: safetensors accepts no views, so pieces would have to be copied.
        flats = {id(place.flat): place.flat for place in places.values()}
        numbers = {key: number for number, key in enumerate(flats)}
        states = [self._state(flat) for flat in flats.values()]
        tensors = {f"{number}.{name}": tensor for number, state in enumerate(states) for name, tensor in state.items()}
        parts = {
            name: {"flat": numbers[id(place.flat)], **{key: getattr(place, key) for key in _PART}}
            for name, place in places.items()
        }
        buffers = changed_buffers(self._engine.module, self._buffers_before)
        tensors |= {f"{_BUFFER}{name}": value for name, value in buffers.items()}
        self._check_finite(step, places, buffers)
        path = self._folder / f"step-{step}"
        description = {"progress": dict(progress), "parts": parts, _HEAD_RATE: head_rate_of(self._engine)}
        save_on_ranks(path, _KIND, tensors, description, self._ranks)
        if self._ranks.rank == 0:
            for older in self._folder.iterdir():
                if older != path:
                    shutil.rmtree(older, ignore_errors=True)

    def load(self) -> dict[str, Any] | None:
        """Load the newest checkpoint into the engine and return its progress; None without a checkpoint. Collective.

        Raises:
            AdapeftError: the checkpoint is damaged, or belongs to another subset.
        """
        steps = [int(path.name.removeprefix("step-")) for path in self._folder.glob("step-*")]
        if not steps:
            return None
        folder = self._folder / f"step-{max(steps)}"
        places = self._places()
        missing = {name: place.length for name, place in places.items()}
        for path in rank_paths(folder, _REMEDY):
            tensors, description = load_tensors(path, _KIND)
            check_finite(tensors, str(path), _REMEDY)
            try:
                for name in description["parts"].keys() & places.keys():
                    missing[name] -= self._take(places[name], description["parts"][name], tensors)
                progress, head_rate = description["progress"], description[_HEAD_RATE]
                buffers = {
                    key.removeprefix(_BUFFER): value for key, value in tensors.items() if key.startswith(_BUFFER)
                }
                set_buffers(self._engine.module, buffers)
            except (KeyError, TypeError, AttributeError, RuntimeError) as error:
                raise AdapeftError(f"{path}: damaged description ({error}). {_REMEDY}") from error
        if any(missing.values()):
            raise AdapeftError(f"{folder}: the checkpoint is damaged or of another subset. {_REMEDY}")
        self._masters.publish()
        if head_rate is not None:
            set_head_rate(self._engine, head_rate)
        schedule = self._engine.lr_scheduler
        schedule.last_epoch = max(steps) - 1
        schedule.step()  # sets the learning rates of the next step
        return progress

    def _check_finite(self, step: int, places: Mapping[str, Range], buffers: Mapping[str, Tensor]) -> None:
        """Raise ``AdapeftError`` on all ranks if any value is not finite; it names the first such parameter."""
        names = [*self._trained, *buffers]
        bad = [names.index(name) for name, place in places.items() if not all(map(is_finite, self._parts(place)))]
        bad += [names.index(name) for name, value in buffers.items() if not is_finite(value)]
        found = torch.cat(self._ranks.all_gather(torch.tensor([*bad, len(names)])))
        if (first := int(found.min())) < len(names):
            raise AdapeftError(
                f"{DIVERGED}: after step {step}, {names[first]!r} or its Adam moments hold values that are not finite. "
                f"This checkpoint is not saved; earlier ones are kept. Lower train.learning_rate, or set "
                f"train.max_grad_norm if it is off."
            )

    def _parts(self, place: Range) -> Iterator[Tensor]:
        """Yield the values and moments of a range."""
        for name, tensor in self._state(place.flat).items():
            if name != "step":
                yield tensor.view(-1).narrow(0, place.offset, place.length)

    def _places(self) -> dict[str, Range]:
        """Return this rank's part of every trained parameter."""
        places = {name: self._masters.range_of(parameter) for name, parameter in self._trained.items()}
        return {name: place for name, place in places.items() if place is not None and place.length}

    def _state(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the live Adam state of a flat tensor; writes to it take effect at the next step."""
        return {"value": flat.detach(), **adam_state(self._engine.basic_optimizer, flat)}

    @torch.no_grad()
    def _take(self, place: Range, part: Mapping[str, int], tensors: Mapping[str, Tensor]) -> int:
        """Copy the overlap of ``place`` and a saved part, and return its number of elements."""
        first = max(place.start, part["start"])
        length = min(place.start + place.length, part["start"] + part["length"]) - first
        if length <= 0:
            return 0
        for name, tensor in self._state(place.flat).items():
            saved = tensors[f"{part['flat']}.{name}"]
            if name == "step":
                tensor.copy_(saved)
                continue
            mine = tensor.view(-1).narrow(0, place.offset + first - place.start, length)
            mine.copy_(saved.view(-1).narrow(0, part["offset"] + first - part["start"], length))
        return length
