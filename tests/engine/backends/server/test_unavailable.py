"""Servers that are away: at the start, in a run, behind a proxy, or in all but name."""

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

ASK = ScoreParams(top_p=1.0, k_min=12, k_max=12)
PATIENT = replace(QUICK, wait_s=600.0)
Connect = Callable[..., ServerScorer]
Spoilt = web.StreamResponse | None


class Spoiling(FakeServer):
    """Asks itself first what else to answer: `spoil` of a path, None = as it is."""

    async def spoil(self, path: str) -> Spoilt:
        return None

    async def _health(self, request: web.Request) -> Any:
        return await self.spoil(request.path) or await super()._health(request)

    async def _models(self, request: web.Request) -> Any:
        return await self.spoil(request.path) or await super()._models(request)

    async def _tokenize(self, request: web.Request) -> Any:
        return await self.spoil(request.path) or await super()._tokenize(request)

    async def _score(self, request: web.Request, *rest: Any) -> Any:
        return await self.spoil(request.path) or await super()._score(request, *rest)


class Hanging(Spoiling):
    """Accepts, and never answers."""

    hangs = False
    at_scores = False
    """It comes to hang when it is first asked for scores."""

    async def spoil(self, path: str) -> Spoilt:
        self.hangs = self.hangs or (self.at_scores and path.startswith("/inference"))
        if self.hangs:
            await asyncio.sleep(60)
        return None


class Proxied(Spoiling):
    """A proxy whose server is gone says 404 to all that is asked, or to some of it."""

    gone = ""
    """What is asked there is not found."""
    lasts = 1 << 30
    """Scores that are told before all is gone."""

    looked = 0
    """Times that its health was asked for while it was gone."""

    async def spoil(self, path: str) -> Spoilt:
        if len(self.seen.requests) >= self.lasts:
            self.gone = "/"
        if self.gone and path.startswith(self.gone):
            self.looked += path == "/health"
            return web.json_response({"error": "no backend"}, status=404)
        return None


def same(found: Scores, exact: Scores) -> None:
    np.testing.assert_array_equal(found.ids, exact.ids)
    np.testing.assert_allclose(found.entry_lp, exact.entry_lp, atol=1e-5)


def until(so: Callable[[], bool]) -> None:
    for _ in range(1000):
        if so():
            return
        time.sleep(0.01)
    raise AssertionError("never")


