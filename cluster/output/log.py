"""Machine-readable logs: one JSON object per line, with time, run, stage and rank."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any

# Libraries whose messages do not reach the root logger (those of transformers do if CI=1 is set in the environment).
_CLOSED = ("transformers", "datasets", "huggingface_hub", "DeepSpeed")


class JsonFormatter(logging.Formatter):
    """Formats a record as one line: time, level, ``fields``, logger, message, and the items of its ``event``."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.fields = fields

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            **self.fields,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "event", {}),
        }
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(_plain(content), default=str, allow_nan=False)


@contextmanager
def rank_log(path: Path, run: str, stage: str, rank: int) -> Iterator[None]:
    """Write this process's warnings, and the error that ends the block, to a file; without any, no file is created."""
    handler = _handler(path, run=run, stage=stage, rank=rank)
    handler.setLevel(logging.WARNING)
    closed = [logging.getLogger(name) for name in _CLOSED]
    loggers = [logging.getLogger(), *(logger for logger in closed if not logger.propagate)]
    for logger in loggers:
        logger.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    except Exception as error:
        logging.getLogger(__name__).exception("%s: %s", type(error).__name__, error)
        raise
    finally:
        logging.captureWarnings(False)
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


class EventLog:
    """Writes the events of a run to ``path``, in the process that watches it.

    Keeps the first and the last event of each step, and every event with a loss.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._handler = _handler(path, run=run)
        self._last_step = ""

    def __call__(self, event: dict[str, Any]) -> None:
        is_last = "done" in event and event["done"] == event["total"]
        if event["step"] != self._last_step or "loss" in event or is_last:
            self._last_step = event["step"]
            self.write(event["step"], rank=0, **{name: value for name, value in event.items() if name != "step"})

    def write(self, message: str, level: int = logging.INFO, **fields: Any) -> None:
        """Write a line with this message and these fields."""
        record = logging.makeLogRecord(
            {"name": "adapeft", "levelno": level, "levelname": logging.getLevelName(level), "msg": message}
        )
        record.event = fields
        self._handler.handle(record)

    def close(self) -> None:
        self._handler.close()


class _File(logging.FileHandler):
    """Creates its folder with the first line, because only a run may create a run's folder."""

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


def _handler(path: Path, **fields: Any) -> logging.FileHandler:
    handler = _File(path, delay=True)
    handler.setFormatter(JsonFormatter(**fields))
    return handler


def _plain(value: Any) -> Any:
    """Return ``value`` with non-finite numbers as text, so that the log of a failure does not fail on them."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
