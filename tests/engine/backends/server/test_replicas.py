"""Scoring with one replica of a pool, and the replicas that answered a unit."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from aiohttp import web

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.server import ServerScorer
from logitcask.engine.errors import ConfigError, ServerError
from logitcask.engine.types import Rollouts, ScoreParams
from tests.engine.backends.server.conftest import QUICK
from tests.engine.backends.server.fake_server import FakeServer
from tests.engine.tiny import N_VOCAB

TOP_12 = ScoreParams(top_p=1.0, k_min=12, k_max=12)
Connect = Callable[..., ServerScorer]


def test_a_replica_uses_its_own_server_only(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    with FakeServer(teacher.model) as second:
        server = connect(fake, second)
        replicas = server.replicas()
        assert list(replicas) == [fake.url, second.url]
        server.n_vocab = 0
        with pytest.raises(ConfigError, match="n_vocab"):
            replicas[second.url].score(rolled, TOP_12)
        server.n_vocab = N_VOCAB
        before = len(fake.seen.requests), len(second.seen.requests)
        found, exact = replicas[second.url].score(rolled, TOP_12), teacher.score(rolled, TOP_12)
        np.testing.assert_allclose(found.entry_lp, exact.entry_lp, atol=1e-5)
        assert len(fake.seen.requests) == before[0]
        assert len(second.seen.requests) == before[1] + len(rolled.finish)
        assert server.take_answered() == set()
        assert replicas[second.url].capabilities == server.capabilities
        assert replicas[second.url].describe() == server.describe() | {
            "hosts": second.url.removeprefix("http://")
        }


def test_take_answered_returns_each_url_once(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    with FakeServer(teacher.model) as second:
        server = connect(fake, second)
        assert server.take_answered() == set(), "an identity check does not count as an answer"
        fake.delay_s = second.delay_s = 0.05
        server.score(rolled, TOP_12)
        assert server.take_answered() == {fake.url, second.url}
        assert server.take_answered() == set()
    server.score(rolled, TOP_12)
    assert server.take_answered() == {fake.url}


def test_a_replica_scores_or_fails_by_its_own_server(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    with FakeServer(teacher.model) as stopping:
        server = connect(fake, stopping, limits=replace(QUICK, alone_s=0.1, wait_s=600))
    replicas = server.replicas()
    with pytest.raises(ServerError, match=f"{stopping.url}: no server has answered for 0 s"):
        replicas[stopping.url].score(rolled, TOP_12)
    assert replicas[fake.url].score(rolled, TOP_12).at_lp is not None
    assert server.unavailable() == set(), "a fault of a single replica does not change the pool"
    assert server.score(rolled, TOP_12).at_lp is not None
    assert server.unavailable() == {stopping.url}
    assert list(server.replicas()) == [fake.url, stopping.url]


def test_replies_of_a_server_that_becomes_unhealthy_are_requested_again(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    """Discard its replies, because its identity cannot be checked any more."""

    class Stopping(FakeServer):
        """A server that replies at another temperature, and is unhealthy after its first reply."""

        n_replies = 0

        def log_probs(self, ids: list[int]) -> np.ndarray:
            self.n_replies += len(ids) > 3
            return super().log_probs(ids)

        async def _health(self, request: web.Request) -> web.Response:
            return web.Response(status=503 if self.n_replies else 200)

    with Stopping(teacher.model, temperature=2.0) as stopping:
        server = connect(fake, stopping)
        fake.delay_s = 0.02
        found, exact = server.score(rolled, TOP_12), teacher.score(rolled, TOP_12)
        assert stopping.n_replies
        np.testing.assert_allclose(found.entry_lp, exact.entry_lp, atol=1e-5)
        assert (server.take_answered(), server.unavailable()) == ({fake.url}, {stopping.url})


def test_a_repeated_url_is_one_server(fake: FakeServer) -> None:
    server = ServerScorer([fake.url, f"{fake.url}/v1/"], limits=QUICK)
    try:
        assert list(server.replicas()) == [fake.url]
    finally:
        server.close()
