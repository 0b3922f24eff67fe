"""Several servers of one teacher as one: the least busy answers, and who is away is waited for."""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from logitcask.engine.backends.returned import Answer
from logitcask.engine.backends.server.budget import Budget, Limits
from logitcask.engine.backends.server.client import ServerClient, Transient
from logitcask.engine.backends.server.protocol import RequestBody
from logitcask.engine.errors import AnswerError, ServerError
from logitcask.engine.events import CancelToken

T = TypeVar("T")

WRONG_ANSWERS = 2
"""An answer that cannot be right is asked for once more, of another server if there is one."""
READERS = 2
"""Answers that are parsed at once: it holds Python's lock, and takes some ten times the bytes."""


class ServerPool:
    """Asks questions of links, again where that may help, within the budget."""

    def __init__(
        self,
        links: Sequence[ServerClient],
        limits: Limits,
        back: Callable[[ServerClient], Awaitable[None]],
        cancel: CancelToken,
        *,
        rng: random.Random | None = None,
    ) -> None:
        """back: called with a link that was lost and answers again, before it is used; it raises
        where another teacher came back. waits: told while no server answers."""
        self.links, self.limits, self._back, self._cancel = list(links), limits, back, cancel
        self.budget = Budget(limits)
        self.answered: set[str] = set()
        """URLs of servers of which an answer was taken, until the owner empties it."""
        self._rng = rng or random.Random()
        self._why = ""
        """What was wrong with one that is away, at the last look."""
        self._returning = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None
        """The look at those that are away, while others answer."""
        self._reading = asyncio.Semaphore(READERS)

    async def ask(
        self, question: RequestBody, path: str, served: str, *, check: Callable[[Answer], None]
    ) -> ServerClient:
        """Gives an answer to `check`, which keeps it, or raises AnswerError for one that no model
        can have given: then it is asked for again. Called from another thread. Answers whose it
        was; raises ServerError for a refusal or servers that stay away.
        """
        tokens, size = len(question.ids), question.expected_bytes()
        wrong = faults = pauses = 0
        avoid: ServerClient | None = None
        busy_s: float | None = None
        while True:
            async with self.budget.take(tokens, size):
                link = await self._pick(avoid)
                avoid, asked_s = link, time.monotonic()
                link.in_flight += 1  # from here on: the next one picks before this one posts
                try:
                    # Made only now: a unit's questions together would be larger than any cap.
                    body = await asyncio.to_thread(_encoded, question, path, served)
                    data = await link.post(
                        path, body, most=question.most_bytes(), expected=size, tokens=tokens
                    )
                    names = link.names | {served}
                    async with self._reading:
                        await asyncio.to_thread(_read, question, path, names, data, check)
                except Transient as fault:
                    last = fault
                    await self.note(link, fault, asked_s)
                except AnswerError as error:
                    wrong += 1
                    if wrong == WRONG_ANSWERS:
                        raise AnswerError(link.hidden(error.cause), hint=error.hint) from None
                    continue
                else:
                    self.budget.faster()
                    return link
                finally:
                    link.in_flight -= 1
            faults += not last.busy
            busy_s = None if not last.busy else asked_s if busy_s is None else busy_s
            if faults >= self.limits.attempts:
                failed = f"{faults} attempts at one sequence failed"
                break
            if busy_s is not None and time.monotonic() - busy_s > self.limits.wait_s:
                failed = f"no server took a sequence for {self.limits.wait_s:.0f} s"
                break
            await asyncio.sleep(self._pause(pauses, last.after_s))
            pauses += 1
        raise ServerError(
            f"{failed}, the last with: {last}",
            hint="Nothing of the unit in hand was stored. Look at the server's log, and run the "
            "same command again.",
        )

    async def tell(self, ask: Callable[[ServerClient], Awaitable[T]]) -> T:
        """What any server says, asked again where that may help. Raises the last Transient, and
        ServerError for servers that stay away."""
        attempts = 0
        while True:
            link, asked_s = await self._pick(None), time.monotonic()
            try:
                return await ask(link)
            except Transient as fault:
                attempts += 1
                await self.note(link, fault, asked_s)
                if attempts >= self.limits.attempts:
                    raise
                after_s = fault.after_s
            await asyncio.sleep(self._pause(attempts - 1, after_s))

    async def note(self, link: ServerClient, fault: Transient, asked_s: float) -> None:
        """What a fault says of its server: that it is away, or is asked too much."""
        if fault.lost:
            link.up = False
        elif link.up and (fault.ill or fault.late):
            await self.check(link)
        # What one that is away did not answer says nothing of the others.
        if link.up and (fault.busy or fault.late):
            self.budget.slower(asked_s)

    async def check(self, link: ServerClient) -> None:
        """Whether one that is up still is. Never the other way: it may have been lost meanwhile,
        and who answers now has to be looked at first."""
        if link.up and not await link.healthy():
            link.up = False

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        for link in self.links:
            await link.close()

    def _pause(self, count: int, asked_s: float) -> float:
        """Full jitter, and what the server asks for."""
        # From some count on the power says nothing more.
        most = min(self.limits.most_backoff_s, self.limits.backoff_s * 2.0 ** min(count, 30))
        return max(min(asked_s, self.limits.most_backoff_s), self._rng.uniform(0, most))

    async def _pick(self, avoid: ServerClient | None) -> ServerClient:
        """The least busy link that is up, another than `avoid` if there is one."""
        self._look_again()
        if not (up := self._up()):
            async with self._returning:
                await self._await_any()
            up = self._up()
        others = [link for link in up if link is not avoid] or up
        return min(others, key=lambda link: link.in_flight)

    def _up(self) -> list[ServerClient]:
        return [link for link in self.links if link.up]

    def _look_again(self) -> None:
        """Those that are away are looked at beside the work of the others, which need not wait for
        one that hangs. Raises what the last look found: another teacher."""
        if self._looking is not None and self._looking.done():
            looking, self._looking = self._looking, None
            looking.result()
        since_s = time.monotonic() - self.limits.poll_s
        away = [link for link in self.links if not link.up and link.looked_s <= since_s]
        if away and len(away) < len(self.links) and self._looking is None:
            self._looking = asyncio.create_task(self._look(away))

    async def _look(self, away: Sequence[ServerClient]) -> None:
        """At all of them at once; the first that raises is heard."""
        found = await asyncio.gather(*map(self._look_at, away), return_exceptions=True)
        for fault in found:
            if fault is not None:
                raise fault

    async def _look_at(self, link: ServerClient) -> None:
        try:
            await self._back(link)
        except Transient as fault:
            link.up, self._why = False, f"{link.url}: {fault}"
        else:
            link.up = True
        link.looked_s = time.monotonic()

    async def _await_any(self) -> None:
        """Until a server answers. Raises ServerError after wait_s."""
        if self._up():
            return
        begun_s = time.monotonic()
        urls = [link.url for link in self.links]
        with self._cancel.waiting():
            await self._look(self.links)
            if not self._up():
                self._cancel.report(urls)
            while not self._up():
                if time.monotonic() - begun_s > self.limits.wait_s:
                    raise ServerError(
                        f"{', '.join(urls)}: no server has answered for "
                        f"{self.limits.wait_s:.0f} s; the last look: {self._why}",
                        hint="Start it again, and run the same command to resume. "
                        "--server-wait sets how long it is waited for.",
                    )
                await asyncio.sleep(self.limits.poll_s)
                await self._look(self.links)


def _encoded(question: RequestBody, path: str, served: str) -> bytes:
    return json.dumps(question.body(path, served)).encode()


def _read(
    question: RequestBody, path: str, names: set[str], data: bytes, check: Callable[[Answer], None]
) -> None:
    check(question.read(path, names, data))
