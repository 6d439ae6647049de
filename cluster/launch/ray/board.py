"""An actor that passes stages to the workers of a Ray cluster, and events back."""

from __future__ import annotations

import asyncio
from typing import Any


class Board:
    """An actor that holds the stages of a run in order, and the events that have not been read yet.

    Ray's queue serves one reader, but every worker reads every stage. Stages are pickled, so that the actor's process
    can pass them on without importing torch.
    """

    def __init__(self) -> None:
        self._stages: list[bytes | None] = []
        self._posted = asyncio.Condition()
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def post(self, stage: bytes | None) -> None:
        """Add a stage; None ends the workers."""
        async with self._posted:
            self._stages.append(stage)
            self._posted.notify_all()

    async def stage(self, number: int) -> bytes | None:
        """Return the stage of this number; wait until it is added."""
        async with self._posted:
            await self._posted.wait_for(lambda: len(self._stages) > number)
        return self._stages[number]

    async def tell(self, event: dict[str, Any]) -> None:
        """Add an event."""
        self._events.put_nowait(event)

    async def events(self, timeout: float) -> list[dict[str, Any]]:
        """Return all unread events; if there are none, wait at most ``timeout`` seconds for one."""
        try:
            found = [await asyncio.wait_for(self._events.get(), timeout)]
        except TimeoutError:
            return []
        while not self._events.empty():
            found.append(self._events.get_nowait())
        return found
