"""Carries stages to the workers of a Ray cluster, and their events back."""

from __future__ import annotations

import asyncio
from typing import Any


class Board:
    """An actor that holds the stages of a run in their order and the events that nobody has read yet.

    Ray's queue serves one reader; every worker reads every stage. Stages are pickled, so that this process needs no
    torch to hand them on.
    """

    def __init__(self) -> None:
        self._stages: list[bytes | None] = []
        self._posted = asyncio.Condition()
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def post(self, stage: bytes | None) -> None:
        """Adds a stage; None is the end."""
        async with self._posted:
            self._stages.append(stage)
            self._posted.notify_all()

    async def stage(self, number: int) -> bytes | None:
        """The stage of this number, once it is there."""
        async with self._posted:
            await self._posted.wait_for(lambda: len(self._stages) > number)
        return self._stages[number]

    async def tell(self, event: dict[str, Any]) -> None:
        """Adds an event."""
        self._events.put_nowait(event)

    async def events(self, timeout: float) -> list[dict[str, Any]]:
        """All events that nobody has read, at most ``timeout`` seconds after there were none."""
        try:
            found = [await asyncio.wait_for(self._events.get(), timeout)]
        except TimeoutError:
            return []
        while not self._events.empty():
            found.append(self._events.get_nowait())
        return found
