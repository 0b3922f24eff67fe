"""A tap before a scripted teacher: what it answers, keeps, passes on and refuses."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from logitcask.engine.errors import ConfigError, IdentityError, ServerError
from logitcask.engine.store import open_store
from tests.engine.backends.server.fake_server import FakeServer
from tests.engine.cached import make_store, make_unit
from tests.engine.tap.scripted import N_VOCAB, ScriptedTeacher, open_tap, rows_of

RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(0, N_VOCAB, int(n)).tolist() for n in RNG.integers(4, 40, 10)]
IDS = SEQUENCES[0]


def request_of(ids: Any, **changes: Any) -> dict[str, Any]:
    body = {"model": "teacher", "prompt": ids, "max_tokens": 1, "prompt_logprobs": 8} | changes
    return {key: value for key, value in body.items() if value != "absent"}


def test_answers_are_those_of_the_server_at_first_again_restarted_and_without_it(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        with ScriptedTeacher() as teacher:
            direct = json.dumps(
                teacher._reply(request_of(SEQUENCES), SEQUENCES, {"prompt_logprobs": 8})
            ).encode()
            async with open_tap(teacher.url, tmp_path) as tap:
                status, first, source = await tap.complete(SEQUENCES)
                assert (status, source) == (200, "new")
                for number in range(len(SEQUENCES)):
                    assert rows_of(first, number) == rows_of(direct, number)
                sent = len(teacher.seen.requests)
                assert await tap.complete(SEQUENCES) == (200, first, "hit")
                for k in (0, 1, 3, 8, 16):
                    status, data, source = await tap.complete(IDS, k)
                    assert source == "hit"
                    expected = teacher._reply({"prompt": IDS}, IDS, {"prompt_logprobs": k})
                    assert rows_of(data) == rows_of(json.dumps(expected).encode())
                assert len(teacher.seen.requests) == sent
                assert (await tap.complete(IDS, 17))[2] == "new"
                assert (await tap.complete(IDS, 16))[2] == "hit"
            async with open_tap(teacher.url, tmp_path) as tap:
                sent = len(teacher.posts)
                assert await tap.complete(SEQUENCES) == (200, first, "hit")
                assert len(teacher.posts) == sent
        async with open_tap(teacher.url, tmp_path) as tap:
            assert await tap.complete(SEQUENCES) == (200, first, "hit")
            assert (await tap.complete([1, 2, 3]))[0] == 503
            async with tap.http.get(f"{tap.url}/v1/models") as response:
                assert (await response.json())["data"][0]["id"] == "teacher"
            async with tap.http.get(f"{tap.url}/health") as response:
                assert response.status == 200

    asyncio.run(body())


PASSED = [
    ({"prompt_logprobs": "absent"}, "no prompt_logprobs"),
    ({"max_tokens": 5}, "max_tokens of 5"),
    ({"max_tokens": "absent"}, "max_tokens of 16"),
    ({"max_tokens": True}, "max_tokens of True"),
    ({"n": 2}, "n"),
    ({"stream": True}, "stream"),
    ({"echo": True}, "field echo"),
    ({"logprobs": 1}, "field logprobs"),
    ({"allowed_token_ids": [1]}, "field allowed_token_ids"),
    ({"prompt_logprob_token_ids": [1]}, "field prompt_logprob_token_ids"),
    ({"model": "other"}, "another model"),
    ({"model": 7}, "model that is no text"),
    ({"prompt": "hello"}, "no list of token ids"),
    ({"prompt": []}, "no list of token ids"),
    ({"prompt": [5]}, "a sequence without a position"),
    ({"prompt": [1, True, 2, 3]}, "ids that are no token ids"),
    ({"prompt": [1, -1, 2, 3]}, "ids that are no token ids"),
    ({"prompt": [1, 1.5, 2, 3]}, "ids that are no token ids"),
    ({"prompt": [1, N_VOCAB]}, "an id that the tokenizer lacks"),
    ({"prompt_logprobs": -1}, "prompt_logprobs of -1"),
    ({"prompt_logprobs": N_VOCAB + 1}, "more log-probs than ids"),
    ({"temperature": "1"}, "temperature that is no number"),
]
"""Changes of a request, and the reason that is counted."""


def test_any_other_request_passes_unchanged_and_unrecorded(tmp_path: Path) -> None:
    async def answer(
        server: FakeServer, request: web.Request, reply: dict[str, Any]
    ) -> web.StreamResponse:
        return web.Response(status=418, body=b"exactly \0 this", headers={"X-Own": "kept"})

    async def body() -> None:
        with ScriptedTeacher() as teacher:
            async with open_tap(teacher.url, tmp_path) as tap:
                teacher._reply = lambda *_: {}  # type: ignore[method-assign]
                for changes, _ in PASSED:
                    teacher.faults = [answer]
                    sent = json.dumps(request_of(IDS, **changes)).encode()
                    found = await tap.post("/v1/completions", sent)
                    assert found == (418, b"exactly \0 this", ""), changes
                    assert teacher.posts[-1] == ("/v1/completions", sent)
                teacher.faults = [answer]
                assert (await tap.post("/v1/completions", b"{"))[0] == 500  # its own
                counts = await tap.counts()
                reasons = Counter(f"/v1/completions: {reason}" for _, reason in PASSED)
                assert counts["passed"] == reasons | {"/v1/completions: no JSON": 1}
                assert counts["sequences"] == 0

    asyncio.run(body())


def test_a_server_whose_log_probs_depend_on_the_temperature(tmp_path: Path) -> None:
    async def body() -> None:
        with ScriptedTeacher() as teacher:
            teacher.heats = True
            async with open_tap(teacher.url, tmp_path) as tap:
                assert (await tap.complete(IDS, temperature=2.0))[2] == ""
                assert (await tap.complete(IDS, temperature=1.0))[2] == "new"
                assert (await tap.complete(IDS, temperature=0.0))[2] == "hit"

    asyncio.run(body())


async def _status(server: FakeServer, request: web.Request, reply: dict[str, Any]) -> Any:
    return web.json_response({"error": {"message": "boom"}}, status=500)


async def _reset(server: FakeServer, request: web.Request, reply: dict[str, Any]) -> Any:
    assert request.transport is not None
    request.transport.abort()


def _rows(change: Any) -> Any:
    async def fault(server: FakeServer, request: web.Request, reply: dict[str, Any]) -> Any:
        change(reply["choices"][0]["prompt_logprobs"])

    return fault


def _first_entry(rows: list[Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(iter(rows[2].values()))
    return entry


def _text(data: bytes) -> Any:
    async def fault(server: FakeServer, request: web.Request, reply: dict[str, Any]) -> Any:
        return web.Response(body=data, content_type="application/json")

    return fault


FAULTS = {
    "500": (500, _status),
    "connection reset": (503, _reset),
    "no JSON": (502, _text(b'{"choices": [')),
    "other JSON": (502, _text(b"[1]")),
    "empty": (502, _text(b"")),
    "a position too few": (502, _rows(lambda rows: rows.pop())),
    "a position too many": (502, _rows(lambda rows: rows.append(rows[-1]))),
    "positions shifted": (502, _rows(lambda rows: rows.insert(1, rows.pop()))),
    "one position empty": (502, _rows(lambda rows: rows.__setitem__(2, None))),
    "NaN": (502, _rows(lambda rows: _first_entry(rows).update(logprob=float("nan")))),
    "above 0": (502, _rows(lambda rows: _first_entry(rows).update(logprob=0.7))),
    "an id too few": (502, _rows(lambda rows: [rows[2].popitem() for _ in range(3)])),
}


@pytest.mark.parametrize("name", FAULTS)
def test_no_fault_of_the_server_is_ever_recorded(tmp_path: Path, name: str) -> None:
    """Meet each of 12 faults 20 times: the next answer is right, and no wrong one was kept."""
    status, fault = FAULTS[name]

    async def body() -> None:
        with ScriptedTeacher() as teacher:
            async with open_tap(teacher.url, tmp_path) as tap:
                for number in range(20):
                    ids = [*range(3, 9), number]
                    teacher.faults = [fault]
                    assert (await tap.complete(ids))[0] == status
                    assert not teacher.faults
                    expected = teacher._reply({"prompt": ids}, ids, {"prompt_logprobs": 8})
                    for source in ("new", "hit"):
                        found = await tap.complete(ids)
                        assert (found[0], found[2]) == (200, source)
                        assert rows_of(found[1]) == rows_of(json.dumps(expected).encode())
                assert (await tap.counts())["sequences"] == 20

    asyncio.run(body())


def test_one_request_serves_clients_that_send_it_at_once_and_those_that_leave(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        with ScriptedTeacher() as teacher:
            async with open_tap(teacher.url, tmp_path) as tap:
                sent, teacher.delay_s = len(teacher.posts), 0.3
                found = await asyncio.gather(*(tap.complete(IDS) for _ in range(20)))
                assert Counter(each[2] for each in found) == {"new": 1, "joined": 19}
                assert len({each[1] for each in found}) == 1
                assert len(teacher.posts) == sent + 1
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(tap.complete(SEQUENCES[1]), 0.1)
                again = [(await tap.complete(SEQUENCES[1]))[2] for _ in range(2)]
                assert again[0] in ("joined", "hit")
                assert again[1] == "hit"
                gone = teacher.seen.gone
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(tap.complete(SEQUENCES[2], n=2), 0.1)
                while teacher.seen.gone == gone:  # until the limit of a test
                    await asyncio.sleep(0.01)
                assert teacher.seen.gone == gone + 1

    asyncio.run(body())


def test_keys_are_required_of_hits_and_stored_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITCASK_API_KEY", "own-secret")

    async def body() -> None:
        with ScriptedTeacher(key="own-secret") as teacher:
            async with open_tap(teacher.url, tmp_path) as tap:
                sent, path = request_of(IDS), "/v1/completions"
                right = {"Authorization": "Bearer own-secret"}
                assert (await tap.post(path, sent, Authorization="Bearer bad-key"))[0] == 401
                assert (await tap.post(path, sent, **right))[2] == "new"
                assert (await tap.post(path, sent, **right))[2] == "hit"
                assert (await tap.post(path, sent, Authorization="Bearer bad-key"))[0] == 401
                assert (await tap.post(path, sent))[0] == 401
                shown = [*tap.events, json.dumps(await tap.counts())]
            assert not any("secret" in each or "bad-key" in each for each in shown)
        async with open_tap(teacher.url, tmp_path) as tap:
            assert (await tap.post(path, sent))[0] == 503
            assert (await tap.post(path, sent, **right))[2] == "hit"
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(files) > 5
        assert not any(b"secret" in path.read_bytes() for path in files)

    asyncio.run(body())


@pytest.mark.parametrize("point", ["before", "after", "both", "restart", "sealing"])
def test_another_teacher_is_never_recorded_under_the_name_of_the_first(
    tmp_path: Path, point: str
) -> None:
    """Replace the teacher before, after, and between records and their check."""
    first, second = SEQUENCES[:5], SEQUENCES[5:]

    async def body() -> None:
        with ScriptedTeacher() as teacher:
            async with open_tap(teacher.url, tmp_path, check_seconds=1e6) as tap:
                if point != "before":
                    await tap.complete(first)
                if point in ("after", "sealing"):
                    await tap.tap.recorder.check()
                if point != "restart":
                    teacher.seed = 1
                if point == "both":
                    # Answers of two teachers since the last check.
                    await tap.complete(second)
                if point == "sealing":
                    await tap.tap.recorder.seal()
                elif point != "restart":
                    await tap.tap.recorder.check()
                    await tap.complete(second)
                else:
                    await tap.tap.recorder.check()
                    await tap.complete(second)
                    tap.tap.recorder._checked_s = 1e12
                    # Killed: not sealed, not checked.
                    tap.tap.recorder.close = _release(tap.tap)  # type: ignore[method-assign]
            if point == "restart":
                teacher.seed = 1
                async with open_tap(teacher.url, tmp_path) as tap:
                    assert (await tap.complete(second))[2] == "new"
        store = open_store(tmp_path / "store")
        check_store(store, {0, 1}, {"before": [1], "sealing": [0]}.get(point))

    asyncio.run(body())


def _release(tap: Any) -> Any:
    async def close() -> None:
        import os

        await asyncio.to_thread(tap.recorder._probe.close)
        os.close(tap.recorder._lock)

    return close


def check_store(store: Any, seeds: set[int], expected: list[int] | None = None) -> None:
    """Compare all scores with the only teacher that gave scores of this name."""
    snapshot, found = store.head(), []
    for name in snapshot.names("score"):
        own = set()
        for base in snapshot.rollouts("tap"):
            segments = snapshot.scores(name).get(base.seg_id)
            if segments is None:
                continue
            rollouts = store.read_rollouts(base)
            scores = store.read_scores(segments, base=rollouts)
            for number, prompt in enumerate(rollouts.prompts):
                rows = slice(*(int(each) for each in rollouts.seq_off[number : number + 2]))
                tokens, first = rollouts.tokens[rows].tolist(), len(prompt.token_ids)
                ids = [*prompt.token_ids, *tokens]
                for seed in seeds:
                    lp = ScriptedTeacher(seed).log_probs(ids)[first - 1 : -1]
                    if np.array_equal(lp[np.arange(len(tokens)), tokens], scores.lp[rows]):
                        own.add(seed)
                        break
                else:
                    raise AssertionError(f"scores of no teacher under {name}")
        assert len(own) == 1, name
        found += own
    assert len(set(found)) == len(found)
    if expected is not None:
        assert found == expected


def test_a_request_that_may_change_the_teacher_ends_its_name(tmp_path: Path) -> None:
    async def body() -> None:
        with ScriptedTeacher() as teacher:
            async with open_tap(teacher.url, tmp_path) as tap:
                await tap.complete(IDS)
                before = (await tap.counts())["teacher"]
                assert (await tap.post("/update_weights", {}))[0] == 404
                assert (await tap.counts())["teacher"] == before

                async def accept(*_: Any) -> Any:
                    return web.Response(body=b"done", status=200)

                teacher._refused = lambda _: None  # type: ignore[method-assign]
                assert (await tap.post("/tokenize", {"prompt": "x"}))[0] == 404
                tap.tap.upstream.forward = accept  # type: ignore[method-assign]
                assert (await tap.post("/update_weights", {}))[:2] == (200, b"done")
                # The scripted teacher is the same, and counts as another one.
                assert (await tap.complete(IDS))[2] == "new"
                after = (await tap.counts())["teacher"]
                assert after != before
            async with open_tap(teacher.url, tmp_path) as tap:
                assert (await tap.complete(IDS))[2] == "hit"
                assert (await tap.counts())["teacher"] == after

    asyncio.run(body())


def test_the_store_has_the_exact_scores_and_says_what_is_unknown(tmp_path: Path) -> None:
    async def body() -> None:
        with ScriptedTeacher() as teacher:
            async with open_tap(teacher.url, tmp_path) as tap:
                await tap.complete(SEQUENCES[0])
                sent = request_of(SEQUENCES[1])
                await tap.post("/v1/completions", sent, **{"X-Logitcask-Start": "3"})
                marker = SEQUENCES[2][1]
                await tap.post(f"/after={marker}/v1/completions", request_of(SEQUENCES[2]))
                await tap.complete(SEQUENCES[0], 20)
            store = open_store(tmp_path / "store")
            check_store(store, {0}, [0])
            snapshot = store.head()
            found = {}
            for segment in snapshot.rollouts("tap"):
                assert segment.layout == "plain"
                assert segment.provenance["imported"]["behavior"] is False
                rollouts = store.read_rollouts(segment)
                assert np.isnan(rollouts.b_lp).all()
                for number, prompt in enumerate(rollouts.prompts):
                    rows = slice(*(int(e) for e in rollouts.seq_off[number : number + 2]))
                    ids = [*prompt.token_ids, *rollouts.tokens[rows].tolist()]
                    found[tuple(ids)] = len(prompt.token_ids), rollouts.loss_mask[rows].tolist()
            last = len(SEQUENCES[2]) - SEQUENCES[2][::-1].index(marker)
            assert found == {
                tuple(SEQUENCES[0]): (1, [0] * (len(SEQUENCES[0]) - 1)),
                tuple(SEQUENCES[1]): (3, [1] * (len(SEQUENCES[1]) - 3)),
                tuple(SEQUENCES[2]): (last, [1] * (len(SEQUENCES[2]) - last)),
            }
            # A crash between the commit and the renaming: the same file commits nothing new.
            answers = tmp_path / "store-answers"
            (sealed,) = answers.glob("*/*.sealed")
            sealed.rename(sealed.with_suffix(".wal"))
            records = len(store.head().rollouts("tap"))
            async with open_tap(teacher.url, tmp_path) as tap:
                assert (await tap.complete(SEQUENCES[0]))[2] == "hit"
            assert len(open_store(tmp_path / "store").head().rollouts("tap")) == records
            assert [each.suffix for each in answers.glob("*/0*")] == [".sealed"]

    asyncio.run(body())


def test_faults_of_the_start_are_typed(tmp_path: Path) -> None:
    async def start(url: str, **settings: Any) -> None:
        async with open_tap(url, tmp_path, **settings):
            pass

    with pytest.raises(ServerError, match="none is recorded"):
        asyncio.run(start("http://127.0.0.1:9"))
    with pytest.raises(ConfigError, match="not a server's URL"):
        asyncio.run(start("teacher"))
    with ScriptedTeacher() as teacher:

        async def twice() -> None:
            async with open_tap(teacher.url, tmp_path):
                await start(teacher.url)

        with pytest.raises(ConfigError, match="another tap uses"):
            asyncio.run(twice())
        teacher.max_logprobs = 4
        with pytest.raises(ConfigError, match="--topk"):
            asyncio.run(start(teacher.url))
        teacher.max_logprobs = 128
        (tmp_path / "named").mkdir()
        make_store(tmp_path / "named" / "store", [make_unit(0)])

        async def with_name() -> None:
            async with open_tap(teacher.url, tmp_path / "named", rollouts="main"):
                pass

        with pytest.raises(IdentityError, match="main"):
            asyncio.run(with_name())
