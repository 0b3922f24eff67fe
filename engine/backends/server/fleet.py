"""Several servers of one teacher as one: the least busy answers, and who is away is waited for."""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence

from logitcask.engine.backends.answers import Answer
from logitcask.engine.backends.server.budget import Budget, Limits
from logitcask.engine.backends.server.link import Link, Transient
from logitcask.engine.backends.server.wire import Question
from logitcask.engine.errors import AnswerError, ServerError

WRONG_ANSWERS = 2
"""An answer that cannot be right is asked for once more, of another server if there is one."""
READERS = 2
"""Answers that are parsed at once: it holds Python's lock, and takes some ten times the bytes."""


class Fleet:
    """Asks questions of links, again where that may help, within the budget."""

    def __init__(
        self,
        links: Sequence[Link],
        limits: Limits,
        back: Callable[[Link], Awaitable[None]],
        *,
        rng: random.Random | None = None,
    ) -> None:
        """back: called with a link that was lost and answers again, before it is used; it raises
        where another teacher came back."""
        self.links, self.limits, self._back = list(links), limits, back
        self.budget = Budget(limits)
        self.answered: set[str] = set()
        """URLs of servers of which an answer was taken, until the owner empties it."""
        self._rng = rng or random.Random()
        self._returning = asyncio.Lock()
        self._reading = asyncio.Semaphore(READERS)

    async def ask(
        self, question: Question, path: str, served: str, *, check: Callable[[Answer], None]
    ) -> None:
        """Gives an answer to `check`, which keeps it, or raises AnswerError for one that no model
        can have given: then it is asked for again. Called from another thread. Raises ServerError
        for a refusal or servers that stay away.
        """
        tokens, size = len(question.ids), question.expected_bytes()
        wrong = faults = pauses = 0
        avoid: Link | None = None
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
                    await self._note(link, fault, asked_s)
                except AnswerError as error:
                    wrong += 1
                    if wrong == WRONG_ANSWERS:
                        raise AnswerError(link.hidden(error.cause), remedy=error.remedy) from None
                    continue
                else:
                    self.budget.faster()
                    self.answered.add(link.url)
                    return
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
            remedy="Nothing of the unit in hand was stored. Look at the server's log, and run the "
            "same command again.",
        )

    async def _note(self, link: Link, fault: Transient, asked_s: float) -> None:
        """What a fault says of its server: that it is away, or is asked too much."""
        if fault.busy or fault.late:
            self.budget.slower(asked_s)
        if fault.lost or (fault.ill and not await link.healthy()):
            link.up = False

    def _pause(self, count: int, asked_s: float) -> float:
        """Full jitter, and what the server asks for."""
        # From some count on the power says nothing more.
        most = min(self.limits.most_backoff_s, self.limits.backoff_s * 2.0 ** min(count, 30))
        return max(min(asked_s, self.limits.most_backoff_s), self._rng.uniform(0, most))

    async def _pick(self, avoid: Link | None) -> Link:
        """The least busy link that is up, another than `avoid` if there is one."""
        up = [link for link in self.links if link.up]
        if not up:
            async with self._returning:
                await self._await_any()
            up = [link for link in self.links if link.up]
        else:
            await self._look_again()
        others = [link for link in up if link is not avoid] or up
        return min(others, key=lambda link: link.in_flight)

    async def _look_again(self) -> None:
        """One that is away is looked at by one request at a time, and the others need not wait."""
        now = time.monotonic()
        away = [k for k in self.links if not k.up and now - k.looked_s >= self.limits.poll_s]
        if self._returning.locked() or not away:
            return
        async with self._returning:
            for link in away:
                await self._look(link)

    async def _look(self, link: Link) -> None:
        link.looked_s = time.monotonic()
        if not await link.healthy():
            return
        try:
            await self._back(link)
        except Transient:
            return
        link.up = True

    async def _await_any(self) -> None:
        """Until a server answers. Raises ServerError after wait_s."""
        begun = time.monotonic()
        while not any(link.up for link in self.links):
            for link in self.links:
                await self._look(link)
            if any(link.up for link in self.links):
                return
            if time.monotonic() - begun > self.limits.wait_s:
                raise ServerError(
                    f"{', '.join(link.url for link in self.links)}: no server has answered for "
                    f"{self.limits.wait_s:.0f} s",
                    remedy="Start it again, and run the same command: it goes on where it was. "
                    "--server-wait sets how long it is waited for.",
                )
            await asyncio.sleep(self.limits.poll_s)


def _encoded(question: Question, path: str, served: str) -> bytes:
    return json.dumps(question.body(path, served)).encode()


def _read(
    question: Question, path: str, names: set[str], data: bytes, check: Callable[[Answer], None]
) -> None:
    check(question.read(path, names, data))