def test_those_that_answer_begin_and_one_that_comes_later_joins(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    with FakeServer(teacher.model) as later:
        pass
    server = connect(later, fake, limits=PATIENT)
    assert server.unavailable() == {later.url}
    assert server.tokenize("ab") is None
    exact = teacher.score(rolled, ASK)
    same(server.score(rolled, ASK), exact)
    assert server.take_answered() == {fake.url}
    fake.delay_s = 0.02
    with FakeServer(teacher.model, port=later.port):

        def concat_scores() -> bool:
            same(server.score(rolled, ASK), exact)
            return later.url in server.take_answered()

        until(concat_scores)
        assert server.unavailable() == set()


def test_another_teacher_that_comes_later_is_refused(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    with FakeServer(teacher.model) as later:
        pass
    server = connect(later, fake, limits=PATIENT)
    with FakeServer(teacher.model, port=later.port, root="org/other"):

        def scored() -> bool:
            server.score(rolled, ASK)
            return False

        with pytest.raises(IdentityError, match=f"{later.url}: root is 'org/other', and was"):
            until(scored)
        assert later.url not in server.take_answered()


def test_without_any_the_reason_is_told(teacher: HF) -> None:
    with FakeServer(teacher.model) as gone:
        pass
    with pytest.raises(ServerError, match=f"{gone.url} does not answer: .*Cannot connect"):
        ServerScorer([gone.url], limits=replace(QUICK, wait_s=0.05))


def test_one_that_hangs_is_away_and_takes_no_room_of_the_others(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    limits = replace(PATIENT, read_s=3.0, health_s=2.0, poll_s=0.05)
    with Hanging(teacher.model) as hangs:
        server = connect(fake, hangs, limits=limits)
        fake.delay_s = hangs.delay_s = 0.02
        exact = teacher.score(rolled, ASK)
        same(server.score(rolled, ASK), exact)
        hangs.hangs = True
        for _ in range(3):
            same(server.score(rolled, ASK), exact)
            assert server.unavailable() == {hangs.url}
        assert server.window == limits.requests
        hangs.hangs = False
        until(lambda: same(server.score(rolled, ASK), exact) is None and not server.unavailable())


def test_one_that_hangs_in_mid_unit_shrinks_no_window(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    limits = replace(PATIENT, read_s=3.0, health_s=2.0)
    with Hanging(teacher.model) as hangs:
        server = connect(fake, hangs, limits=limits)
        fake.delay_s = 0.05
        hangs.at_scores = True
        same(server.score(rolled, ASK), teacher.score(rolled, ASK))
        assert (server.unavailable(), server.window) == ({hangs.url}, limits.requests)


def test_a_slow_server_that_is_well_is_asked_less(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    async def late(server: FakeServer, request: web.Request, said: Any) -> None:
        await asyncio.sleep(0.6)

    server = connect(fake, limits=replace(PATIENT, read_s=0.3))
    fake.faults = [late] * 2
    server.score(rolled, ASK)
    assert server.unavailable() == set()
    assert server.window < PATIENT.requests


@pytest.mark.parametrize("gone", ["/", "/inference"])
def test_a_404_of_a_proxy_is_an_absence_and_of_a_server_that_is_well_a_refusal(
    gone: str, fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    with Proxied(teacher.model) as proxied:
        server = connect(fake, proxied, limits=PATIENT)
        fake.delay_s = 0.05
        exact = teacher.score(rolled, ASK)
        proxied.gone = gone
        if gone == "/inference":
            with pytest.raises(ServerError, match="answers 404: no backend"):
                server.score(rolled, ASK)
            return
        same(server.score(rolled, ASK), exact)
        assert server.unavailable() == {proxied.url}
        proxied.gone = ""
        until(lambda: same(server.score(rolled, ASK), exact) is None and not server.unavailable())


def test_a_proxy_without_its_server_is_waited_for_in_mid_unit(
    connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    """The card is still there when the unit begins."""

    def mend() -> None:
        proxied.lasts, proxied.gone = 1 << 30, ""

    with Proxied(teacher.model) as proxied:
        server = connect(proxied, limits=PATIENT)
        exact = teacher.score(rolled, ASK)
        proxied.lasts = len(proxied.seen.requests) + 3
        mended = threading.Thread(target=lambda: (until(lambda: proxied.looked > 0), mend()))
        mended.start()
        same(server.score(rolled, ASK), exact)
        mended.join()
        assert proxied.looked


def test_one_that_was_lost_is_never_used_before_it_was_looked_at(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    """Busy is an answer, and says nothing of who answers."""

    class Busy(Spoiling):
        async def spoil(self, path: str) -> Spoilt:
            return web.Response(status=503) if path == "/v1/models" else None

    with FakeServer(teacher.model) as lost:
        server = connect(fake, lost, limits=PATIENT)
        fake.delay_s = 0.02
    server.score(rolled, ASK)
    assert server.unavailable() == {lost.url}
    with Busy(teacher.model, port=lost.port) as other:
        for _ in range(3):
            server.score(rolled, ASK)
        assert server.unavailable() == {lost.url}
        assert other.seen.requests == []


def test_a_server_that_cannot_tokenize_because_it_is_ill_is_no_answer(
    connect: Connect, teacher: HF
) -> None:
    class Dead(Spoiling):
        dead = False

        async def spoil(self, path: str) -> Spoilt:
            return web.Response(status=503) if self.dead else None

    with Dead(teacher.model) as fake:
        server = connect(fake, limits=replace(QUICK, attempts=1, wait_s=0.05))
        fake.dead = True
        with pytest.raises(ServerError, match="503"):
            server.tokenize("ab")


def test_one_that_is_lost_while_its_health_is_asked_for_stays_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What says that it is well may be another by then."""
    client = ServerClient("http://127.0.0.1:1", None, QUICK)

    async def back(_: ServerClient) -> None:
        raise AssertionError("nobody asks it")

    async def is_healthy() -> bool:
        client.healthy = False
        return True

    monkeypatch.setattr(client, "is_healthy", is_healthy)
    pool = ServerPool([client], QUICK, back, CancelToken())
    for look in (
        lambda: pool.record_fault(client, Transient("no answer", late=True), 0.0),
        lambda: pool.recheck(client),
    ):
        client.healthy = True
        asyncio.run(look())
        assert not client.healthy
        assert pool.budget.window == QUICK.requests


@pytest.mark.parametrize("status", [429, 500, 503, "reset", "list", "words"])
def test_a_text_that_is_not_tokenised_is_asked_for_again_and_then_let_be(
    status: Any, connect: Connect, teacher: HF
) -> None:
    asked: list[int] = []
    well_after = 2

    class Unwell(Spoiling):
        async def _tokenize(self, request: web.Request) -> Any:
            asked.append(1)
            if len(asked) > well_after:
                return await super()._tokenize(request)
            if status == "reset":
                assert request.transport is not None
                request.transport.abort()
            if isinstance(status, int):
                return web.json_response({"error": "not now"}, status=status)
            return web.json_response([{"id": 1}] if status == "list" else {"tokens": ["a"]})

    with Unwell(teacher.model, tokenizer=make_tokenizer()) as fake:
        server = connect(fake)
        said = server.tokenize("ab")
        assert said == (None if status in ("list", "words") else make_tokenizer()("ab").input_ids)
        asked.clear()
        well_after = 1 << 30
        if status == "reset":
            with pytest.raises(ServerError, match="does not answer a tokenize request"):
                server.tokenize("ab")
        else:
            assert server.tokenize("ab") is None
        assert len(asked) <= QUICK.attempts


def test_a_worker_that_is_told_to_stop_waits_no_longer(
    teacher: HF, connect: Connect, rolled: Rollouts
) -> None:
    said: list[str] = []
    stop = threading.Event()
    cancel = CancelToken(said.append, stop)
    with FakeServer(teacher.model) as gone:
        server = connect(gone, limits=PATIENT, cancel=cancel)
    assert said == [], "who answers at once is not waited for"

    def stopped(wait: Callable[[], object]) -> None:
        stop.clear()
        said.clear()
        ends = threading.Thread(target=lambda: (until(lambda: bool(said)), stop.set()))
        ends.start()
        with pytest.raises(Cancelled):
            wait()
        ends.join()
        assert said == [f"waiting for {gone.url}"]

    stopped(lambda: server.score(rolled, ASK))
    stopped(lambda: ServerScorer([gone.url], limits=PATIENT, cancel=cancel))
    with FakeServer(teacher.model, port=gone.port):
        server.n_vocab = N_VOCAB
        stop.set()
        same(server.score(rolled, ASK), teacher.score(rolled, ASK))
