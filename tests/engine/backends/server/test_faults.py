"""Faults of a server (R11) end in a retry with exact scores, or in an error with its cause.

Each kind occurs several times, at random requests.
"""

import asyncio
import base64
import io
import json
import random
import signal
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
from logitcask.engine.errors import AnswerError, IdentityError, ServerError
from logitcask.engine.types import Rollouts, ScoreParams, Scores
from tests.engine.backends.server.conftest import QUICK
from tests.engine.backends.server.fake_server import FakeServer, Fault, packed

TOP_12 = ScoreParams(top_p=1.0, k_min=12, k_max=12)
FULL = ScoreParams(top_p=1.0, k_min=64, k_max=64)
Connect = Callable[..., ServerScorer]
Reply = dict[str, Any]
HARMLESS = replace(QUICK, read_s=0.25)


def status(code: int, **headers: str) -> Fault:
    async def answer(server: FakeServer, request: web.Request, reply: Reply) -> web.Response:
        body = {"error": {"message": f"fault {code}"}}
        return web.json_response(body, status=code, headers=headers)

    return answer


async def reset(server: FakeServer, request: web.Request, reply: Reply) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def reset_within_the_body(
    server: FakeServer, request: web.Request, reply: Reply
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "100000"})
    await response.prepare(request)
    await response.write(json.dumps(reply).encode()[:100])
    assert request.transport is not None
    request.transport.abort()
    return response


async def truncate(server: FakeServer, request: web.Request, reply: Reply) -> web.StreamResponse:
    text = json.dumps(reply)
    return web.Response(text=text[: len(text) // 2], content_type="application/json")


async def stall(server: FakeServer, request: web.Request, reply: Reply) -> None:
    await asyncio.sleep(2)


async def too_long(server: FakeServer, request: web.Request, reply: Reply) -> web.StreamResponse:
    return web.Response(body=b" " * (1 << 22), content_type="application/json")


def spoil(change: Callable[[list[Any], Reply], None]) -> Fault:
    """Return a fault that changes the rows of a reply, which are dicts from id to entry."""

    async def answer(server: FakeServer, request: web.Request, reply: Reply) -> None:
        change(reply["prompt_logprobs"], reply)

    return answer


def last_row(rows: list[Any]) -> list[dict[str, Any]]:
    return list(rows[-1].values())


def nan(rows: list[Any], reply: Reply) -> None:
    last_row(rows)[0]["logprob"] = float("nan")


def infinite(rows: list[Any], reply: Reply) -> None:
    last_row(rows)[0]["logprob"] = float("inf")


def positive(rows: list[Any], reply: Reply) -> None:
    last_row(rows)[0]["logprob"] = 0.1


def raised(rows: list[Any], reply: Reply) -> None:
    for row in rows[1:]:
        for entry in row.values():
            entry["logprob"] += 0.1


def shorter(rows: list[Any], reply: Reply) -> None:
    del rows[-1]


def empty_rows(rows: list[Any], reply: Reply) -> None:
    rows[1:] = [{} for _ in rows[1:]]


def other_ids(rows: list[Any], reply: Reply) -> None:
    rows[-1] = {str(int(k) + 100): v for k, v in rows[-1].items()}


def words_for_ids(rows: list[Any], reply: Reply) -> None:
    rows[-1] = {f"token_id:{k}": v for k, v in rows[-1].items()}


def shifted(rows: list[Any], reply: Reply) -> None:
    rows[1:] = [rows[-1], *rows[1:-1]]


def aborted(rows: list[Any], reply: Reply) -> None:
    reply["choices"][0]["finish_reason"] = "abort"


def wrong_model(rows: list[Any], reply: Reply) -> None:
    reply["model"] = "another"


def without_id_logprobs(rows: list[Any], reply: Reply) -> None:
    reply["prompt_token_id_logprobs"] = None


def id_logprobs_of_another_shape(rows: list[Any], reply: Reply) -> None:
    reply["prompt_token_id_logprobs"] = packed(np.zeros((2, 2)))


def nan_id_logprobs(rows: list[Any], reply: Reply) -> None:
    reply["prompt_token_id_logprobs"] = packed(np.full((len(rows) - 1, 7), np.nan))


def shifted_id_logprobs(rows: list[Any], reply: Reply) -> None:
    """Roll the values, which then contradict the top-k entries of the same rows."""
    array = np.load(io.BytesIO(base64.b64decode(reply["prompt_token_id_logprobs"])))
    reply["prompt_token_id_logprobs"] = packed(np.roll(array, 1, axis=1))


TRANSIENT: dict[str, Fault] = {
    "500": status(500),
    "429 with a pause": status(429, **{"Retry-After": "0"}),
    "503": status(503),
    "reset": reset,
    "reset in the body": reset_within_the_body,
    "truncated": truncate,
    "stalled": stall,
    "too many bytes": too_long,
}
WRONG: dict[str, Fault] = {
    each.__name__: spoil(each)
    for each in (
        *(nan, infinite, positive, raised, shorter, empty_rows, other_ids, words_for_ids),
        *(shifted, aborted, wrong_model, without_id_logprobs, id_logprobs_of_another_shape),
        *(nan_id_logprobs, shifted_id_logprobs),
    )
}


def assert_equal_scores(found: Scores, exact: Scores) -> None:
    np.testing.assert_array_equal(found.ids, exact.ids)
    for name in ("lp", "entry_lp", "at_lp"):
        np.testing.assert_allclose(getattr(found, name), getattr(exact, name), atol=1e-5)


@pytest.fixture(scope="module")
def exact(teacher: HF, rolled: Rollouts) -> Scores:
    return teacher.score(rolled, FULL)


@pytest.mark.parametrize("kind", [*TRANSIENT, *WRONG])
def test_a_retry_after_a_fault_returns_exact_scores(
    kind: str,
    fake: FakeServer,
    connect: Connect,
    rolled: Rollouts,
    exact: Scores,
    counts: Callable[[int, int], int],
) -> None:
    fault = (TRANSIENT | WRONG)[kind]
    server = connect(fake, limits=HARMLESS)
    rng = random.Random(kind)
    for _ in range(counts(2, 4) if kind == "stalled" else counts(3, 20)):
        n_before = rng.randrange(len(rolled.finish))
        fake.faults = [no_fault] * n_before + [fault]
        assert_equal_scores(server.score(rolled, FULL), exact)
        assert not fake.faults


async def no_fault(server: FakeServer, request: web.Request, reply: Reply) -> None:
    return None


@pytest.mark.parametrize("kind", [k for k in TRANSIENT if k != "stalled"])
def test_a_lasting_fault_is_an_error_with_its_cause(
    kind: str, fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake, limits=replace(HARMLESS, attempts=3, wait_s=0.1))
    fake.faults = [TRANSIENT[kind]] * 1000
    with pytest.raises((ServerError, AnswerError)) as caught:
        server.score(rolled, FULL)
    assert "prompt " in caught.value.cause
    assert caught.value.hint


@pytest.mark.parametrize("kind", list(WRONG))
def test_a_lasting_wrong_reply_is_an_error(
    kind: str, fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake, limits=HARMLESS)
    fake.faults = [WRONG[kind]] * 1000
    with pytest.raises(AnswerError, match="the engine answered"):
        server.score(rolled, FULL)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422, 501])
