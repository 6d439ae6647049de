"""Progress of a check or a stage: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from cluster.events import Report

_LINE_INTERVAL = 10.0


@contextmanager
def watching(console: Console, first: str, prefix: str = "") -> Iterator[Report]:
    """Yield a function that shows events.

    Args:
        console: where they are shown.
        first: text that is shown until the first event.
        prefix: start of the text of every event.
    """
    if console.is_terminal:
        with _bars(console) as bars:
            yield _Bars(bars, first, prefix)
    else:
        yield _Lines(console, first, prefix)


class _Bars:
    """Shows events as a progress bar."""

    def __init__(self, bars: Progress, first: str, prefix: str) -> None:
        self.bars, self.prefix = bars, prefix
        self.task = bars.add_task(first, total=None)

    def __call__(self, event: dict[str, Any]) -> None:
        text = f"{self.prefix}{_text(event)}"
        if event["step"] == "evaluated" or event.get("is_note"):
            self.bars.console.print(Text(text), soft_wrap=True)
        else:
            self.bars.update(self.task, description=text, completed=event.get("done", 0), total=event.get("total"))


class _Lines:
    """Shows events as lines: one for each new step, then one every ``_LINE_INTERVAL`` seconds."""

    def __init__(self, console: Console, first: str, prefix: str) -> None:
        self.console, self.prefix = console, prefix
        self.last_step, self.last_time = "", 0.0
        self.console.print(first)

    def __call__(self, event: dict[str, Any]) -> None:
        is_new = event["step"] != self.last_step
        if not is_new and time.monotonic() - self.last_time < _LINE_INTERVAL and event["step"] != "evaluated":
            return
        self.last_step, self.last_time = event["step"], time.monotonic()
        count = f" {event['done']}/{event['total']}" if "done" in event else ""
        self.console.print(f"{self.prefix}{_text(event)}{count}", soft_wrap=True)


class _Count(TextColumn):
    """Shows ``3/16``, and nothing while the total is unknown."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        _Count(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _text(event: dict[str, Any]) -> str:
    if event["step"] == "evaluated":
        names = dict.fromkeys((event["metric"], "loss"))
        return f"step {event['at']}: {', '.join(f'{name} {event[name]:.4f}' for name in names)}"
    if "loss" in event:
        return f"{event['step']}, loss {event['loss']:.4f}"
    return str(event["step"])
