"""How much is asked at once, and what a server that takes no more, or is ill, does to a run."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.server import Limits, ServerScorer
from logitcask.engine.backends.server.budget import Budget
from logitcask.engine.backends.server.protocol import RequestBody
from logitcask.engine.errors import ServerError
from logitcask.engine.types import Rollouts, ScoreParams
from tests.engine.backends.server.conftest import QUICK
from tests.engine.backends.server.fake_server import FakeServer

ASK = ScoreParams(top_p=1.0, k_min=12, k_max=12)
Connect = Callable[..., ServerScorer]


async def busy(server: FakeServer, request: web.Request, said: Any) -> web.Response:
    return web.json_response({"error": {"message": "queue is full"}}, status=503)


class Unhealthy(FakeServer):
    """Its engine loads: a proxy says 502 until it was asked for its health `looks` times."""

    looks = 0

    async def _health(self, _: web.Request) -> web.Response:
        self.looks = max(self.looks - 1, 0)
        return web.Response(status=503 if self.looks else 200)


async def loading(server: FakeServer, request: web.Request, said: Any) -> web.Response | None:
    assert isinstance(server, Unhealthy)
    return web.Response(status=502, text="bad gateway") if server.looks else None


def test_that_a_server_takes_no_more_is_no_failed_attempt(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    server = connect(fake, limits=replace(QUICK, attempts=1))
    fake.faults = [busy] * 40
    found, exact = server.score(rolled, ASK), teacher.score(rolled, ASK)
    np.testing.assert_array_equal(found.ids, exact.ids)
    np.testing.assert_allclose(found.entry_lp, exact.entry_lp, atol=1e-5)
    assert not fake.faults


def test_one_that_never_takes_any_ends_the_run(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake, limits=replace(QUICK, wait_s=0.1))
    fake.faults = [busy] * 100_000
    with pytest.raises(ServerError, match="no server accepted a sequence for 0 s.*queue is full"):
        server.score(rolled, ASK)


def test_an_engine_that_still_loads_is_waited_for(
    teacher: HF, connect: Connect, rolled: Rollouts
) -> None:
    with Unhealthy(teacher.model) as fake:
        server = connect(fake, limits=replace(QUICK, attempts=2))
        fake.looks, fake.faults = 30, [loading] * 1000
        found, exact = server.score(rolled, ASK), teacher.score(rolled, ASK)
        np.testing.assert_allclose(found.at_lp, exact.at_lp, atol=1e-5)


def test_refusals_of_one_window_halve_it_once() -> None:
    budget = Budget(Limits(requests=64))
    sent_s = time.monotonic()
    for _ in range(64):
        budget.decrease(sent_s)
    assert budget.window == 32
    budget.decrease(time.monotonic() + 1)
    assert budget.window == 16
    for _ in range(16):
        budget.increase()
    assert 16.9 < budget.window <= 17


def test_questions_are_made_when_there_is_room_for_them(
    fake: FakeServer, connect: Connect, rolled: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a whole unit may be far larger than the cap on what is in flight."""
    server = connect(fake, limits=replace(QUICK, requests=2))
    made: list[int] = []
    ahead: list[int] = []
    body = RequestBody.to_json

    def counted(request: RequestBody, path: str, served: str) -> dict[str, Any]:
        made.append(1)
        return body(request, path, served)

    async def look(server: FakeServer, request: web.Request, said: Any) -> None:
        ahead.append(len(made) - len(ahead))

    monkeypatch.setattr(RequestBody, "to_json", counted)
    fake.faults = [look] * len(rolled.finish)
    server.score(rolled, ASK)
    assert len(made) == len(ahead) == len(rolled.finish)
    assert max(ahead) <= 2
