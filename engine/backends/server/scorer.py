"""A teacher behind servers as a Scorer: all of them together, and each alone."""

import asyncio
import os
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from logitcask.engine.backends.returned import ResponseAssembler
from logitcask.engine.backends.server.budget import Limits
from logitcask.engine.backends.server.capabilities import (
    ServerFacts,
    check_card,
    check_same,
    facts_of,
    hosts,
    tokens_of,
)
from logitcask.engine.backends.server.client import ServerClient, Transient
from logitcask.engine.backends.server.pool import ServerPool
from logitcask.engine.backends.server.requests import fill, sheet_of
from logitcask.engine.errors import AnswerError, ConfigError, ServerError
from logitcask.engine.events import Cancelled, CancelToken
from logitcask.engine.types import IdLists, Rollouts, ScoreParams, Scores

KEY = "LOGITCASK_API_KEY"
STOP_S = 0.2
"""Between two looks at whether who waits was told to stop."""
T = TypeVar("T")


def read_key(file: Path | None = None) -> str | None:
    """The API key: the file's first line, else the environment's LOGITCASK_API_KEY, else none."""
    if file is None:
        return os.environ.get(KEY, "").strip() or None
    try:
        lines = file.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the API key's file {file} cannot be read: {type(error).__name__}",
            hint="Give a file that holds the key alone.",
        ) from error
    if len(lines) != 1:
        raise ConfigError(
            f"the API key's file {file} holds {len(lines)} words",
            hint="Give a file that holds the key alone.",
        )
    return lines[0]


