"""Requests in flight, and servers that are busy or unhealthy."""

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

TOP_12 = ScoreParams(top_p=1.0, k_min=12, k_max=12)
Connect = Callable[..., ServerScorer]


async def busy(server: FakeServer, request: web.Request, reply: Any) -> web.Response:
    return web.json_response({"error": {"message": "queue is full"}}, status=503)


class Unhealthy(FakeServer):
    """A server whose engine loads: its proxy replies 502 until `health_checks` checks were made."""

    health_checks = 0

    async def _health(self, _: web.Request) -> web.Response:
        self.health_checks = max(self.health_checks - 1, 0)
        return web.Response(status=503 if self.health_checks else 200)


async def loading(server: FakeServer, request: web.Request, reply: Any) -> web.Response | None:
    assert isinstance(server, Unhealthy)
    return web.Response(status=502, text="bad gateway") if server.health_checks else None


def test_a_busy_reply_is_no_failed_attempt(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    server = connect(fake, limits=replace(QUICK, attempts=1))
    fake.faults = [busy] * 40
    found, exact = server.score(rolled, TOP_12), teacher.score(rolled, TOP_12)
    np.testing.assert_array_equal(found.ids, exact.ids)
    np.testing.assert_allclose(found.entry_lp, exact.entry_lp, atol=1e-5)
    assert not fake.faults


def test_a_server_that_stays_busy_is_an_error(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake, limits=replace(QUICK, wait_s=0.1))
    fake.faults = [busy] * 100_000
    with pytest.raises(ServerError, match="no server accepted a sequence for 0 s.*queue is full"):
        server.score(rolled, TOP_12)


def test_a_loading_engine_is_waited_for(teacher: HF, connect: Connect, rolled: Rollouts) -> None:
    with Unhealthy(teacher.model) as fake:
        server = connect(fake, limits=replace(QUICK, attempts=2))
        fake.health_checks, fake.faults = 30, [loading] * 1000
        found, exact = server.score(rolled, TOP_12), teacher.score(rolled, TOP_12)
        np.testing.assert_allclose(found.at_lp, exact.at_lp, atol=1e-5)


def test_busy_replies_within_one_window_halve_it_once() -> None:
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


def test_request_bodies_are_built_when_they_are_sent(
    fake: FakeServer, connect: Connect, rolled: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Build the bodies lazily, because those of a unit may exceed the cap on bytes in flight."""
    server = connect(fake, limits=replace(QUICK, requests=2))
    made: list[int] = []
    ahead: list[int] = []
    body = RequestBody.to_json

    def counting_to_json(request: RequestBody, path: str, served: str) -> dict[str, Any]:
        made.append(1)
        return body(request, path, served)

    async def count_ahead(server: FakeServer, request: web.Request, reply: Any) -> None:
        ahead.append(len(made) - len(ahead))

    monkeypatch.setattr(RequestBody, "to_json", counting_to_json)
    fake.faults = [count_ahead] * len(rolled.finish)
    server.score(rolled, TOP_12)
    assert len(made) == len(ahead) == len(rolled.finish)
    assert max(ahead) <= 2
