"""R11: whatever a server does wrong ends as a retry that succeeds with the right scores, or as a
refusal with its reason. Every kind of fault several times, at drawn places.
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

ASK = ScoreParams(top_p=1.0, k_min=12, k_max=12)
WIDE = ScoreParams(top_p=1.0, k_min=64, k_max=64)
Connect = Callable[..., ServerScorer]
Said = dict[str, Any]
HARMLESS = replace(QUICK, read_s=0.25)


def status(code: int, **headers: str) -> Fault:
    async def answer(server: FakeServer, request: web.Request, said: Said) -> web.Response:
        body = {"error": {"message": f"fault {code}"}}
        return web.json_response(body, status=code, headers=headers)

    return answer


async def reset(server: FakeServer, request: web.Request, said: Said) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def reset_in_the_body(
    server: FakeServer, request: web.Request, said: Said
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "100000"})
    await response.prepare(request)
    await response.write(json.dumps(said).encode()[:100])
    assert request.transport is not None
    request.transport.abort()
    return response


async def truncated(server: FakeServer, request: web.Request, said: Said) -> web.StreamResponse:
    text = json.dumps(said)
    return web.Response(text=text[: len(text) // 2], content_type="application/json")


async def stalled(server: FakeServer, request: web.Request, said: Said) -> None:
    await asyncio.sleep(2)


async def endless(server: FakeServer, request: web.Request, said: Said) -> web.StreamResponse:
    return web.Response(body=b" " * (1 << 22), content_type="application/json")


def spoil(change: Callable[[list[Any], Said], None]) -> Fault:
    """Changes positions of an answer, which are dicts from id to entry."""

    async def answer(server: FakeServer, request: web.Request, said: Said) -> None:
        change(said["prompt_logprobs"], said)

    return answer


def last_row(best: list[Any]) -> list[dict[str, Any]]:
    return list(best[-1].values())


def nan(best: list[Any], said: Said) -> None:
    last_row(best)[0]["logprob"] = float("nan")


def infinite(best: list[Any], said: Said) -> None:
    last_row(best)[0]["logprob"] = float("inf")


def positive(best: list[Any], said: Said) -> None:
    last_row(best)[0]["logprob"] = 0.1


def raised(best: list[Any], said: Said) -> None:
    for row in best[1:]:
        for entry in row.values():
            entry["logprob"] += 0.1


def shorter(best: list[Any], said: Said) -> None:
    del best[-1]


def empty_rows(best: list[Any], said: Said) -> None:
    best[1:] = [{} for _ in best[1:]]


def other_ids(best: list[Any], said: Said) -> None:
    best[-1] = {str(int(k) + 100): v for k, v in best[-1].items()}


def words_for_ids(best: list[Any], said: Said) -> None:
    best[-1] = {f"token_id:{k}": v for k, v in best[-1].items()}


def shifted(best: list[Any], said: Said) -> None:
    best[1:] = [best[-1], *best[1:-1]]


def aborted(best: list[Any], said: Said) -> None:
    said["choices"][0]["finish_reason"] = "abort"


def wrong_model(best: list[Any], said: Said) -> None:
    said["model"] = "another"


def without_asked(best: list[Any], said: Said) -> None:
    said["prompt_token_id_logprobs"] = None


def asked_of_another_shape(best: list[Any], said: Said) -> None:
    said["prompt_token_id_logprobs"] = packed(np.zeros((2, 2)))


def asked_not_a_number(best: list[Any], said: Said) -> None:
    said["prompt_token_id_logprobs"] = packed(np.full((len(best) - 1, 7), np.nan))


def asked_shifted(best: list[Any], said: Said) -> None:
    """Values of other ids contradict the best ids of these rows."""
    array = np.load(io.BytesIO(base64.b64decode(said["prompt_token_id_logprobs"])))
    said["prompt_token_id_logprobs"] = packed(np.roll(array, 1, axis=1))


TRANSIENT: dict[str, Fault] = {
    "500": status(500),
    "429 with a pause": status(429, **{"Retry-After": "0"}),
    "503": status(503),
    "reset": reset,
    "reset in the body": reset_in_the_body,
    "truncated": truncated,
    "stalled": stalled,
    "too many bytes": endless,
}
WRONG: dict[str, Fault] = {
    each.__name__: spoil(each)
    for each in (
        *(nan, infinite, positive, raised, shorter, empty_rows, other_ids, words_for_ids),
        *(shifted, aborted, wrong_model, without_asked, asked_of_another_shape),
        *(asked_not_a_number, asked_shifted),
    )
}


def same(found: Scores, exact: Scores) -> None:
    np.testing.assert_array_equal(found.ids, exact.ids)
    for name in ("lp", "entry_lp", "at_lp"):
        np.testing.assert_allclose(getattr(found, name), getattr(exact, name), atol=1e-5)


@pytest.fixture(scope="module")
def exact(teacher: HF, rolled: Rollouts) -> Scores:
    return teacher.score(rolled, WIDE)


@pytest.mark.parametrize("kind", [*TRANSIENT, *WRONG])
def test_a_fault_is_mended_by_asking_again(
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
        quiet = rng.randrange(len(rolled.finish))
        fake.faults = [_none] * quiet + [fault]
        same(server.score(rolled, WIDE), exact)
        assert not fake.faults


async def _none(server: FakeServer, request: web.Request, said: Said) -> None:
    return None


@pytest.mark.parametrize("kind", [k for k in TRANSIENT if k != "stalled"])
def test_a_fault_that_stays_is_a_refusal_with_its_reason(
    kind: str, fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake, limits=replace(HARMLESS, attempts=3, wait_s=0.1))
    fake.faults = [TRANSIENT[kind]] * 1000
    with pytest.raises((ServerError, AnswerError)) as caught:
        server.score(rolled, WIDE)
    assert "prompt " in caught.value.cause
    assert caught.value.hint


@pytest.mark.parametrize("kind", list(WRONG))
def test_an_answer_that_stays_wrong_is_never_scores(
    kind: str, fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake, limits=HARMLESS)
    fake.faults = [WRONG[kind]] * 1000
    with pytest.raises(AnswerError, match="the engine answered"):
        server.score(rolled, WIDE)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422, 501])
def test_a_refusal_is_never_asked_again(
    code: int, fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake, limits=replace(HARMLESS, requests=1))
    before = len(fake.seen.bodies)
    fake.faults = [status(code)] * 1000
    with pytest.raises(ServerError, match=f"answers {code}: fault {code}"):
        server.score(rolled, WIDE)
    # Others may have been on their way.
    asked = [each["token_ids"] for each in fake.seen.bodies[before:]]
    assert all(asked.count(each) == 1 for each in asked)


def test_a_busy_server_is_asked_less_at_once(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake)
    window = server.window
    fake.faults = [status(503)] * 4
    server.score(rolled, ASK)
    assert server.window < window


def test_the_run_goes_on_when_a_server_comes_back(
    teacher: HF, connect: Connect, rolled: Rollouts, exact: Scores
) -> None:
    with FakeServer(teacher.model) as first:
        server = connect(first)
        same(server.score(rolled, WIDE), exact)
    again = FakeServer(teacher.model, port=first.port)
    timer = _later(0.3, again)
    same(server.score(rolled, WIDE), exact)
    timer.join()
    assert len(again.seen.requests) >= len(rolled.finish)
    again.__exit__()


def test_another_teacher_that_comes_back_is_refused(
    teacher: HF, connect: Connect, rolled: Rollouts
) -> None:
    with FakeServer(teacher.model) as first:
        server = connect(first)
    with (
        FakeServer(teacher.model, port=first.port, max_model_len=99),
        pytest.raises(IdentityError, match="max_model_len is 99, and was 256"),
    ):
        server.score(rolled, ASK)


def test_servers_that_stay_away_end_the_run(
    teacher: HF, connect: Connect, rolled: Rollouts
) -> None:
    with FakeServer(teacher.model) as first:
        server = connect(first, limits=replace(QUICK, wait_s=0.1))
    with pytest.raises(ServerError, match="no server has answered for 0 s"):
        server.score(rolled, ASK)


def test_one_of_two_servers_may_die(
    teacher: HF, connect: Connect, rolled: Rollouts, exact: Scores
) -> None:
    with FakeServer(teacher.model) as stays:
        with FakeServer(teacher.model) as dies:
            server = connect(stays, dies)
            same(server.score(rolled, WIDE), exact)
        same(server.score(rolled, WIDE), exact)


def test_an_interrupted_caller_leaves_no_request_behind(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake, limits=replace(QUICK, read_s=30))
    fake.delay_s = 20
    interrupt = _Interrupt(fake, len(rolled.finish))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        server.score(rolled, ASK)
    interrupt.join()
    server.close()
    for _ in range(200):
        if fake.seen.gone == len(rolled.finish):
            break
        interrupt.nap()
    assert fake.seen.gone == len(rolled.finish)


class _Interrupt(threading.Thread):
    """Ctrl-C for the main thread, once so many requests are in flight."""

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


def _later(after_s: float, server: FakeServer) -> threading.Timer:
    timer = threading.Timer(after_s, server.__enter__)
    timer.start()
    return timer
