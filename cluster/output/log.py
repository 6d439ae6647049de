"""Logs for machines: a JSON object a line, with time, run, stage and rank."""

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

# Libraries that keep their messages from the root logger, transformers except where the environment says CI=1.
_CLOSED = ("transformers", "datasets", "huggingface_hub", "DeepSpeed")


class JsonFormatter(logging.Formatter):
    """A record as one line: time, level, ``fields``, logger, message, and what the record's ``event`` says besides."""

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
    """Sends this process's warnings, and the error that ends the block, to a file; without any there is none."""
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
    """The events of a run in ``path``, from whoever watches it.

    Of a step's counts the first and the last are kept; what has a loss always is.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._handler = _handler(path, run=run)
        self._last_step = ""

    def __call__(self, event: dict[str, Any]) -> None:
        """Writes an event of rank 0."""
        is_last = "done" in event and event["done"] == event["total"]
        if event["step"] != self._last_step or "loss" in event or is_last:
            self._last_step = event["step"]
            self.write(event["step"], rank=0, **{name: value for name, value in event.items() if name != "step"})

    def write(self, message: str, level: int = logging.INFO, **fields: Any) -> None:
        """Writes a line of one's own."""
        record = logging.makeLogRecord(
            {"name": "adapeft", "levelno": level, "levelname": logging.getLevelName(level), "msg": message}
        )
        record.event = fields
        self._handler.handle(record)

    def close(self) -> None:
        """Closes the file."""
        self._handler.close()


class _File(logging.FileHandler):
    """Makes its folder with the first line, since nothing but a run may make a run's folder."""

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


def _handler(path: Path, **fields: Any) -> logging.FileHandler:
    handler = _File(path, delay=True)
    handler.setFormatter(JsonFormatter(**fields))
    return handler


def _plain(value: Any) -> Any:
    """``value`` with every number that is not finite as text: a log of what went wrong must not fail on it."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
