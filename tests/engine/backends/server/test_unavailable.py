"""Unavailable servers: at the start, during a run, behind a proxy, or without replies."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.server import ServerScorer
from logitcask.engine.backends.server.client import ServerClient, Transient
from logitcask.engine.backends.server.pool import ServerPool
from logitcask.engine.errors import IdentityError, ServerError
from logitcask.engine.events import Cancelled, CancelToken
from logitcask.engine.types import Rollouts, ScoreParams, Scores
from tests.engine.backends.server.conftest import QUICK
from tests.engine.backends.server.fake_server import FakeServer
from tests.engine.tiny import N_VOCAB, make_tokenizer

TOP_12 = ScoreParams(top_p=1.0, k_min=12, k_max=12)
PATIENT = replace(QUICK, wait_s=600.0)
Connect = Callable[..., ServerScorer]
Replacement = web.StreamResponse | None


class ReplacesReplies(FakeServer):
    """A server that first calls `replacement(path)`, which may return another response."""

    async def replacement(self, path: str) -> Replacement:
        return None

    async def _health(self, request: web.Request) -> Any:
        return await self.replacement(request.path) or await super()._health(request)

    async def _models(self, request: web.Request) -> Any:
        return await self.replacement(request.path) or await super()._models(request)

    async def _tokenize(self, request: web.Request) -> Any:
        return await self.replacement(request.path) or await super()._tokenize(request)

    async def _score(self, request: web.Request, *rest: Any) -> Any:
        return await self.replacement(request.path) or await super()._score(request, *rest)


class Hanging(ReplacesReplies):
    """A server that accepts requests and never replies."""

    hanging = False
    at_scoring = False
    """Begin to hang at the first scoring request."""

    async def replacement(self, path: str) -> Replacement:
        self.hanging = self.hanging or (self.at_scoring and path.startswith("/inference"))
        if self.hanging:
            await asyncio.sleep(60)
        return None


class Proxied(ReplacesReplies):
    """A proxy without its server, which replies 404 to all paths or to some."""

    gone = ""
    """Prefix of the paths that reply 404."""
    n_until_gone = 1 << 30
    """Scoring requests until the server is gone."""
    health_checks = 0
    """Health checks while the server was gone."""

    async def replacement(self, path: str) -> Replacement:
        if len(self.seen.requests) >= self.n_until_gone:
            self.gone = "/"
        if self.gone and path.startswith(self.gone):
            self.health_checks += path == "/health"
            return web.json_response({"error": "no backend"}, status=404)
        return None


def assert_equal_scores(found: Scores, exact: Scores) -> None:
    np.testing.assert_array_equal(found.ids, exact.ids)
    np.testing.assert_allclose(found.entry_lp, exact.entry_lp, atol=1e-5)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(60_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition never became true")


def until_all_available(server: ServerScorer, rolled: Rollouts, exact: Scores) -> None:
    """Score, with exact results, until no server is unavailable."""

    def all_available() -> bool:
        assert_equal_scores(server.score(rolled, TOP_12), exact)
        return not server.unavailable()

    until(all_available)


def test_a_server_that_starts_later_joins(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    with FakeServer(teacher.model) as later:
        pass
    server = connect(later, fake, limits=PATIENT)
    assert server.unavailable() == {later.url}
    assert server.tokenize("ab") is None
    exact = teacher.score(rolled, TOP_12)
    assert_equal_scores(server.score(rolled, TOP_12), exact)
    assert server.take_answered() == {fake.url}
    fake.delay_s = 0.02
    with FakeServer(teacher.model, port=later.port):

        def later_answered() -> bool:
            assert_equal_scores(server.score(rolled, TOP_12), exact)
            return later.url in server.take_answered()

        until(later_answered)
        assert server.unavailable() == set()


def test_another_teacher_that_starts_later_is_an_error(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    with FakeServer(teacher.model) as later:
        pass
    server = connect(later, fake, limits=PATIENT)
    with FakeServer(teacher.model, port=later.port, root="org/other"):

        def scored() -> bool:
            server.score(rolled, TOP_12)
            return False

        with pytest.raises(IdentityError, match=f"{later.url}: root is 'org/other', and was"):
            until(scored)
        assert later.url not in server.take_answered()


def test_no_server_at_all_is_an_error_with_its_cause(teacher: HF) -> None:
    with FakeServer(teacher.model) as gone:
        pass
    with pytest.raises(ServerError, match=f"{gone.url} does not answer: .*Cannot connect"):
        ServerScorer([gone.url], limits=replace(QUICK, wait_s=0.05))


def test_a_hanging_server_is_unavailable_and_keeps_the_window(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    limits = replace(PATIENT, read_s=3.0, health_s=2.0, poll_s=0.05)
    with Hanging(teacher.model) as hanging:
        server = connect(fake, hanging, limits=limits)
        fake.delay_s = hanging.delay_s = 0.02
        exact = teacher.score(rolled, TOP_12)
        assert_equal_scores(server.score(rolled, TOP_12), exact)
        hanging.hanging = True
        for _ in range(3):
            assert_equal_scores(server.score(rolled, TOP_12), exact)
            assert server.unavailable() == {hanging.url}
        assert server.window == limits.requests
        hanging.hanging = False
        until_all_available(server, rolled, exact)


def test_a_server_that_hangs_within_a_unit_keeps_the_window(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    limits = replace(PATIENT, read_s=3.0, health_s=2.0)
    with Hanging(teacher.model) as hanging:
        server = connect(fake, hanging, limits=limits)
        fake.delay_s = 0.05
        hanging.at_scoring = True
        assert_equal_scores(server.score(rolled, TOP_12), teacher.score(rolled, TOP_12))
        assert (server.unavailable(), server.window) == ({hanging.url}, limits.requests)


def test_a_slow_healthy_server_shrinks_the_window(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    async def late(server: FakeServer, request: web.Request, reply: Any) -> None:
        await asyncio.sleep(0.6)

    server = connect(fake, limits=replace(PATIENT, read_s=0.3))
    fake.faults = [late] * 2
    server.score(rolled, TOP_12)
    assert server.unavailable() == set()
    assert server.window < PATIENT.requests


@pytest.mark.parametrize("gone", ["/", "/inference"])
def test_a_404_means_unavailable_only_without_health(
    gone: str, fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    with Proxied(teacher.model) as proxied:
        server = connect(fake, proxied, limits=PATIENT)
        fake.delay_s = 0.05
        exact = teacher.score(rolled, TOP_12)
        proxied.gone = gone
        if gone == "/inference":
            with pytest.raises(ServerError, match="answers 404: no backend"):
                server.score(rolled, TOP_12)
            return
        assert_equal_scores(server.score(rolled, TOP_12), exact)
        assert server.unavailable() == {proxied.url}
        proxied.gone = ""
        until_all_available(server, rolled, exact)


def test_a_proxy_that_loses_its_server_within_a_unit_is_waited_for(
    connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    """Start the unit while /v1/models still replies."""

    def repair() -> None:
        until(lambda: proxied.health_checks > 0)
        proxied.n_until_gone, proxied.gone = 1 << 30, ""

    with Proxied(teacher.model) as proxied:
        server = connect(proxied, limits=PATIENT)
        exact = teacher.score(rolled, TOP_12)
        proxied.n_until_gone = len(proxied.seen.requests) + 3
        repairer = threading.Thread(target=repair)
        repairer.start()
        assert_equal_scores(server.score(rolled, TOP_12), exact)
        repairer.join()
        assert proxied.health_checks


def test_a_lost_server_is_not_used_before_its_identity_check(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    """Reply 503 from another server at the same URL, which does not confirm the identity."""

    class Busy(ReplacesReplies):
        async def replacement(self, path: str) -> Replacement:
            return web.Response(status=503) if path == "/v1/models" else None

    with FakeServer(teacher.model) as lost:
        server = connect(fake, lost, limits=PATIENT)
        fake.delay_s = 0.02
    server.score(rolled, TOP_12)
    assert server.unavailable() == {lost.url}
    with Busy(teacher.model, port=lost.port) as other:
        for _ in range(3):
            server.score(rolled, TOP_12)
        assert server.unavailable() == {lost.url}
        assert other.seen.requests == []


def test_tokenize_of_an_unhealthy_server_is_an_error(connect: Connect, teacher: HF) -> None:
    class Unhealthy(ReplacesReplies):
        unhealthy = False

        async def replacement(self, path: str) -> Replacement:
            return web.Response(status=503) if self.unhealthy else None

    with Unhealthy(teacher.model) as fake:
        server = connect(fake, limits=replace(QUICK, attempts=1, wait_s=0.05))
        fake.unhealthy = True
        with pytest.raises(ServerError, match="503"):
            server.tokenize("ab")


def test_a_server_lost_during_its_health_check_stays_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lose the server during its health check, whose reply may come from another server."""
    client = ServerClient("http://127.0.0.1:1", None, QUICK)

    async def back(_: ServerClient) -> None:
        raise AssertionError("no identity check may run")

    async def is_healthy() -> bool:
        client.healthy = False
        return True

    monkeypatch.setattr(client, "is_healthy", is_healthy)
    pool = ServerPool([client], QUICK, back, CancelToken())
    for lose in (
        lambda: pool.record_fault(client, Transient("no answer", late=True), 0.0),
        lambda: pool.recheck(client),
    ):
        client.healthy = True
        asyncio.run(lose())
        assert not client.healthy
        assert pool.budget.window == QUICK.requests


