"""TensorBoard: event files in the run's logs."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from cluster.tracking.tracker import TrackedRun


class TensorBoard:
    """Writes event files, which need no id: those of a resumed run lie next to the earlier ones."""

    def start(self, run: TrackedRun) -> str:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.logs))
        if run.known is None:
            # An indented block of Markdown keeps its lines.
            lines = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True).splitlines()
            self._writer.add_text("config", "\n".join(f"    {line}" for line in lines))
        return run.name

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, *, failed: bool) -> None:
        self._writer.close()
