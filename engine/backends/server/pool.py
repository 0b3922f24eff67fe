"""Several servers of one teacher: the least busy server answers, unavailable ones are awaited."""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from logitcask.engine.backends.returned import ReturnedTopK
from logitcask.engine.backends.server.budget import Budget, Limits
from logitcask.engine.backends.server.client import ServerClient, Transient
from logitcask.engine.backends.server.protocol import RequestBody
from logitcask.engine.errors import AnswerError, ServerError
from logitcask.engine.events import CancelToken

T = TypeVar("T")

WRONG_ANSWERS = 2
"""A wrong answer is requested once more, from another server if there is one."""
READERS = 2
"""Answers parsed at once: parsing holds the GIL and takes about ten times the answer's memory."""


class ServerPool:
    """Sends requests to clients within the budget, with retries."""

    def __init__(
        self,
        clients: Sequence[ServerClient],
        limits: Limits,
        check_returned: Callable[[ServerClient], Awaitable[None]],
        cancel: CancelToken,
        *,
        rng: random.Random | None = None,
    ) -> None:
        """check_returned: called with a server that was unavailable, before it is used again; it
        raises for another teacher. cancel: gets a report while no server is available.
        """
        self.clients, self.limits = list(clients), limits
        self._check_returned, self._cancel = check_returned, cancel
        self.budget = Budget(limits)
        self.answered: set[str] = set()
        """URLs of servers that gave scores, until the owner clears it."""
        self._rng = rng or random.Random()
        self._last_fault = ""
        """Fault of an unavailable server at its last check."""
        self._returning = asyncio.Lock()
        self._checking: asyncio.Task[None] | None = None
        """The check of unavailable servers in the background."""
        self._reading = asyncio.Semaphore(READERS)

    async def send(
        self, body: RequestBody, path: str, served: str, *, check: Callable[[ReturnedTopK], None]
    ) -> ServerClient:
        """Send a request, pass the answer to `check`, and return the client that answered.

        `check` runs in another thread; it stores the answer, or raises AnswerError for a wrong
        one, which is requested again. Raises ServerError for a rejected request or servers that
        stay unavailable.
        """
        tokens, size = len(body.ids), body.expected_bytes(path)
        wrong = faults = pauses = 0
        avoid: ServerClient | None = None
        busy_s: float | None = None
        while True:
            async with self.budget.reserve(tokens, size):
                client = await self._pick(avoid)
                avoid, sent_s = client, time.monotonic()
                client.in_flight += 1  # before the first await, so that the next _pick counts it
                try:
                    # Encoded only now: all bodies of a unit together could exceed every cap.
                    data = await asyncio.to_thread(_encode, body, path, served)
                    data = await client.post(
                        path, data, most=body.most_bytes(path), expected=size, tokens=tokens
                    )
                    names = client.names | {served}
                    async with self._reading:
                        await asyncio.to_thread(_read, body, path, names, data, check)
                except Transient as fault:
                    last = fault
                    await self.record_fault(client, fault, sent_s)
                except AnswerError as error:
                    wrong += 1
                    if wrong == WRONG_ANSWERS:
                        raise AnswerError(client.one_line(error.cause), hint=error.hint) from None
                    continue
                else:
                    self.budget.increase()
                    return client
                finally:
                    client.in_flight -= 1
            faults += not last.busy
            busy_s = None if not last.busy else sent_s if busy_s is None else busy_s
            if faults >= self.limits.attempts:
                failed = f"{faults} attempts at one sequence failed"
                break
            if busy_s is not None and time.monotonic() - busy_s > self.limits.wait_s:
                failed = f"no server accepted a sequence for {self.limits.wait_s:.0f} s"
                break
            await asyncio.sleep(self._pause(pauses, last.after_s))
            pauses += 1
        raise ServerError(
            f"{failed}, the last with: {last}",
            hint="look at the server's log, and run the same command again; nothing of the "
            "current unit was stored",
        )

    async def call_any(self, call: Callable[[ServerClient], Awaitable[T]]) -> T:
        """Return the result of a call to any server, with retries.

        Raises the last Transient, and ServerError for servers that stay unavailable.
        """
        attempts = 0
        while True:
            client, sent_s = await self._pick(None), time.monotonic()
            try:
                return await call(client)
            except Transient as fault:
                attempts += 1
                await self.record_fault(client, fault, sent_s)
                if attempts >= self.limits.attempts:
                    raise
                after_s = fault.after_s
            await asyncio.sleep(self._pause(attempts - 1, after_s))

    async def record_fault(self, client: ServerClient, fault: Transient, sent_s: float) -> None:
        """Mark the server unavailable, or narrow the window of requests, as the fault requires."""
        if fault.lost:
            client.healthy = False
        elif client.healthy and (fault.unhealthy or fault.late):
            await self.recheck(client)
        # A timeout of an unavailable server does not narrow the window of the others.
        if client.healthy and (fault.busy or fault.late):
            self.budget.decrease(sent_s)

    async def recheck(self, client: ServerClient) -> None:
        """Mark a healthy server unavailable if its health check fails.

        Never the reverse: it may have been lost meanwhile, and then its identity must be checked.
        """
        if client.healthy and not await client.is_healthy():
            client.healthy = False

    async def close(self) -> None:
        """Close all clients."""
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)
        for client in self.clients:
            await client.close()

    def _pause(self, count: int, after_s: float) -> float:
        """Return a pause with full jitter, at least the server's Retry-After."""
        # The exponent is capped so that the power does not overflow.
        most = min(self.limits.most_backoff_s, self.limits.backoff_s * 2.0 ** min(count, 30))
        return max(min(after_s, self.limits.most_backoff_s), self._rng.uniform(0, most))

    async def _pick(self, avoid: ServerClient | None) -> ServerClient:
        """Return the least busy healthy client, another than `avoid` if there is one."""
        self._check_in_background()
        if not (healthy := self._healthy()):
            async with self._returning:
                await self._await_any()
            healthy = self._healthy()
        others = [client for client in healthy if client is not avoid] or healthy
        return min(others, key=lambda client: client.in_flight)

    def _healthy(self) -> list[ServerClient]:
        return [client for client in self.clients if client.healthy]

    def _check_in_background(self) -> None:
        """Start a check of unavailable servers while others work.

        Raises the error of the last check: another teacher.
        """
        if self._checking is not None and self._checking.done():
            checking, self._checking = self._checking, None
            checking.result()
        since_s = time.monotonic() - self.limits.poll_s
        due = [each for each in self.clients if not each.healthy and each.checked_s <= since_s]
        if due and len(due) < len(self.clients) and self._checking is None:
            self._checking = asyncio.create_task(self._check_all(due))

    async def _check_all(self, clients: Sequence[ServerClient]) -> None:
        """Check clients concurrently, and raise the first error."""
        found = await asyncio.gather(*map(self._check_one, clients), return_exceptions=True)
        for error in found:
            if error is not None:
                raise error

    async def _check_one(self, client: ServerClient) -> None:
        try:
            await self._check_returned(client)
        except Transient as fault:
            client.healthy, self._last_fault = False, f"{client.url}: {fault}"
        else:
            client.healthy = True
        client.checked_s = time.monotonic()

    async def _await_any(self) -> None:
        """Wait for any server; ServerError after wait_s."""
        if self._healthy():
            return
        begun_s = time.monotonic()
        urls = [client.url for client in self.clients]
        with self._cancel.waiting():
            await self._check_all(self.clients)
            if not self._healthy():
                self._cancel.report(urls)
            while not self._healthy():
                if time.monotonic() - begun_s > self.limits.wait_s:
                    raise ServerError(
                        f"{', '.join(urls)}: no server has answered for "
                        f"{self.limits.wait_s:.0f} s; the last check: {self._last_fault}",
                        hint="start it again, and run the same command to resume; --server-wait "
                        "sets the maximum waiting time",
                    )
                await asyncio.sleep(self.limits.poll_s)
                await self._check_all(self.clients)


def _encode(body: RequestBody, path: str, served: str) -> bytes:
    return json.dumps(body.to_json(path, served)).encode()


def _read(
    body: RequestBody,
    path: str,
    names: set[str],
    data: bytes,
    check: Callable[[ReturnedTopK], None],
) -> None:
    check(body.read(path, names, data))