@pytest.mark.parametrize("status", [429, 500, 503, "reset", "list", "words"])
def test_a_failed_tokenize_request_is_retried_up_to_the_limit(
    status: Any, connect: Connect, teacher: HF
) -> None:
    requests: list[int] = []
    n_failures = 2

    class FailsTokenize(ReplacesReplies):
        async def _tokenize(self, request: web.Request) -> Any:
            requests.append(1)
            if len(requests) > n_failures:
                return await super()._tokenize(request)
            if status == "reset":
                assert request.transport is not None
                request.transport.abort()
            if isinstance(status, int):
                return web.json_response({"error": "not now"}, status=status)
            return web.json_response([{"id": 1}] if status == "list" else {"tokens": ["a"]})

    with FailsTokenize(teacher.model, tokenizer=make_tokenizer()) as fake:
        server = connect(fake)
        found = server.tokenize("ab")
        assert found == (None if status in ("list", "words") else make_tokenizer()("ab").input_ids)
        requests.clear()
        n_failures = 1 << 30
        if status == "reset":
            with pytest.raises(ServerError, match="does not answer a tokenize request"):
                server.tokenize("ab")
        else:
            assert server.tokenize("ab") is None
        assert len(requests) <= QUICK.attempts


def test_cancellation_ends_a_wait(teacher: HF, connect: Connect, rolled: Rollouts) -> None:
    events: list[str] = []
    stop = threading.Event()
    cancel = CancelToken(events.append, stop)
    with FakeServer(teacher.model) as gone:
        server = connect(gone, limits=PATIENT, cancel=cancel)
    assert events == [], "no wait for a server that replies at once"

    def stopped(wait: Callable[[], object]) -> None:
        stop.clear()
        events.clear()
        stopper = threading.Thread(target=lambda: (until(lambda: bool(events)), stop.set()))
        stopper.start()
        with pytest.raises(Cancelled):
            wait()
        stopper.join()
        assert events == [f"waiting for {gone.url}"]

    stopped(lambda: server.score(rolled, TOP_12))
    stopped(lambda: ServerScorer([gone.url], limits=PATIENT, cancel=cancel))
    with FakeServer(teacher.model, port=gone.port):
        server.n_vocab = N_VOCAB
        stop.set()
        assert_equal_scores(server.score(rolled, TOP_12), teacher.score(rolled, TOP_12))
