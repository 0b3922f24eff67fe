"""Scores of vLLM against those of hf, with the same weights in float32."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.returned import RESOLVED
from logitcask.engine.backends.vllm.backend import VLLM
from logitcask.engine.backends.vllm.engine import probe_ids
from logitcask.engine.errors import AnswerError, ConfigError, IdentityError, ModelError
from logitcask.engine.score.positions import chosen_rows, score_positions
from logitcask.engine.store.format.rows import scores_at
from logitcask.engine.types import (
    ModelRef,
    Prompt,
    Rollouts,
    SamplingParams,
    ScoreParams,
    Scores,
    no_progress,
)
from tests.engine.tiny import N_VOCAB, make_model, save_folder
from tests.vllm.real_server import ids_of_each_row
from tests.vllm.scored import TOP, WITH_STUDENT_IDS, rolled, teacher
from tests.vllm.shim import with_shim

ROOT = Path(__file__).resolve().parent.parent.parent
SHORT = SamplingParams(n=1, max_new_tokens=1)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Rollouts:
    return rolled(tmp_path_factory.mktemp("student"))


def assert_close_scores(found: Scores, exact_scores: Scores) -> None:
    """Check log-probs to 1e-5, and that the exact entropy lies within its bounds."""
    np.testing.assert_allclose(found.lp, exact_scores.lp, **CLOSE)
    np.testing.assert_array_equal(found.cnt, exact_scores.cnt)
    np.testing.assert_array_equal(found.ids, exact_scores.ids)
    np.testing.assert_allclose(found.entry_lp, exact_scores.entry_lp, **CLOSE)
    assert found.entropy_hi is not None
    assert (found.entropy <= exact_scores.entropy + 1e-4).all()
    assert (exact_scores.entropy <= found.entropy_hi + 1e-4).all()
    clear = exact_scores.log_tail > np.log(100 * RESOLVED)
    assert clear.any()
    np.testing.assert_allclose(found.log_tail[clear], exact_scores.log_tail[clear], atol=0.02)


def assert_equal_scores(found: Scores, expected: Scores) -> None:
    for field in dataclasses.fields(Scores):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert (a is None) == (b is None), field.name
        if a is not None and a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, **CLOSE, err_msg=field.name)
        elif a is not None:
            np.testing.assert_array_equal(a, b, err_msg=field.name)


@pytest.mark.parametrize("batch_tokens", [16384, 64])
def test_the_topk_equals_that_of_hf(
    vllm: VLLM, hf: HF, rollouts: Rollouts, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "batch_tokens", batch_tokens)
    assert_close_scores(vllm.score(rollouts, TOP), hf.score(rollouts, TOP))


def test_full_scores_have_an_exact_entropy(vllm: VLLM, hf: HF, rollouts: Rollouts) -> None:
    all_ids = ScoreParams(top_p=1.0, k_min=N_VOCAB, k_max=N_VOCAB, at_student=False)
    found, exact_scores = vllm.score(rollouts, all_ids), hf.score(rollouts, all_ids)
    np.testing.assert_allclose(found.entropy, exact_scores.entropy, **CLOSE)
    np.testing.assert_allclose(found.entropy_hi, exact_scores.entropy, **CLOSE)
    assert (found.log_tail == -np.inf).all()


def test_the_older_runner_does_not_support_extra_ids(vllm: VLLM, rollouts: Rollouts) -> None:
    assert vllm.capabilities == {"top", "entropy", "tail", "bounds"}
    with pytest.raises(ConfigError, match=r"V1 runner does not support at_ids"):
        vllm.score(rollouts, WITH_STUDENT_IDS)
    drawn = ScoreParams(entry_kind="sampled", draws=4, at_student=False)
    with pytest.raises(ConfigError, match="does not support drawn"):
        vllm.score(rollouts, drawn)


@ids_of_each_row
def test_the_newer_runner_scores_extra_ids(
    ref: ModelRef, hf: HF, rollouts: Rollouts, tmp_path: Path
) -> None:
    env = with_shim(tmp_path)
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(ROOT)])
    out = tmp_path / "scores.npz"
    command = [sys.executable, "-m", "tests.vllm.scored", str(ref.path), str(out)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    with np.load(out) as arrays:
        found = Scores(**arrays)
    exact_scores = hf.score(rollouts, WITH_STUDENT_IDS)
    assert_close_scores(found, exact_scores)
    assert found.at_lp is not None
    assert 0 < len(found.at_lp) == len(exact_scores.at_lp)
    np.testing.assert_allclose(found.at_lp, exact_scores.at_lp, **CLOSE)


@pytest.mark.parametrize(
    "request_",
    [TOP, WITH_STUDENT_IDS, ScoreParams(entry_kind="sampled", draws=5, seed=3, at_student=False)],
)
def test_exact_scores_equal_those_of_hf(
    exact: VLLM, hf: HF, rollouts: Rollouts, request_: ScoreParams
) -> None:
    assert exact.capabilities == hf.capabilities - {"logits", "rows"}
    assert_equal_scores(exact.score(rollouts, request_), hf.score(rollouts, request_))


@pytest.mark.parametrize("positions", ["first:2", "every:3"])
def test_scores_of_some_positions_are_those_of_all(
    exact: VLLM, rollouts: Rollouts, positions: str
) -> None:
    rows = chosen_rows(rollouts, positions)
    found = score_positions(exact, rollouts, TOP, rows, no_progress)
    assert_equal_scores(found, scores_at(exact.score(rollouts, TOP), rows, None))


def test_an_untied_head_is_read_and_a_wrong_one_is_an_error(
    tmp_path: Path, rollouts: Rollouts
) -> None:
    untied = teacher(str(save_folder(tmp_path, make_model(hidden=64, tie=False, seed=3))))
    backend, hf = VLLM(untied, exact=True), HF(untied)
    assert_equal_scores(
        backend.score(rollouts, WITH_STUDENT_IDS), hf.score(rollouts, WITH_STUDENT_IDS)
    )
    net = backend.net
    assert net is not None
    ids = probe_ids(backend.n_vocab, backend.context)
    found = backend._probe_logprobs(backend.engine("score"), ids)
    net.check(ids, found)
    net.weight = net.weight + 1e-3 * torch.randn(net.weight.shape, generator=torch.manual_seed(0))
    with pytest.raises(ModelError, match="nats from the log-probs of vLLM"):
        net.check(ids, found)
    backend.close()


def test_an_impossible_output_is_an_error(
    vllm: VLLM, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm.score(rollouts, TOP)
    engine = vllm.engine("score")
    original = engine._generate

    def with_change(change: Any) -> Any:
        def generate(*args: Any, **kwargs: Any) -> Any:
            outputs = original(*args, **kwargs)
            change(outputs[0].prompt_logprobs)
            return outputs

        return generate

    def drop_id(flat: Any) -> None:
        flat.token_ids.pop()

    def change_id(flat: Any) -> None:
        flat.token_ids[0] += 1

    def raise_logprob(flat: Any) -> None:
        flat.logprobs[-1] = 0.5

    for change, cause in (
        (drop_id, "log-probs for"),
        (change_id, "other tokens"),
        (raise_logprob, "0.5"),
    ):
        monkeypatch.setattr(engine, "_generate", with_change(change))
        with pytest.raises(AnswerError, match=cause):
            vllm.score(rollouts, TOP)


def test_too_long_sequences_and_unknown_ids_are_an_error(vllm: VLLM, exact: VLLM, hf: HF) -> None:
    def one(prompt: list[int]) -> Rollouts:
        sampled = hf.generate([Prompt(id="0", token_ids=(3,))], SHORT, seed=0, version=0)
        return dataclasses.replace(sampled, prompts=(Prompt(id="0", token_ids=tuple(prompt)),))

    longest = one([5] * 255)
    with pytest.raises(ModelError, match="context: 255"):
        vllm.score(longest, TOP)
    assert_equal_scores(exact.score(longest, TOP), hf.score(longest, TOP))
    with pytest.raises(ModelError, match="context: 256"):
        exact.score(one([5] * 256), TOP)
    with pytest.raises(IdentityError, match="hold the id 99"):
        vllm.score(one([N_VOCAB]), TOP)


def test_describe_names_versions_and_runner(vllm: VLLM, exact: VLLM) -> None:
    import vllm as library

    found = vllm.describe()
    assert found["name"] == "vllm"
    assert (found["dtype"], found["device"], found["runner"]) == ("float32", "cpu", "V1")
    assert (found["vllm"], found["torch"]) == (library.__version__, torch.__version__)
    assert found["scoring"] == "told log-probs"
    assert exact.describe()["scoring"] == "hidden states"
