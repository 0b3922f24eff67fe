"""Each of several servers asked alone, and who of them answered a unit."""

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

ASK = ScoreParams(top_p=1.0, k_min=12, k_max=12)
Connect = Callable[..., ServerScorer]


def test_a_member_asks_its_own_server_and_counts_for_nobody(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    with FakeServer(teacher.model) as second:
        server = connect(fake, second)
        replicas = server.replicas()
        assert list(replicas) == [fake.url, second.url]
        server.n_vocab = 0
        with pytest.raises(ConfigError, match="n_vocab"):
            replicas[second.url].score(rolled, ASK)
        server.n_vocab = N_VOCAB
        before = len(fake.seen.requests), len(second.seen.requests)
        found, exact = replicas[second.url].score(rolled, ASK), teacher.score(rolled, ASK)
        np.testing.assert_allclose(found.entry_lp, exact.entry_lp, atol=1e-5)
        assert len(fake.seen.requests) == before[0]
        assert len(second.seen.requests) == before[1] + len(rolled.finish)
        assert server.take_answered() == set()
        assert replicas[second.url].capabilities == server.capabilities
        assert replicas[second.url].describe() == server.describe() | {
            "hosts": second.url.removeprefix("http://")
        }


def test_who_answered_is_told_once(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    with FakeServer(teacher.model) as second:
        server = connect(fake, second)
        assert server.take_answered() == set(), "that a server was looked at is no answer to a unit"
        fake.delay_s = second.delay_s = 0.05
        server.score(rolled, ASK)
        assert server.take_answered() == {fake.url, second.url}
        assert server.take_answered() == set()
    server.score(rolled, ASK)
    assert server.take_answered() == {fake.url}


def test_a_member_answers_while_the_others_are_away_and_one_that_is_away_is_told_so(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    with FakeServer(teacher.model) as dies:
        server = connect(fake, dies, limits=replace(QUICK, alone_s=0.1, wait_s=600))
    replicas = server.replicas()
    with pytest.raises(ServerError, match=f"{dies.url}: no server has answered for 0 s"):
        replicas[dies.url].score(rolled, ASK)
    assert replicas[fake.url].score(rolled, ASK).at_lp is not None
    assert server.unavailable() == set(), "for all it is a server like any other"
    assert server.score(rolled, ASK).at_lp is not None
    assert server.unavailable() == {dies.url}
    assert list(server.replicas()) == [fake.url, dies.url]


def test_what_a_server_answered_that_is_away_in_the_end_is_asked_again(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    """It may have been another teacher by then, and nobody can find out."""

    class Dying(FakeServer):
        """Answers a few with log-probs of its own, and is ill from then on."""

        told = 0

        def log_probs(self, ids: list[int]) -> np.ndarray:
            self.told += len(ids) > 3
            return super().log_probs(ids)

        async def _health(self, request: web.Request) -> web.Response:
            return web.Response(status=503 if self.told else 200)

    with Dying(teacher.model, temperature=2.0) as dies:
        server = connect(fake, dies)
        fake.delay_s = 0.02
        found, exact = server.score(rolled, ASK), teacher.score(rolled, ASK)
        assert dies.told
        np.testing.assert_allclose(found.entry_lp, exact.entry_lp, atol=1e-5)
        assert (server.take_answered(), server.unavailable()) == ({fake.url}, {dies.url})


def test_one_server_that_is_named_twice_is_one(fake: FakeServer) -> None:
    server = ServerScorer([fake.url, f"{fake.url}/v1/"], limits=QUICK)
    try:
        assert list(server.replicas()) == [fake.url]
    finally:
        server.close()
