"""vLLM's scores against those of hf, of the same weights in float32."""

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
from logitcask.engine.errors import AnswerError, ConfigError, IdentityError, ModelError
from logitcask.engine.types import ModelRef, Prompt, Rollouts, SamplingParams, ScoreParams, Scores
from tests.engine.tiny import N_VOCAB, make_model, save_folder
from tests.vllm.scored import ASK, TOP, rolled, teacher
from tests.vllm.shim import with_shim

ROOT = Path(__file__).resolve().parent.parent.parent
SHORT = SamplingParams(n=1, max_new_tokens=1)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Rollouts:
    return rolled(tmp_path_factory.mktemp("student"))


def check_told(told: Scores, true: Scores) -> None:
    """Log-probs to 1e-5; what was not told lies between its bounds."""
    np.testing.assert_allclose(told.lp, true.lp, **CLOSE)
    np.testing.assert_array_equal(told.cnt, true.cnt)
    np.testing.assert_array_equal(told.ids, true.ids)
    np.testing.assert_allclose(told.entry_lp, true.entry_lp, **CLOSE)
    assert told.entropy_hi is not None
    assert (told.entropy <= true.entropy + 1e-4).all()
    assert (true.entropy <= told.entropy_hi + 1e-4).all()
    clear = true.log_tail > np.log(100 * RESOLVED)
    assert clear.any()
    np.testing.assert_allclose(told.log_tail[clear], true.log_tail[clear], atol=0.02)


def same(ours: Scores, theirs: Scores) -> None:
    for field in dataclasses.fields(Scores):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        assert (a is None) == (b is None), field.name
        if a is not None and a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, **CLOSE, err_msg=field.name)
        elif a is not None:
            np.testing.assert_array_equal(a, b, err_msg=field.name)


@pytest.mark.parametrize("batch_tokens", [16384, 64])
def test_its_own_top_is_that_of_hf(
    vllm: VLLM, hf: HF, rollouts: Rollouts, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "batch_tokens", batch_tokens)
    check_told(vllm.score(rollouts, TOP), hf.score(rollouts, TOP))


def test_all_ids_leave_nothing_open(vllm: VLLM, hf: HF, rollouts: Rollouts) -> None:
    all_ids = ScoreParams(top_p=1.0, k_min=N_VOCAB, k_max=N_VOCAB, at_student=False)
    told, true = vllm.score(rollouts, all_ids), hf.score(rollouts, all_ids)
    np.testing.assert_allclose(told.entropy, true.entropy, **CLOSE)
    np.testing.assert_allclose(told.entropy_hi, true.entropy, **CLOSE)
    assert (told.log_tail == -np.inf).all()


def test_the_older_runner_is_not_asked_at_ids(vllm: VLLM, rollouts: Rollouts) -> None:
    assert vllm.capabilities == {"top", "entropy", "tail", "bounds"}
    with pytest.raises(ConfigError, match=r"V1 runner does not support at_ids"):
        vllm.score(rollouts, ASK)
    drawn = ScoreParams(entry_kind="sampled", draws=4, at_student=False)
    with pytest.raises(ConfigError, match="does not support drawn"):
        vllm.score(rollouts, drawn)


def test_the_newer_runner_answers_at_ids(
    ref: ModelRef, hf: HF, rollouts: Rollouts, tmp_path: Path
) -> None:
    env = with_shim(tmp_path)
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(ROOT)])
    out = tmp_path / "scores.npz"
    command = [sys.executable, "-m", "tests.vllm.scored", str(ref.path), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    with np.load(out) as arrays:
        told = Scores(**arrays)
    true = hf.score(rollouts, ASK)
    check_told(told, true)
    assert told.at_lp is not None
    assert 0 < len(told.at_lp) == len(true.at_lp)
    np.testing.assert_allclose(told.at_lp, true.at_lp, **CLOSE)


@pytest.mark.parametrize(
    "request_", [TOP, ASK, ScoreParams(entry_kind="sampled", draws=5, seed=3, at_student=False)]
)
def test_exact_scores_are_those_of_hf(
    exact: VLLM, hf: HF, rollouts: Rollouts, request_: ScoreParams
) -> None:
    assert exact.capabilities == hf.capabilities - {"logits"}
    same(exact.score(rollouts, request_), hf.score(rollouts, request_))


def test_an_untied_head_is_found_and_a_wrong_one_is_caught(
    tmp_path: Path, rollouts: Rollouts
) -> None:
    untied = teacher(str(save_folder(tmp_path, make_model(hidden=64, tie=False, seed=3))))
    backend, hf = VLLM(untied, exact=True), HF(untied)
    same(backend.score(rollouts, ASK), hf.score(rollouts, ASK))
    net = backend.net
    assert net is not None
    ids = backend._probe()
    told = backend._probe_logprobs(backend.engine("score"), ids)
    net.check(ids, told)
    net.weight = net.weight + 1e-3 * torch.randn(net.weight.shape, generator=torch.manual_seed(0))
    with pytest.raises(ModelError, match="nats from the log-probs of vLLM"):
        net.check(ids, told)
    backend.close()


def test_an_answer_that_no_model_can_give_is_refused(
    vllm: VLLM, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm.score(rollouts, TOP)
    engine = vllm.engine("score")
    true = engine._generate

    def lying(change: Any) -> Any:
        def ask(*args: Any, **same: Any) -> Any:
            outs = true(*args, **same)
            change(outs[0].prompt_logprobs)
            return outs

        return ask

    def short(flat: Any) -> None:
        flat.token_ids.pop()

    def other(flat: Any) -> None:
        flat.token_ids[0] += 1

    def likely(flat: Any) -> None:
        flat.logprobs[-1] = 0.5

    for change, what in ((short, "log-probs for"), (other, "other tokens"), (likely, "0.5")):
        monkeypatch.setattr(engine, "_generate", lying(change))
        with pytest.raises(AnswerError, match=what):
            vllm.score(rollouts, TOP)


def test_what_is_too_long_or_foreign_is_refused(vllm: VLLM, exact: VLLM, hf: HF) -> None:
    def one(prompt: list[int]) -> Rollouts:
        made = hf.generate([Prompt(id="0", token_ids=(3,))], SHORT, seed=0, version=0)
        return dataclasses.replace(made, prompts=(Prompt(id="0", token_ids=tuple(prompt)),))

    longest = one([5] * 255)
    with pytest.raises(ModelError, match="context: 255"):
        vllm.score(longest, TOP)
    same(exact.score(longest, TOP), hf.score(longest, TOP))
    with pytest.raises(ModelError, match="context: 256"):
        exact.score(one([5] * 256), TOP)
    with pytest.raises(IdentityError, match="hold the id 99"):
        vllm.score(one([N_VOCAB]), TOP)


def test_describe_says_what_is_at_work(vllm: VLLM, exact: VLLM) -> None:
    import vllm as library

    told = vllm.describe()
    assert told["name"] == "vllm"
    assert (told["dtype"], told["device"], told["runner"]) == ("float32", "cpu", "V1")
    assert (told["vllm"], told["torch"]) == (library.__version__, torch.__version__)
    assert told["scoring"] == "told log-probs"
    assert exact.describe()["scoring"] == "hidden states"
