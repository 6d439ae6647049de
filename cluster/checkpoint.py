"""Checkpoints of training: what the optimizer steps, in pieces that any number of ranks at any ZeRO stage take up."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from adapeft.artifact import load_tensors
from adapeft.errors import AdapeftError
from adapeft.measure.shards import adam_state
from adapeft.rank_files import rank_paths, save_on_ranks
from adapeft.ranks import Ranks
from cluster.master_weights import MasterWeights

_KIND = "training checkpoint"
_COLUMNS = ("value", "exp_avg", "exp_avg_sq")


class Checkpoints:
    """Resumable checkpoints of what ``engine`` trains, each in a folder ``step-N``, of which the newest is kept.

    A rank writes its own part of every trained parameter: float32 values, Adam's moments and the count of its steps.
    Whoever resumes takes the ranges that it now holds from whichever ranks wrote them, and is where the run was, bit
    for bit.
    """

    def __init__(self, folder: Path, engine: DeepSpeedEngine, ranks: Ranks) -> None:
        self._folder, self._engine, self._ranks = folder, engine, ranks
        self._masters = MasterWeights(engine, ranks)
        self._trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}

    def save(self, step: int, progress: Mapping[str, Any]) -> None:
        """Writes ``step-N``, then removes the older ones. Collective."""
        # At stage 0 every rank has everything.
        pieces = self._pieces() if self._engine.zero_optimization_stage() or self._ranks.rank == 0 else {}
        tensors = {
            f"{name}.{column}": piece.columns[column].clone()  # safetensors takes no two views of one memory
            for name, piece in pieces.items()
            for column in _COLUMNS
        }
        parts = {name: {"start": piece.start, "adam_steps": int(piece.step)} for name, piece in pieces.items()}
        path = self._folder / f"step-{step}"
        save_on_ranks(path, _KIND, tensors, {"progress": dict(progress), "parts": parts}, self._ranks)
        if self._ranks.rank == 0:
            for older in self._folder.iterdir():
                if older != path:
                    shutil.rmtree(older, ignore_errors=True)

    def load(self) -> dict[str, Any] | None:
        """Puts the newest checkpoint into the engine and returns its progress; None where there is none. Collective.

        Raises:
            AdapeftError: it is damaged, or of another subset.
        """
        steps = [int(path.name.removeprefix("step-")) for path in self._folder.glob("step-*")]
        if not steps:
            return None
        folder = self._folder / f"step-{max(steps)}"
        pieces = self._pieces()
        missing = {name: len(piece.columns["value"]) for name, piece in pieces.items()}
        for path in rank_paths(folder, _REMEDY):
            tensors, description = load_tensors(path, _KIND)
            try:
                for name in description["parts"].keys() & pieces.keys():
                    saved = {column: tensors[f"{name}.{column}"] for column in _COLUMNS}
                    missing[name] -= pieces[name].take(description["parts"][name], saved)
                progress = description["progress"]
            except (KeyError, TypeError, AttributeError) as error:
                raise AdapeftError(f"{path}: damaged description ({error}). {_REMEDY}") from error
        if any(missing.values()):
            raise AdapeftError(f"{folder}: is of another subset, or damaged. {_REMEDY}")
        self._masters.publish()
        schedule = self._engine.lr_scheduler
        schedule.last_epoch = max(steps) - 1
        schedule.step()  # sets the learning rates of the step that follows
        return progress

    def _pieces(self) -> dict[str, _Piece]:
        """This rank's part of every trained parameter."""
        pieces = {}
        for name, parameter in self._trained.items():
            place = self._masters.range_of(parameter)
            if place is None or not place.length:
                continue
            state = adam_state(self._engine.basic_optimizer, place.flat)
            flats = {"value": place.flat.detach(), **state}
            columns = {column: flats[column].view(-1).narrow(0, place.offset, place.length) for column in _COLUMNS}
            pieces[name] = _Piece(place.start, columns, state["step"])
        return pieces


_REMEDY = "Remove the folder to train from the start."


@dataclass(frozen=True)
class _Piece:
    """A parameter's flattened elements from ``start`` on, and Adam's ``step``: live, what is written is trained on."""

    start: int
    columns: dict[str, Tensor]
    step: Tensor

    @torch.no_grad()
    def take(self, part: Mapping[str, int], saved: Mapping[str, Tensor]) -> int:
        """Copies what it has in common with a saved part, and returns of how many elements that is."""
        shift = part["start"] - self.start
        first, last = max(0, shift), min(len(self.columns["value"]), shift + len(saved["value"]))
        if first >= last:
            return 0
        for column, mine in self.columns.items():
            mine[first:last] = saved[column][first - shift : last - shift]
        self.step.fill_(part["adam_steps"])
        return last - first