class Server:
    """Scorer over vLLM servers of one teacher. `close` it, or use it as a context.

    Scores are of the best ids that the servers tell: entropy is an interval, and the tail is one
    less their mass (`backends.answers`).
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        served: str = "",
        key: str | None = None,
        limits: Limits | None = None,
        cancel: CancelToken | None = None,
    ) -> None:
        """served: the servers' name for the teacher; empty for the only one that they serve; waits:
        told while none of them answers.

        Raises ServerError where one cannot be reached within limits.wait_s or refuses, and
        IdentityError where they do not serve one and the same teacher.
        """
        limits = limits or Limits()
        # URLs are checked before there is a thread that would have to end; one twice is one server.
        links = {link.url: link for link in (ServerClient(url, key, limits) for url in urls)}
        if not links:
            raise ConfigError("a teacher without servers", hint="Give a URL.")
        self._cancel = cancel or CancelToken()
        self._fleet = ServerPool([*links.values()], limits, self._back, self._cancel)
        alone = limits if len(links) == 1 else replace(limits, wait_s=limits.alone_s)
        self._members = {
            url: Replica(
                self, ServerPool([ServerClient(url, key, alone)], alone, self._back, self._cancel)
            )
            for url in links
        }
        self._limits = limits
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.n_vocab = 0
        """Ids that both tokenizers know: set before anything is scored."""
        try:
            self.facts: ServerFacts = self._run(self._begin(served))
        except BaseException:
            self.close()
            raise
        self.capabilities = frozenset(
            {"top", "entropy", "tail", "bounds", *(["at_ids"] if self.facts.at_ids else [])}
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Connections and the thread that keeps them; twice does no harm."""
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def describe(self) -> dict[str, str]:
        return self._described(self._fleet)

    @property
    def received(self) -> int:
        """Bytes of all answers so far."""
        return sum(link.received for link in self._fleet.links)

    @property
    def most_in_flight(self) -> tuple[int, int]:
        """(requests, bytes expected), the most that there were at once."""
        return self._fleet.budget.most_requests, self._fleet.budget.most_bytes

    @property
    def window(self) -> float:
        """Requests that may be in flight now: fewer after servers said that they are busy."""
        return self._fleet.budget.window

    def tokenize(self, text: str) -> list[int] | None:
        """A text's ids without special tokens around them; None where the server does not tell."""
        try:
            return self._run(
                self._fleet.tell(lambda link: tokens_of(link, text, self.facts.served))
            )
        except Transient as fault:
            # A server that is well and cannot is one that does not.
            if not (fault.lost or fault.late or len(self.away()) == len(self._members)):
                return None
            raise ServerError(
                f"a server does not answer when it is to tokenize: {fault}",
                hint="Look at the server's log, and run the same command again.",
            ) from fault

    def score(self, rollouts: Rollouts, request: ScoreParams, at: IdLists | None = None) -> Scores:
        """Raises as `asked_ids`, ConfigError where more is asked than the servers can answer,
        ServerError and AnswerError as `ServerPool.ask`.
        """
        return self._scored(self._fleet, rollouts, request, at)

    def members(self) -> dict[str, "Replica"]:
        """URL -> a Scorer that asks that server alone, whoever else is away. `answered` does not
        count it, and what it finds changes nothing for the others."""
        return dict(self._members)

    def away(self) -> set[str]:
        """URLs of the servers that did not answer when they were last asked."""
        return {link.url for link in self._fleet.links if not link.up}

    def answered(self) -> set[str]:
        """URLs of the servers of which an answer was taken since this was last asked."""
        return self._run(self._taken())

    def _scored(
        self, fleet: ServerPool, rollouts: Rollouts, request: ScoreParams, at: IdLists | None
    ) -> Scores:
        url = fleet.links[0].url
        sheet = sheet_of(self.facts, url, self.n_vocab, rollouts, request, at)
        self._run(self._fill(fleet, rollouts, sheet))
        return sheet.scores()

    def _described(self, fleet: ServerPool) -> dict[str, str]:
        return {
            "name": "server",
            "dtype": "unknown",
            "engine": f"vllm {self.facts.version}" if self.facts.version else "unknown",
            "fingerprint": self.facts.fingerprint,
            "path": self.facts.path,
            "hosts": hosts([link.url for link in fleet.links]),
        }

    # The loop's thread.

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while not wait([future], STOP_S).done:
                if self._cancel.cancelled:
                    raise Cancelled("the servers are away")
            return future.result()
        except BaseExceptionGroup as group:
            raise first_of(group) from None
        except (Cancelled, KeyboardInterrupt, SystemExit):
            # Cancelled requests close their sockets, and the server drops what nobody waits for.
            future.cancel()
            raise

    async def _begin(self, served: str) -> ServerFacts:
        """Of the first that answers within wait_s; who does not is away, and may come later."""
        begun_s, links = self._loop.time(), self._fleet.links
        with self._cancel.waiting():
            found = await self._facts(links, served)
            if not (known := [each for each in found if isinstance(each, ServerFacts)]):
                self._cancel.report([link.url for link in links])
            while not known:
                if self._loop.time() - begun_s >= self._limits.wait_s:
                    raise ServerError(
                        f"{links[0].url} does not answer: {found[0]}",
                        hint="Check the URL and that the server is up; --server-wait sets how "
                        "long it is waited for.",
                    )
                await asyncio.sleep(self._limits.poll_s)
                found = await self._facts(links, served)
                known = [each for each in found if isinstance(each, ServerFacts)]
        for link, each in zip(links, found, strict=True):
            link.up = isinstance(each, ServerFacts)
            if isinstance(each, ServerFacts):
                check_same(known[0], each, link.url)
        return known[0]

    async def _facts(
        self, links: Sequence[ServerClient], served: str
    ) -> list[ServerFacts | Transient]:
        """Of all at once, or why one does not answer. Raises the first refusal."""

        async def one(link: ServerClient) -> ServerFacts | Transient:
            try:
                return await self._look(link, served)
            except Transient as fault:
                return fault

        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(one(link)) for link in links]
        return [each.result() for each in asked]

    @staticmethod
    async def _look(link: ServerClient, served: str) -> ServerFacts:
        try:
            return await facts_of(link, served)
        except AnswerError as error:
            said = link.hidden(error.cause)
            raise ServerError(f"{link.url}: {said}", hint=error.hint) from None

    async def _fill(self, fleet: ServerPool, rollouts: Rollouts, sheet: ResponseAssembler) -> None:
        await self._recheck(fleet)
        await fill(fleet, self.facts, rollouts, sheet)

    async def _taken(self) -> set[str]:
        taken, self._fleet.answered = self._fleet.answered, set()
        return taken

    async def _recheck(self, fleet: ServerPool) -> None:
        """A server that was started anew between two units lost no request."""

        async def one(link: ServerClient) -> None:
            asked_s = self._loop.time()
            try:
                await check_card(link, self.facts)
            except Transient as fault:
                await fleet.note(link, fault, asked_s)

        async with asyncio.TaskGroup() as group:
            for link in fleet.links:
                if link.up:  # who is away is looked at before it is used
                    group.create_task(one(link))

    async def _back(self, link: ServerClient) -> None:
        check_same(self.facts, await self._look(link, self.facts.served), link.url)

    async def _end(self) -> None:
        for fleet in (self._fleet, *(member.fleet for member in self._members.values())):
            await fleet.close()
        # Connections say goodbye in the loop's next turn.
        await asyncio.sleep(0)


class Replica:
    """One of a Server's servers as a Scorer: over a connection of its own."""

    def __init__(self, server: Server, fleet: ServerPool) -> None:
        self._server, self.fleet = server, fleet

    @property
    def capabilities(self) -> frozenset[str]:
        return self._server.capabilities

    def score(self, rollouts: Rollouts, request: ScoreParams, at: IdLists | None = None) -> Scores:
        """Raises as `Server.score`. One of several is waited for limits.alone_s and no longer."""
        return self._server._scored(self.fleet, rollouts, request, at)

    def describe(self) -> dict[str, str]:
        return self._server._described(self.fleet)


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first of several faults at once; that the others were cancelled says nothing."""
    first = group.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first
