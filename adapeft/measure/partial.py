"""Partial sums of the passes on disk, from which an interrupted measurement resumes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapeft.errors import AdapeftError
from adapeft.files.artifact import load_tensors, save_json
from adapeft.files.damage import load_json
from adapeft.files.rank_files import rank_path, save_on_ranks
from adapeft.ranks import Ranks

FOLDER = "partial-sums"
_KEY = "key.json"
_KIND = "partial sums"


class PartialSums:
    """Sums of a measurement's passes, in order: ``02-slope-00012`` after twelve batches of the third pass.

    A resumed measurement runs its passes in order, and a pass whose sums are stored here loads them instead of running
    those batches. Everything derived from sums is computed again, so nothing else is saved. A pass is saved when it
    ends, and every ``interval`` seconds until then; each rank writes its own sums.

    Args:
        folder: folder of the run.
        key: everything that the sums depend on, to the last bit; sums of another key are removed.
        interval: seconds between saves; 0 neither saves sums nor loads them.
        ranks: ranks that measure.
        clock: clock in seconds.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        interval: float,
        ranks: Ranks,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._interval, self._ranks = folder / FOLDER, interval, ranks
        self._number = -1
        self._clock, self._saved_at = clock, clock()
        self.dropped: list[str] = []
        """Entries of the key that differ from those of the sums on disk, which therefore cannot be resumed."""
        found = torch.zeros(1, dtype=torch.int64)
        if ranks.rank == 0:
            self._open({name: json.loads(json.dumps(value)) for name, value in key.items()})
            found = torch.tensor([*self._done(), 0])  # not empty, which not all backends could gather
        self._found = ranks.all_gather(found)[0].tolist()
        """Number of batches summed in each pass; the last pass may be incomplete."""

    def begin(self, name: str, sums: Sequence[Tensor]) -> int:
        """Begin the next pass: load its saved sums into ``sums`` and return the number of batches they cover.

        Raises:
            AdapeftError: the saved sums are damaged.
        """
        self._number += 1
        done = self._found[self._number] if self._number < len(self._found) else 0
        if not done:
            return 0
        path = rank_path(self._path(name, done), self._ranks.rank, self._ranks.world_size)
        tensors, _ = load_tensors(path, _KIND)
        shapes = {str(index): total.shape for index, total in enumerate(sums)}
        if {index: tensor.shape for index, tensor in tensors.items()} != shapes:
            raise AdapeftError(
                f"{path}: the saved sums have other shapes than this measurement. Remove {self._folder} to measure "
                f"from the start."
            )
        with torch.no_grad():
            for index, total in enumerate(sums):
                total.copy_(tensors[str(index)])
        return done

    def save(self, name: str, done: int, total: int, sums: Sequence[Tensor]) -> None:
        """Save ``sums`` over ``done`` of ``total`` batches of a pass if it has ended or a save is due. Collective."""
        if not self._interval or (done < total and not self._is_due()):
            return
        path = self._path(name, done)
        tensors = {str(index): tensor.detach() for index, tensor in enumerate(sums)}
        save_on_ranks(path, _KIND, tensors, {"pass": name, "done": done, "total": total}, self._ranks)
        if self._ranks.rank == 0:
            for older in self._folder.glob(f"{self._number:02d}-*"):
                if older != path:
                    shutil.rmtree(older)
        self._saved_at = self._clock()

    def remove(self) -> None:
        """Remove all partial sums once measuring is done."""
        if self._ranks.rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _is_due(self) -> bool:
        """Whether ``interval`` seconds have passed since the last save, by the clock of rank 0."""
        is_due = self._ranks.rank == 0 and self._clock() - self._saved_at >= self._interval
        return bool(self._ranks.all_reduce(torch.tensor([float(is_due)])) > 0)

    def _path(self, name: str, done: int) -> Path:
        return self._folder / f"{self._number:02d}-{name.replace(' ', '-')}-{done:05d}"

    def _open(self, key: dict[str, Any]) -> None:
        """Reset the folder unless it matches ``key``."""
        path = self._folder / _KEY
        if path.is_file() and self._interval:
            other = load_json(path, "key of partial sums", f"Remove {self._folder} to measure from the start.")
            self.dropped = [name for name in key if key[name] != other.get(name)]
            if not self.dropped:
                return
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._interval:
            save_json(path, key)

    def _done(self) -> list[int]:
        """Return the number of batches done in every pass that was begun."""
        newest: dict[int, int] = {}
        for path in self._folder.glob("[0-9]*"):
            number, done = int(path.name.partition("-")[0]), int(path.name.rpartition("-")[2])
            newest[number] = max(done, newest.get(number, 0))
        return [newest[number] for number in range(len(newest))]
