"""The folder of a run: the paths of its artifacts, and the checks that it belongs to the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock

from adapeft.config.config import Config
from adapeft.config.keys import differences, flatten
from adapeft.config.load import load_config
from adapeft.config.write import to_yaml
from adapeft.errors import AdapeftError
from adapeft.files.artifact import save_json, save_text
from adapeft.files.damage import load_json
from adapeft.measure.partial import FOLDER as PARTIAL_SUMS
from adapeft.measure.storage import ELEMENTS, TABLE
from adapeft.sections.paths import is_in_job_folder
from cluster.output.lock import LOCK, hold
from cluster.output.place import RECORD, working_folder

CONFIG = "config.yaml"
CONTENTS = "contents.json"
SUBSET = "subset.safetensors"
TRACKING = "tracking.json"

# Entries that a folder may hold before its run: the demo's data, and files of a run that failed before it had measured.
_WELCOME = ("data", "logs", CONTENTS, TRACKING, LOCK, ELEMENTS, PARTIAL_SUMS, RECORD)

_REMEDY = "Give another folder: output=…"
_UNREAD: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's artifacts."""

    path: Path

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        """Return the folder that a config names, or the working folder if it names a URL."""
        return cls(working_folder(config.output))

    @property
    def config(self) -> Path:
        """The whole config, defaults included."""
        return self.path / CONFIG

    @property
    def contents_path(self) -> Path:
        """Hashes of the run's inputs, as ``contents_of`` returns them."""
        return self.path / CONTENTS

    @property
    def table(self) -> Path:
        """Statistics of the groups."""
        return self.path / TABLE

    @property
    def subset(self) -> Path:
        """The subset to train."""
        return self.path / SUBSET

    @property
    def delta(self) -> Path:
        """The delta at the best evaluation."""
        return self.path / "delta.safetensors"

    @property
    def generations_before(self) -> Path:
        """Answers generated before training, one JSON object per line."""
        return self.path / "generations_before.jsonl"

    @property
    def generations(self) -> Path:
        """Answers generated at the best evaluation, one JSON object per line."""
        return self.path / "generations.jsonl"

    @property
    def metrics(self) -> Path:
        """Scores, sizes and seconds."""
        return self.path / "metrics.json"

    @property
    def report(self) -> Path:
        """Pictures and figures as one HTML file."""
        return self.path / "report.html"

    @property
    def pictures(self) -> Path:
        """Pictures of the report as PNG files."""
        return self.path / "pictures"

    @property
    def validation(self) -> Path:
        """Result of ``adapeft validate``."""
        return self.path / "validation.json"

    @property
    def validation_report(self) -> Path:
        """Pictures and figures of ``adapeft validate`` as one HTML file."""
        return self.path / "validation.html"

    @property
    def tracking(self) -> Path:
        """Ids of the run in its trackers."""
        return self.path / TRACKING

    @property
    def logs(self) -> Path:
        """Output and warnings of the workers, events, TensorBoard files; created when the folder is claimed."""
        return self.path / "logs"

    @property
    def events(self) -> Path:
        """Events of the run, one JSON object per line."""
        return self.logs / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Resumable checkpoints of the training."""
        return self.path / "checkpoints"

    def contents(self) -> dict[str, str]:
        """Return the hashes of the run's inputs when it began; empty before."""
        path = self.contents_path
        return load_json(path, "a run's record of its inputs", _REMEDY) if path.is_file() else {}

    def claim(self, config: Config, contents: Mapping[str, str] = _UNREAD) -> FileLock:
        """Claim the folder for a new run, or for resuming the same run, possibly on other machines.

        Args:
            config: config of the run.
            contents: hashes of its inputs, from ``contents_of``.

        Returns:
            A lock that keeps other commands from writing there until it is released.

        Raises:
            AdapeftError: the folder holds another run or files of no run, will not outlive the job, or another command
                is writing there.
        """
        if is_in_job_folder(str(self.path)):
            raise AdapeftError(
                f"output = {self.path} is in the job's copy of its working directory, which Ray removes afterwards. "
                "Give an absolute path on storage that all machines share: output=/…"
            )
        if self.config.is_file() and self._has_results():
            self.check_is_of(config, contents)
            lock = hold(self.path)
            if config.cluster != load_config(self.config).cluster:
                self._write(config)
            return lock
        if self.path.exists() and not self.path.is_dir():
            raise AdapeftError(f"output = {self.path} is a file. Give a folder.")
        # A config without logs next to it was written by the user and must not be overwritten.
        welcome = (*_WELCOME, self.config.name) if self.logs.is_dir() else _WELCOME
        foreign = sorted(entry.name for entry in self.path.glob("*") if entry.name not in welcome)
        if foreign:
            raise AdapeftError(
                f"output = {self.path} holds files that do not belong to a run ({foreign[0]} …). Give a new or empty "
                "folder."
            )
        lock = hold(self.path)
        self.logs.mkdir(exist_ok=True)
        if self.tracking.is_file() and not self._is_of(config, contents):
            self.tracking.unlink()  # another run begins, so its trackers begin another one too
        self._write(config)
        save_json(self.contents_path, dict(contents))
        return lock

    def check_has_statistics(self, given: str) -> None:
        """Check that the folder holds a run that has measured.

        Args:
            given: how the user named the folder, for the message.

        Raises:
            AdapeftError: it does not.
        """
        if not self.config.is_file() or not self.table.is_file():
            raise AdapeftError(f"{given}: no run with statistics ({CONFIG}, {TABLE}). Run select first.")

    def check_is_of(self, config: Config, contents: Mapping[str, str] = _UNREAD) -> None:
        """Check that the folder holds a run of this config, on any machines, with the same data and models.

        Raises:
            AdapeftError: the folder holds another run, or the inputs have changed since.
        """
        before = load_config(self.config)
        other = differences(config, before.model_copy(update={"cluster": config.cluster}))
        if other:
            raise AdapeftError(
                f"output = {self.path} holds another run:\n  "
                + "\n  ".join(other)
                + "\nGive another folder: output=…; "
                f"select.statistics={self.path} reuses its measurements."
            )

        self.check_contents(contents, flatten(config))

    def _is_of(self, config: Config, contents: Mapping[str, str]) -> bool:
        try:
            self.check_is_of(config, contents)
        except AdapeftError:
            return False
        return True

    def check_contents(self, contents: Mapping[str, str], places: Mapping[str, Any]) -> None:
        """Check that the inputs are the same as when the run began.

        Args:
            contents: hashes of the inputs as they are now.
            places: key of the config → the place that it names.

        Raises:
            AdapeftError: some inputs have changed; names each of them.
        """
        before = self.contents()
        changed = [
            f"{key} = {places[key]}: content {found[:12]} now, {before.get(key, 'not recorded')[:12]} then"
            for key, found in contents.items()
            if found != before.get(key)
        ]
        if changed:
            raise AdapeftError(
                f"output = {self.path} holds results of inputs that have changed since:\n  "
                + "\n  ".join(changed)
                + "\nRestore the old inputs, or give another folder to run with the new ones: output=…"
            )

    def _write(self, config: Config) -> None:
        save_text(self.config, to_yaml(config))

    def _has_results(self) -> bool:
        """Whether the folder holds results that another config must not mix with; an early failure leaves only logs."""
        return any(path.exists() for path in (self.table, self.subset, self.delta, self.checkpoints, self.validation))
