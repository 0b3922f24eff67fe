"""Limits of what is in flight at once: requests, tokens, and bytes of answers."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of the load on servers, and of waiting for them."""

    requests: int = 64
    """In flight, to all servers; fewer while they answer that they are busy."""
    tokens: int = 1 << 17
    """In flight, of prompts and responses together."""
    bytes: int = 256 << 20
    """In flight, expected bytes of answers."""
    attempts: int = 6
    """Per sequence; an answer that the server is busy does not count."""
    connect_s: float = 10.0
    health_s: float = 5.0
    """Timeout of /health; after it a server counts as unavailable."""
    read_s: float = 60.0
    """Timeout of an answer, plus the time that its size needs at these rates:"""
    bytes_per_s: float = 5e6
    tokens_per_s: float = 1000.0
    """Lower bound of a server's speed, with its queue."""
    backoff_s: float = 0.5
    """Maximum pause after a first fault; it doubles with each fault, ..."""
    most_backoff_s: float = 30.0
    """... up to this."""
    wait_s: float = 600.0
    """Maximum time with all servers unavailable or busy."""
    alone_s: float = 10.0
    """Maximum time that a single one of several servers is waited for."""
    poll_s: float = 1.0
    """Interval between two health checks of an unavailable server."""


class Budget:
    """Additive increase, multiplicative decrease of the requests; fixed caps on tokens and bytes.

    A request that is larger than a cap is sent alone.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._window = float(limits.requests)
        self.requests = self.tokens = self.bytes = 0
        """In flight now."""
        self.most_requests = self.most_bytes = 0
        """Maxima so far."""
        self._slowed_s = -1.0
        """Monotonic time of the last halving of the window."""
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def reserve(self, tokens: int, size: int) -> AsyncIterator[None]:
        """Wait until this fits, and count it as in flight for the async with block."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._fits(tokens, size))
            self._add(1, tokens, size)
        try:
            yield
        finally:
            # Before the first await: a cancelled request must release its share.
            self._add(-1, -tokens, -size)
            async with self._changed:
                self._changed.notify_all()

    def increase(self) -> None:
        """Widen the window by 1 / window, after a success."""
        self._window = min(self._limits.requests, self._window + 1 / self._window)

    def decrease(self, sent_s: float) -> None:
        """Halve the window, unless the request was sent (monotonic) before the last halving."""
        if sent_s > self._slowed_s:
            self._window = max(1.0, self._window / 2)
            self._slowed_s = time.monotonic()

    @property
    def window(self) -> float:
        """Return the number of requests that may be in flight now."""
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