def test_a_client_error_is_not_retried(
    code: int, fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake, limits=replace(HARMLESS, requests=1))
    before = len(fake.seen.bodies)
    fake.faults = [status(code)] * 1000
    with pytest.raises(ServerError, match=f"answers {code}: fault {code}"):
        server.score(rolled, FULL)
    # Requests of other responses may have been in flight.
    sent = [each["token_ids"] for each in fake.seen.bodies[before:]]
    assert all(sent.count(each) == 1 for each in sent)


def test_a_busy_server_shrinks_the_window(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake)
    window = server.window
    fake.faults = [status(503)] * 4
    server.score(rolled, TOP_12)
    assert server.window < window


def test_scoring_resumes_when_a_server_comes_back(
    teacher: HF, connect: Connect, rolled: Rollouts, exact: Scores
) -> None:
    with FakeServer(teacher.model) as first:
        server = connect(first)
        assert_equal_scores(server.score(rolled, FULL), exact)
    again = FakeServer(teacher.model, port=first.port)
    timer = start_later(0.3, again)
    assert_equal_scores(server.score(rolled, FULL), exact)
    timer.join()
    assert len(again.seen.requests) >= len(rolled.finish)
    again.__exit__()


def test_a_restart_with_another_teacher_is_rejected(
    teacher: HF, connect: Connect, rolled: Rollouts
) -> None:
    with FakeServer(teacher.model) as first:
        server = connect(first)
    with (
        FakeServer(teacher.model, port=first.port, max_model_len=99),
        pytest.raises(IdentityError, match="max_model_len is 99, and was 256"),
    ):
        server.score(rolled, TOP_12)


def test_lasting_unavailability_of_all_servers_is_an_error(
    teacher: HF, connect: Connect, rolled: Rollouts
) -> None:
    with FakeServer(teacher.model) as first:
        server = connect(first, limits=replace(QUICK, wait_s=0.1))
    with pytest.raises(ServerError, match="no server has answered for 0 s"):
        server.score(rolled, TOP_12)


def test_one_of_two_servers_may_stop(
    teacher: HF, connect: Connect, rolled: Rollouts, exact: Scores
) -> None:
    with FakeServer(teacher.model) as stays:
        with FakeServer(teacher.model) as dies:
            server = connect(stays, dies)
            assert_equal_scores(server.score(rolled, FULL), exact)
        assert_equal_scores(server.score(rolled, FULL), exact)


def test_an_interrupted_call_cancels_its_requests(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake, limits=replace(QUICK, read_s=30))
    fake.delay_s = 20
    interrupt = Interrupter(fake, len(rolled.finish))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        server.score(rolled, TOP_12)
    interrupt.join()
    server.close()
    for _ in range(200):
        if fake.seen.gone == len(rolled.finish):
            break
        interrupt.nap()
    assert fake.seen.gone == len(rolled.finish)


class Interrupter(threading.Thread):
    """Ctrl-C for the main thread, once `count` requests are in flight."""

    def __init__(self, fake: FakeServer, count: int) -> None:
        super().__init__()
        self.fake, self.count = fake, count

    def run(self) -> None:
        while self.fake.seen.in_flight < self.count:
            self.nap()
        ident = threading.main_thread().ident
        assert ident is not None
        signal.pthread_kill(ident, signal.SIGINT)

    @staticmethod
    def nap() -> None:
        time.sleep(0.01)


def start_later(after_s: float, server: FakeServer) -> threading.Timer:
    timer = threading.Timer(after_s, server.__enter__)
    timer.start()
    return timer
