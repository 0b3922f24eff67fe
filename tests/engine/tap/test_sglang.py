"""A tap before an SGLang server: it records what it records before vLLM, and answers every form."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from logitcask.engine.store import open_store
from tests.engine.backends.server.fake_sglang import SGLangForm
from tests.engine.tap.scripted import Client, ScriptedTeacher, open_tap
from tests.engine.tap.test_proxy import IDS, SEQUENCES

K = 8
GENERATE = {"model": "teacher", "token_ids": IDS}
GENERATE |= {"sampling_params": {"max_tokens": 1, "prompt_logprobs": K}}
NATIVE = {"input_ids": IDS, "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": K}
NATIVE |= {"sampling_params": {"max_new_tokens": 0, "temperature": 1.0}}


class ScriptedSGLang(SGLangForm, ScriptedTeacher):
    """The scripted teacher in SGLang's form."""

    def _reply(self, body: dict[str, Any], ids: list[Any], sampling: dict[str, Any]) -> Any:
        self.heat = sampling.get("temperature", 1.0) if self.heats else 1.0
        return super()._reply(body, ids, sampling)


async def answers(tap: Client) -> list[Any]:
    """Return the answers to the three forms; ranks as far as a record of K log-probs knows them."""
    found: list[Any] = []
    for path, body in [
        (
            "/v1/completions",
            {"model": "teacher", "prompt": IDS, "max_tokens": 1, "prompt_logprobs": K},
        ),
        ("/inference/v1/generate", GENERATE),
        ("/generate", NATIVE),
    ]:
        status, data, source = await tap.post(path, body)
        assert (status, source) == (200, "hit"), path
        answer = json.loads(data)
        rows = answer.get("prompt_logprobs") or answer.get("choices", [{}])[0].get(
            "prompt_logprobs", []
        )
        for entry in [each for row in rows[1:] for each in row.values()]:
            entry["rank"] = min(entry["rank"], 17)
        found.append(rows or answer["meta_info"])
    return found


def read_store(path: Path, kind: type[ScriptedTeacher]) -> dict[tuple[int, ...], Any]:
    """Return {ids of a sequence: its scores}: they are stored in the order of their arrival."""
    store, found = open_store(path), {}
    snapshot = store.head()
    (name,) = snapshot.names("score")
    (base,) = snapshot.rollouts("tap")
    segments = snapshot.scores(name)[base.seg_id]
    engine = segments[0].provenance["backend"]["engine"]
    assert engine == ("sglang 0.5.23" if kind is ScriptedSGLang else "vllm 0.32.0")
    rollouts = store.read_rollouts(base)
    scores = store.read_scores(segments, base=rollouts)
    off = np.concatenate([[0], np.cumsum(scores.cnt, dtype=np.int64)])
    for number, prompt in enumerate(rollouts.prompts):
        rows = slice(*(int(each) for each in rollouts.seq_off[number : number + 2]))
        kept = slice(int(off[rows.start]), int(off[rows.stop]))
        ids = (*prompt.token_ids, *rollouts.tokens[rows].tolist())
        arrays = [scores.lp, scores.cnt, scores.log_tail, scores.entropy, scores.entropy_hi]
        arrays = [array[rows] for array in arrays if array is not None]
        arrays += [scores.ids[kept], scores.entry_lp[kept]]
        found[ids] = [array.tolist() for array in arrays]
    return found


@pytest.mark.parametrize("is_flat", [True, False])
def test_records_and_answers_are_those_before_vllm(tmp_path: Path, is_flat: bool) -> None:
    async def body() -> None:
        found, stored = [], []
        for kind in (ScriptedTeacher, ScriptedSGLang):
            folder = tmp_path / kind.__name__
            with kind() as teacher:
                teacher.is_flat = is_flat
                async with open_tap(teacher.url, folder) as tap:
                    assert (await tap.complete(SEQUENCES))[2] == "new"
                    sent = len(teacher.seen.requests)
                    found.append(await answers(tap))
                    assert len(teacher.seen.requests) == sent
                    direct = teacher._reply({**NATIVE}, IDS, {"max_new_tokens": 0})
                async with open_tap(teacher.url, folder) as tap:
                    assert await answers(tap) == found[-1]
            async with open_tap(teacher.url, folder) as tap:
                assert await answers(tap) == found[-1], "the teacher is off"
                assert (await tap.complete([1, 2, 3]))[0] == 503
            stored.append(read_store(folder / "store", kind))
        assert found[0] == found[1]
        for key in ("input_token_logprobs", "input_top_logprobs"):
            assert direct["meta_info"][key] == found[1][2][key], "the last was SGLang's"
        assert len(stored[0]) == len(SEQUENCES)
        assert stored[0] == stored[1]

    asyncio.run(body())


def test_what_is_unsound_is_not_recorded(tmp_path: Path) -> None:
    async def without_own(_: Any, __: web.Request, reply: dict[str, Any]) -> None:
        reply["meta_info"]["input_token_logprobs"].pop()

    async def body() -> None:
        with ScriptedSGLang() as teacher:
            teacher.heats = True
            async with open_tap(teacher.url, tmp_path) as tap:
                teacher.faults = [without_own]
                status, data, _ = await tap.complete(IDS)
                assert (status, b"an invalid answer of the teacher" in data) == (502, True)
                sampling = {"max_new_tokens": 0, "temperature": 0.7}
                changed = NATIVE | {"sampling_params": sampling}
                status, data, source = await tap.post("/generate", changed)
                assert (status, source) == (200, "")
                assert json.loads(data) == teacher._reply(changed, IDS, sampling)
                chosen = NATIVE | {"token_ids_logprob": [1, 2]}
                assert (await tap.post("/generate", chosen))[::2] == (200, "")
                counts = await tap.counts()
                assert counts["sequences"] == 0
                assert set(counts["passed"]) == {
                    "/generate: a temperature that changes this server's log-probs",
                    "/generate: field token_ids_logprob",
                }
                assert (await tap.complete(IDS))[::2] == (200, "new")
                before = counts["teacher"]
                teacher.weight_version, teacher.seed = "step-2", 1
                await tap.tap.recorder.check()
                assert (await tap.counts())["teacher"] != before
                assert (await tap.complete(IDS))[2] == "new"

    asyncio.run(body())
