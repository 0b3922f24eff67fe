"""The scorer of a remote teacher: over all its servers, and over each one alone."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from logitcask.engine.backends.returned import ResponseAssembler
from logitcask.engine.backends.server.budget import Limits
from logitcask.engine.backends.server.capabilities import (
    Engine,
    ServerInfo,
    check_card,
    check_same,
    fetch_info,
    hosts,
    tokenize,
)
from logitcask.engine.backends.server.client import ServerClient, Transient
from logitcask.engine.backends.server.pool import ServerPool
from logitcask.engine.backends.server.requests import new_assembler, score_sequences
from logitcask.engine.errors import AnswerError, ConfigError, ServerError
from logitcask.engine.events import Cancelled, CancelToken
from logitcask.engine.types import IdLists, Progress, Rollouts, ScoreParams, Scores, no_progress

KEY = "LOGITCASK_API_KEY"
STOP_S = 0.2
"""Interval between two checks of the cancel token."""
T = TypeVar("T")


def read_key(file: Path | None = None) -> str | None:
    """Return the API key of the file, else of LOGITCASK_API_KEY, else None."""
    if file is None:
        return os.environ.get(KEY, "").strip() or None
    try:
        lines = file.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the API key's file {file} cannot be read: {type(error).__name__}",
            hint="give a file with the key only",
        ) from error
    if len(lines) != 1:
        raise ConfigError(
            f"the API key's file {file} holds {len(lines)} words",
            hint="give a file with the key only",
        )
    return lines[0]


class ServerScorer:
    """Scorer over servers of one teacher. Call `close`, or use it in a with statement.

    Scores are of returned top-k log-probs: entropy is an interval, and the tail is 1 - their mass
    (`backends.returned`).
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        served: str = "",
        engine: Engine = "auto",
        key: str | None = None,
        limits: Limits | None = None,
        cancel: CancelToken | None = None,
    ) -> None:
        """Connect to the servers.

        served: the servers' name of the teacher; empty for their only model. engine: theirs.
        cancel: gets a report while no server is available. Raises ServerError if none answers
        within limits.wait_s or one rejects the requests, and IdentityError if they do not serve one
        teacher.
        """
        limits = limits or Limits()
        # URLs are checked before the thread starts; a repeated URL is one server.
        clients = {
            client.url: client for client in (ServerClient(url, key, limits) for url in urls)
        }
        if not clients:
            raise ConfigError("a teacher without servers", hint="give a URL")
        self._cancel = cancel or CancelToken()
        self._pool = ServerPool([*clients.values()], limits, self._check_returned, self._cancel)
        alone = limits if len(clients) == 1 else replace(limits, wait_s=limits.alone_s)
        self._replicas = {
            url: Replica(
                self,
                ServerPool(
                    [ServerClient(url, key, alone)], alone, self._check_returned, self._cancel
                ),
            )
            for url in clients
        }
        self._limits, self._engine = limits, engine
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.n_vocab = 0
        """Scores are over the ids [0, n_vocab) of both tokenizers; set it before scoring."""
        try:
            self.info: ServerInfo = self._run(self._connect(served))
        except BaseException:
            self.close()
            raise
        self.capabilities = frozenset(
            {"top", "entropy", "tail", "bounds", *(["at_ids"] if self.info.at_ids else [])}
        )

    def __enter__(self) -> "ServerScorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and their thread; a second call does nothing."""
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def describe(self) -> dict[str, str]:
        """Return engine, fingerprint, path and hosts."""
        return self._describe(self._pool)

    @property
    def received(self) -> int:
        """Return the bytes of all answers so far."""
        return sum(client.received for client in self._pool.clients)

    @property
    def most_in_flight(self) -> tuple[int, int]:
        """Return the maxima in flight so far: (requests, expected bytes)."""
        return self._pool.budget.most_requests, self._pool.budget.most_bytes

    @property
    def window(self) -> float:
        """Return the number of requests that may be in flight; fewer after busy answers."""
        return self._pool.budget.window

    def tokenize(self, text: str) -> list[int] | None:
        """Return the ids of a text without special tokens; None if the server cannot tokenize."""
        try:
            return self._run(
                self._pool.call_any(lambda client: tokenize(client, text, self.info.served))
            )
        except Transient as fault:
            # A healthy server that fails does not support it.
            if not (fault.lost or fault.late or len(self.unavailable()) == len(self._replicas)):
                return None
            raise ServerError(
                f"a server does not answer a tokenize request: {fault}",
                hint="look at the server's log, and run the same command again",
            ) from fault

    def score(
        self,
        rollouts: Rollouts,
        request: ScoreParams,
        extra_ids: IdLists | None = None,
        *,
        progress: Progress = no_progress,
    ) -> Scores:
        """Score rollouts as `base.Scorer.score`.

        Raises as `resolve_extra_ids`, ConfigError for a request that the servers cannot answer,
        ServerError and AnswerError as `ServerPool.send`.
        """
        return self._score(self._pool, rollouts, request, extra_ids, progress)

    def replicas(self) -> dict[str, "Replica"]:
        """Return {URL: a scorer over that server alone}.

        Its requests do not count for `take_answered`, nor for the availability of the servers.
        """
        return dict(self._replicas)

    def unavailable(self) -> set[str]:
        """Return the URLs of the servers that did not respond to the last request."""
        return {client.url for client in self._pool.clients if not client.healthy}

    def take_answered(self) -> set[str]:
        """Return the URLs of the servers that gave scores since the last call."""
        return self._run(self._take_answered())

    def _score(
        self,
        pool: ServerPool,
        rollouts: Rollouts,
        request: ScoreParams,
        extra_ids: IdLists | None,
        progress: Progress,
    ) -> Scores:
        url = pool.clients[0].url
        assembler = new_assembler(self.info, url, self.n_vocab, rollouts, request, extra_ids)
        self._run(
            self._fill(pool, rollouts, assembler),
            lambda: progress("score", assembler.rows_written, rollouts.positions),
        )
        return assembler.scores()

    def _describe(self, pool: ServerPool) -> dict[str, str]:
        return {
            "name": "server",
            "dtype": "unknown",
            "engine": f"{self.info.engine} {self.info.version}" if self.info.version else "unknown",
            "fingerprint": self.info.fingerprint,
            "path": self.info.path,
            "hosts": hosts([client.url for client in pool.clients]),
        }

    # In the thread of the event loop.

    def _run(
        self, work: Coroutine[Any, Any, T], while_waiting: Callable[[], None] = lambda: None
    ) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while not wait([future], STOP_S).done:
                while_waiting()
                if self._cancel.cancelled:
                    raise Cancelled("the servers are unavailable")
            return future.result()
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        except (Cancelled, KeyboardInterrupt, SystemExit):
            # Cancelled requests close their sockets, and the server then drops them.
            future.cancel()
            raise

    async def _connect(self, served: str) -> ServerInfo:
        """Return the info of the first server that answers within wait_s."""
        begun_s, clients = self._loop.time(), self._pool.clients
        with self._cancel.waiting():
            found = await self._fetch_infos(clients, served)
            if not (known := [each for each in found if isinstance(each, ServerInfo)]):
                self._cancel.report([client.url for client in clients])
            while not known:
                if self._loop.time() - begun_s >= self._limits.wait_s:
                    raise ServerError(
                        f"{clients[0].url} does not answer: {found[0]}",
                        hint="check the URL and that the server runs; --server-wait sets the "
                        "maximum waiting time",
                    )
                await asyncio.sleep(self._limits.poll_s)
                found = await self._fetch_infos(clients, served)
                known = [each for each in found if isinstance(each, ServerInfo)]
        for client, each in zip(clients, found, strict=True):
            client.healthy = isinstance(each, ServerInfo)
            if isinstance(each, ServerInfo):
                check_same(known[0], each, client.url)
        return known[0]

    async def _fetch_infos(
        self, clients: Sequence[ServerClient], served: str
    ) -> list[ServerInfo | Transient]:
        """Fetch the infos concurrently, or the fault of each. Raises the first other error."""

        async def one(client: ServerClient) -> ServerInfo | Transient:
            try:
                return await self._fetch_info(client, served)
            except Transient as fault:
                return fault

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(client)) for client in clients]
        return [each.result() for each in tasks]

    async def _fetch_info(self, client: ServerClient, served: str) -> ServerInfo:
        try:
            return await fetch_info(client, served, self._engine)
        except AnswerError as error:
            cause = client.one_line(error.cause)
            raise ServerError(f"{client.url}: {cause}", hint=error.hint) from None

    async def _fill(
        self, pool: ServerPool, rollouts: Rollouts, assembler: ResponseAssembler
    ) -> None:
        await self._recheck(pool)
        await score_sequences(pool, self.info, rollouts, assembler)

    async def _take_answered(self) -> set[str]:
        taken, self._pool.answered = self._pool.answered, set()
        return taken

    async def _recheck(self, pool: ServerPool) -> None:
        """Compare the model of each server: a restart between two units loses no request."""

        async def one(client: ServerClient) -> None:
            sent_s = self._loop.time()
            try:
                await check_card(client, self.info)
            except Transient as fault:
                await pool.record_fault(client, fault, sent_s)

        async with asyncio.TaskGroup() as group:
            for client in pool.clients:
                if client.healthy:  # others are checked before their next use
                    group.create_task(one(client))

    async def _check_returned(self, client: ServerClient) -> None:
        check_same(self.info, await self._fetch_info(client, self.info.served), client.url)

    async def _end(self) -> None:
        for pool in (self._pool, *(replica.pool for replica in self._replicas.values())):
            await pool.close()
        # Connections close in the next iteration of the loop.
        await asyncio.sleep(0)


class Replica:
    """Scorer over one server, with its own connection."""

    def __init__(self, server: ServerScorer, pool: ServerPool) -> None:
        self._server, self.pool = server, pool

    @property
    def capabilities(self) -> frozenset[str]:
        """Return those of all servers."""
        return self._server.capabilities

    def score(
        self,
        rollouts: Rollouts,
        request: ScoreParams,
        extra_ids: IdLists | None = None,
        *,
        progress: Progress = no_progress,
    ) -> Scores:
        """Score as `ServerScorer.score`; one of several servers is awaited for limits.alone_s."""
        return self._server._score(self.pool, rollouts, request, extra_ids, progress)

    def describe(self) -> dict[str, str]:
        return self._server._describe(self.pool)


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error of a group."""
    first = group.exceptions[0]
    return first_error(first) if isinstance(first, BaseExceptionGroup) else first
