"""What passes have summed so far, on disk: a measurement that was interrupted goes on from there."""

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
    """The sums of a measurement's passes, in their order: ``02-slope-00012`` after twelve batches of the third pass.

    What has been measured is measured again, pass by pass, but a pass that finds its sums here takes them instead of
    its batches. All that is computed from sums is computed anew, so that nothing else needs saving. A pass is saved
    when it ends, and while it lasts every ``interval`` seconds; each rank writes its own sums.

    Args:
        folder: of the run.
        key: what the sums depend on, to the last bit; those of another key are removed.
        interval: seconds; 0 saves nothing, and finds nothing.
        ranks: that measure.
        clock: in seconds.
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
        """Entries of the key under which sums were found that this measurement cannot go on from."""
        found = torch.zeros(1, dtype=torch.int64)
        if ranks.rank == 0:
            self._open({name: json.loads(json.dumps(value)) for name, value in key.items()})
            found = torch.tensor([*self._done(), 0])  # not empty, which not all backends could gather
        self._found = ranks.all_gather(found)[0].tolist()
        """Batches that are summed of each pass, the last of which may not be complete."""

    def take_up(self, name: str, sums: Sequence[Tensor]) -> int:
        """Begins the next pass: fills ``sums`` with what was saved of it and returns how many batches that covers.

        Raises:
            AdapeftError: what was saved is damaged.
        """
        self._number += 1
        done = self._found[self._number] if self._number < len(self._found) else 0
        if not done:
            return 0
        path = rank_path(self._path(name, done), self._ranks.rank, self._ranks.world_size)
        tensors, _ = load_tensors(path, _KIND)
        shapes = {str(index): total.shape for index, total in enumerate(sums)}
        if {index: tensor.shape for index, tensor in tensors.items()} != shapes:
            raise AdapeftError(f"{path}: sums of other shapes. Remove {self._folder} to measure anew.")
        with torch.no_grad():
            for index, total in enumerate(sums):
                total.copy_(tensors[str(index)])
        return done

    def save(self, name: str, done: int, total: int, sums: Sequence[Tensor]) -> None:
        """Saves ``sums`` over ``done`` of a pass's ``total`` batches, if it is time to. Collective."""
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
        """Drops everything: measuring is done."""
        if self._ranks.rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _is_due(self) -> bool:
        """Whether the first rank's clock says so."""
        is_due = self._ranks.rank == 0 and self._clock() - self._saved_at >= self._interval
        return bool(self._ranks.all_reduce(torch.tensor([float(is_due)])) > 0)

    def _path(self, name: str, done: int) -> Path:
        return self._folder / f"{self._number:02d}-{name.replace(' ', '-')}-{done:05d}"

    def _open(self, key: dict[str, Any]) -> None:
        """Makes the folder this key's."""
        path = self._folder / _KEY
        if path.is_file() and self._interval:
            other = load_json(path, "what measuring leaves", f"Remove {self._folder} to measure anew.")
            self.dropped = [name for name in key if key[name] != other.get(name)]
            if not self.dropped:
                return
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._interval:
            save_json(path, key)

    def _done(self) -> list[int]:
        """Batches done of every pass that was begun."""
        newest: dict[int, int] = {}
        for path in self._folder.glob("[0-9]*"):
            number, done = int(path.name.partition("-")[0]), int(path.name.rpartition("-")[2])
            newest[number] = max(done, newest.get(number, 0))
        return [newest[number] for number in range(len(newest))]
