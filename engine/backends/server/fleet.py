"""Several servers of one teacher as one: the least busy answers, and who is away is waited for."""

import asyncio
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
        self._rng = rng or random.Random()
        self._returning = asyncio.Lock()

    @property
    def losses(self) -> int:
        return sum(link.losses for link in self.links)

    async def ask(
        self, question: Question, path: str, served: str, *, check: Callable[[Answer], None]
    ) -> None:
        """Gives an answer to `check`, which keeps it, or raises AnswerError for one that no model
        can have given: then it is asked for again. Raises ServerError for a refusal or servers that
        stay away.
        """
        body = question.body(path, served)
        tokens, size = len(question.ids), question.expected_bytes()
        wrong, avoid = 0, None
        for attempt in range(self.limits.attempts):
            async with self.budget.take(tokens, size):
                link = await self._pick(avoid)
                try:
                    data = await link.post(
                        path, body, most=question.most_bytes(), expected=size, tokens=tokens
                    )
                    check(await asyncio.to_thread(question.read, path, served, data))
                except Transient as fault:
                    last, avoid = fault, link
                    if fault.lost:
                        link.up = False
                    if fault.busy:
                        self.budget.slower()
                except AnswerError:
                    wrong, avoid = wrong + 1, link
                    if wrong == WRONG_ANSWERS:
                        raise
                    continue
                else:
                    self.budget.faster()
                    return
            await asyncio.sleep(self._pause(attempt, last.after_s))
        raise ServerError(
            f"{self.limits.attempts} attempts at one sequence failed, the last with: {last}",
            remedy="Nothing of the unit in hand was stored. Look at the server's log, and run the "
            "same command again.",
        )

    def _pause(self, attempt: int, asked_s: float) -> float:
        """Full jitter, and what the server asks for."""
        most = min(self.limits.most_backoff_s, self.limits.backoff_s * 2**attempt)
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
