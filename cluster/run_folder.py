"""The folder of a run: where each artifact is, and whose folder it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapeft.artifact import replacing
from adapeft.config import Config, differences
from adapeft.config_file import load_config, to_yaml
from adapeft.errors import AdapeftError


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's artifacts."""

    path: Path

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        """The folder that a config names."""
        return cls(Path(config.output))

    @property
    def config(self) -> Path:
        """The whole config, defaults included."""
        return self.path / "config.yaml"

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
    def logs(self) -> Path:
        """Output of the workers, TensorBoard events."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """DeepSpeed's resumable checkpoints."""
        return self.path / "checkpoints"

    def claim(self, config: Config) -> None:
        """Makes the folder this config's, or takes it up again where the same run left it.

        Raises:
            AdapeftError: it holds another run, or files that are no run at all.
        """
        if self.config.is_file():
            other = differences(config, load_config(self.config))
            if other:
                raise AdapeftError(
                    f"output = {self.path} holds another run:\n  " + "\n  ".join(other) + "\nGive another folder: "
                    f"output=…; select.statistics={self.path} uses its measurements again."
                )
            return
        if self.path.exists() and not self.path.is_dir():
            raise AdapeftError(f"output = {self.path} is a file. Give a folder.")
        foreign = (
            sorted(entry.name for entry in self.path.iterdir() if entry.name != "data") if self.path.exists() else []
        )
        if foreign:
            raise AdapeftError(
                f"output = {self.path} holds files that are no run ({foreign[0]} …). Give a new or empty folder."
            )
        with replacing(self.config) as temporary:
            temporary.write_text(to_yaml(config))
