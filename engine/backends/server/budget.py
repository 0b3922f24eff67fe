"""What may be in flight at once: requests, tokens, and bytes of answers."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much is asked of servers at once, and how long they are waited for."""

    requests: int = 64
    """In flight, to all servers; fewer while they say that they are busy."""
    tokens: int = 1 << 17
    """In flight, of prompts and responses together."""
    bytes: int = 256 << 20
    """In flight, of answers as they are expected."""
    attempts: int = 6
    """At one sequence; that a server takes no more now is no attempt."""
    connect_s: float = 10.0
    health_s: float = 5.0
    """Whoever does not say within this that it is well is away."""
    read_s: float = 60.0
    """Until an answer has come, and more for a large one: ..."""
    bytes_per_s: float = 5e6
    tokens_per_s: float = 1000.0
    """... so much slower than this no server is, counting those before it in the queue."""
    backoff_s: float = 0.5
    """Pause after a first fault, at most; it doubles with each, ..."""
    most_backoff_s: float = 30.0
    """... up to this."""
    wait_s: float = 600.0
    """All servers may be away, or take no more, for so long."""
    alone_s: float = 10.0
    """One of several may be away for so long when it is asked alone."""
    poll_s: float = 1.0
    """Between two looks at whether a server is back."""


class Budget:
    """Additive increase, multiplicative decrease of the requests; fixed caps on tokens and bytes.

    What is larger than a cap by itself goes alone.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._window = float(limits.requests)
        self.requests = self.tokens = self.bytes = 0
        """In flight now."""
        self.most_requests = self.most_bytes = 0
        """In flight at the highest."""
        self._slowed_s = -1.0
        """When the window was last halved, monotonic."""
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def take(self, tokens: int, size: int) -> AsyncIterator[None]:
        """Waits until this fits in."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._fits(tokens, size))
            self._add(1, tokens, size)
        try:
            yield
        finally:
            # Before anything is awaited: a cancelled request must give back what it took.
            self._add(-1, -tokens, -size)
            async with self._changed:
                self._changed.notify_all()

    def faster(self) -> None:
        self._window = min(self._limits.requests, self._window + 1 / self._window)

    def slower(self, asked_s: float) -> None:
        """asked_s: when what was refused had been asked, monotonic. What was under way when the
        window was halved says nothing of the new one."""
        if asked_s > self._slowed_s:
            self._window = max(1.0, self._window / 2)
            self._slowed_s = time.monotonic()

    @property
    def window(self) -> float:
        return self._window

    def _fits(self, tokens: int, size: int) -> bool:
        return not self.requests or (
            self.requests + 1 <= self._window
            and self.tokens + tokens <= self._limits.tokens
            and self.bytes + size <= self._limits.bytes
        )

    def _add(self, requests: int, tokens: int, size: int) -> None:
        self.requests += requests
        self.tokens += tokens
        self.bytes += size
        self.most_requests = max(self.most_requests, self.requests)
        self.most_bytes = max(self.most_bytes, self.bytes)
