"""The folder of a run: where each artifact is, and whose folder it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock

from adapeft.config.config import Config
from adapeft.config.keys import differences, flatten
from adapeft.config.load import load_config, to_yaml
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

# What may be in a folder before its run: the demo's data, and what a run leaves that fails before it has measured.
_WELCOME = ("data", "logs", CONTENTS, LOCK, ELEMENTS, PARTIAL_SUMS, RECORD)

_REMEDY = "Give another folder: output=…"
_UNREAD: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's artifacts."""

    path: Path

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        """The folder that a config names, or in which the files of the URL that it names are worked on."""
        return cls(working_folder(config.output))

    @property
    def config(self) -> Path:
        """The whole config, defaults included."""
        return self.path / CONFIG

    @property
    def contents_path(self) -> Path:
        """Hashes of what the run reads, as ``contents_of`` gives them."""
        return self.path / CONTENTS

    @property
    def table(self) -> Path:
        """What was measured of each group."""
        return self.path / TABLE

    @property
    def subset(self) -> Path:
        """What is trained."""
        return self.path / "subset.safetensors"

    @property
    def delta(self) -> Path:
        """What training changed: the best evaluation's."""
        return self.path / "delta.safetensors"

    @property
    def metrics(self) -> Path:
        """Scores, sizes and seconds."""
        return self.path / "metrics.json"

    @property
    def validation(self) -> Path:
        """Whether predictions hold, where ``adapeft validate`` was asked."""
        return self.path / "validation.json"

    @property
    def logs(self) -> Path:
        """Output and warnings of the workers, the events, TensorBoard's; made when the folder is claimed."""
        return self.path / "logs"

    @property
    def events(self) -> Path:
        """What happened when, a JSON object a line."""
        return self.logs / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Resumable checkpoints of what is trained."""
        return self.path / "checkpoints"

    def contents(self) -> dict[str, str]:
        """Hashes of what the run read when it began; empty before."""
        path = self.contents_path
        return load_json(path, "what a run writes of its inputs", _REMEDY) if path.is_file() else {}

    def claim(self, config: Config, contents: Mapping[str, str] = _UNREAD) -> FileLock:
        """Makes the folder this config's, or takes it up again where the same run left it, perhaps on other machines.

        Args:
            config: of the run.
            contents: hashes of what it reads, from ``contents_of``.

        Returns:
            What keeps other commands from writing there until it is released.

        Raises:
            AdapeftError: it holds another run, or files that are no run at all, or will not outlive the job; or another
                command is writing there.
        """
        if is_in_job_folder(str(self.path)):
            raise AdapeftError(
                f"output = {self.path} is in this job's own copy of its working directory, which Ray removes. Give an "
                "absolute path on storage that all machines share: output=/…"
            )
        if self.config.is_file() and self._has_results():
            self.check_is_of(config, contents)
            lock = hold(self.path)
            if config.cluster != load_config(self.config).cluster:
                self._write(config)
            return lock
        if self.path.exists() and not self.path.is_dir():
            raise AdapeftError(f"output = {self.path} is a file. Give a folder.")
        # A config without logs beside it is somebody's own, which must not be overwritten.
        welcome = (*_WELCOME, self.config.name) if self.logs.is_dir() else _WELCOME
        foreign = sorted(entry.name for entry in self.path.glob("*") if entry.name not in welcome)
        if foreign:
            raise AdapeftError(
                f"output = {self.path} holds files that are no run ({foreign[0]} …). Give a new or empty folder."
            )
        lock = hold(self.path)
        self.logs.mkdir(exist_ok=True)
        self._write(config)
        save_json(self.contents_path, dict(contents))
        return lock

    def check_is_of(self, config: Config, contents: Mapping[str, str] = _UNREAD) -> None:
        """Checks that what is here came of such a config, on whatever machines, and of the same data and models.

        Raises:
            AdapeftError: it holds another run, or one whose inputs have changed since.
        """
        before = load_config(self.config)
        other = differences(config, before.model_copy(update={"cluster": config.cluster}))
        if other:
            raise AdapeftError(
                f"output = {self.path} holds another run:\n  "
                + "\n  ".join(other)
                + "\nGive another folder: output=…; "
                f"select.statistics={self.path} uses its measurements again."
            )

        self.check_contents(contents, flatten(config))

    def check_contents(self, contents: Mapping[str, str], places: Mapping[str, Any]) -> None:
        """Checks that what was read now is what the run read when it began.

        Args:
            contents: hashes of what was read.
            places: key of the config → the place that it names.

        Raises:
            AdapeftError: names each place that holds something else than it did.
        """
        before = self.contents()
        changed = [
            f"{key} = {places[key]}: content {found[:12]} now, {before.get(key, 'not recorded')[:12]} then"
            for key, found in contents.items()
            if found != before.get(key)
        ]
        if changed:
            raise AdapeftError(
                f"output = {self.path} holds results of other inputs, which have changed since at the same place:\n  "
                + "\n  ".join(changed)
                + "\nPut back what was there, or give another folder to run with the new inputs: output=…"
            )

    def _write(self, config: Config) -> None:
        save_text(self.config, to_yaml(config))

    def _has_results(self) -> bool:
        """Whether there is anything that another config would spoil; a run that failed early has only its logs."""
        return any(path.exists() for path in (self.table, self.subset, self.delta, self.checkpoints, self.validation))
