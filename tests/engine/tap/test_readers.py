"""Readers of other trainers' answers as oracles of order, and the memory of an idle tap.

Each reader follows the rules of its project's own code. Its result has to be the same from the
teacher itself, from the tap at the first request, and from the tap's record.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.engine.tap.scripted import N_VOCAB, ScriptedTeacher, open_tap

K = 4
PROMPT = 5
"""Tokens before the response, where a reader needs that number."""
ROOT = Path(__file__).resolve().parents[3]


def trl(answer: Any, ids: list[int]) -> Any:
    """Sort each row by rank, cut it to k, and take the own log-prob by its id."""
    rows = [each or {} for each in answer["choices"][0]["prompt_logprobs"][PROMPT:]]
    best = [sorted(each.items(), key=lambda e: e[1]["rank"])[:K] for each in rows]
    own = [
        row.get(str(token), {}).get("logprob", -np.inf)
        for row, token in zip(rows, ids[PROMPT:], strict=True)
    ]
    return [[(int(i), e["logprob"]) for i, e in row] for row in best], own


def axolotl_vllm(answer: Any, ids: list[int]) -> Any:
    """Keep the first k of each row in the order of its keys; a null shifts all after the first."""
    rows = [each for each in answer["choices"][0]["prompt_logprobs"] if each is not None]
    assert len(rows) == len(ids) - 1
    return [[(int(i), e["logprob"]) for i, e in list(row.items())[:K]] for row in rows]


def axolotl_sglang(answer: Any, ids: list[int]) -> Any:
    """Read lists of [log-prob, id, text], the first null."""
    (part,) = answer
    first, *rows = part["meta_info"]["input_top_logprobs"]
    assert first is None
    assert len(rows) == len(ids) - 1
    assert {len(item) for row in rows for item in row} == {3}
    return [[(i, lp) for lp, i, _ in row[:K]] for row in rows]


def areal_vllm(answer: Any, ids: list[int]) -> Any:
    """Take the first value of each of the last rows: vLLM puts the own token first."""
    rows = answer["choices"][0]["prompt_logprobs"][PROMPT - len(ids) :]
    return [next(iter(row.values()))["logprob"] for row in rows]


def areal_sglang(answer: Any, ids: list[int]) -> Any:
    """Take the first item of each of the last rows."""
    rows = answer["meta_info"]["input_token_logprobs"][PROMPT - len(ids) :]
    return [row[0] for row in rows]


def prime_rl(answer: Any, ids: list[int]) -> Any:
    """Take the first value of each row, 0.0 for null; as many as there are tokens."""
    rows = answer["prompt_logprobs"]
    assert len(rows) == len(ids)
    return [0.0 if row is None else next(iter(row.values()))["logprob"] for row in rows]


def slime(answer: Any, ids: list[int]) -> Any:
    """Drop the first row, and take the first item of each of the last."""
    rows = answer["meta_info"]["input_token_logprobs"][1:][PROMPT - len(ids) :]
    return [row[0] for row in rows]


class Trainer(NamedTuple):
    """A trainer's request and reader."""

    path: str
    body: Callable[[list[int]], dict[str, Any]]
    read: Callable[[Any, list[int]], Any]


def sglang(ids: Any, start: int, top: int, **more: Any) -> dict[str, Any]:
    params = {"temperature": 1.0, "max_new_tokens": 0}
    fields = {"return_logprob": True, "logprob_start_len": start, "top_logprobs_num": top}
    return {"input_ids": ids, "sampling_params": params, **fields, **more}


VLLM, GENERATE, SGLANG = "/v1/completions", "/inference/v1/generate", "/generate"
TRAINERS = {
    "trl": Trainer(
        VLLM,
        lambda ids: (
            {"model": "teacher", "prompt": [ids], "max_tokens": 1, "temperature": 1.0}
            | {"prompt_logprobs": K}
        ),
        trl,
    ),
    "axolotl": Trainer(
        VLLM,
        lambda ids: {"prompt": [ids], "echo": True, "logprobs": True, "prompt_logprobs": K},
        axolotl_vllm,
    ),
    "axolotl, sglang": Trainer(
        SGLANG,
        lambda ids: sglang([ids], 0, K, echo=True, return_text_in_logprobs=True),
        axolotl_sglang,
    ),
    "areal": Trainer(
        VLLM,
        lambda ids: (
            {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1} | {"prompt_logprobs": 1}
        ),
        areal_vllm,
    ),
    "areal, sglang": Trainer(SGLANG, lambda ids: sglang(ids, PROMPT - 1, 0), areal_sglang),
    "prime-rl": Trainer(
        GENERATE,
        lambda ids: {"model": "teacher", "token_ids": ids, "sampling_params": SAMPLING},
        prime_rl,
    ),
    "slime": Trainer(SGLANG, lambda ids: sglang(ids, 0, 0), slime),
}
SAMPLING = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "prompt_logprobs": 1}


def expected(name: str, lp: np.ndarray, ids: list[int]) -> Any:
    """Return what a reader has to find, from the log-probs [L, V] alone."""
    own = [float(lp[at - 1, ids[at]]) for at in range(1, len(ids))]
    order = np.argsort(-lp, kind="stable")
    best = [[(int(i), float(lp[at, i])) for i in order[at, :K]] for at in range(len(ids) - 1)]
    if name == "trl":
        return best[PROMPT - 1 :], own[PROMPT - 1 :]
    if name == "axolotl":
        # The own token is first, so it displaces the last of the best where it is not one of them.
        firsts = [(token, value) for token, value in zip(ids[1:], own, strict=True)]
        pairs = zip(firsts, best, strict=True)
        return [[first, *(each for each in row if each[0] != first[0])][:K] for first, row in pairs]
    if name == "axolotl, sglang":
        return best
    return [0.0, *own] if name == "prime-rl" else own[PROMPT - 1 :]


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_reads_the_same_from_teacher_tap_and_record(tmp_path: Path, name: str) -> None:
    trainer, rng = TRAINERS[name], np.random.default_rng(3)

    async def body() -> None:
        with ScriptedTeacher() as teacher:
            teacher.generate = trainer.path == GENERATE
            async with open_tap(teacher.url, tmp_path, lenient=True) as tap:
                for length in (PROMPT + 1, 12, 30):
                    ids = rng.integers(0, N_VOCAB, length).tolist()
                    right = expected(name, teacher.log_probs(ids), ids)
                    sent = trainer.body(ids)
                    for source in ("new", "hit"):
                        status, data, found = await tap.post(trainer.path, sent)
                        assert (status, found) == (200, source)
                        # prime-rl validates the answer, and this key is required.
                        assert trainer.path != GENERATE or "request_id" in json.loads(data)
                        assert trainer.read(json.loads(data), ids) == right
                    if trainer.path != SGLANG:  # the scripted teacher is a vLLM
                        async with tap.http.post(teacher.url + trainer.path, json=sent) as direct:
                            assert trainer.read(await direct.json(), ids) == right

    asyncio.run(body())


def test_an_idle_tap_is_small_and_imports_no_torch(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("idle_tap.py"))
    with ScriptedTeacher() as teacher:
        done = subprocess.run(
            [sys.executable, script, teacher.url, str(tmp_path)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT / ".src"))},
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak_mb"] < 100
    assert not {"torch", "transformers"} & set(found["modules"])
