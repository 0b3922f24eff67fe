"""Rollouts of vLLM: their log-probs equal those computed from the logits of hf."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.sampling import distribution
from logitcask.engine.backends.scoring import row_logits
from logitcask.engine.backends.vllm.backend import VLLM
from logitcask.engine.errors import ConfigError, ModelError, PromptError
from logitcask.engine.models.identity import model_ref
from logitcask.engine.types import LENGTH, STOP, Array, ModelRef, Prompt, Rollouts, SamplingParams
from tests.engine.tiny import EOS, N_VOCAB, make_model, save_folder

PROMPTS = [
    Prompt(id=str(i), token_ids=tuple(range(3, 3 + length))) for i, length in enumerate((1, 30, 8))
]
STOPS = (EOS, 20, 30, 40)


def generate(vllm: VLLM, which: list[Prompt] = PROMPTS, seed: int = 0, **sampling: Any) -> Rollouts:
    params = SamplingParams(**{"n": 2, "max_new_tokens": 12, **sampling})
    return vllm.generate(which, params, seed=seed, version=0)


def exact_logprobs(hf: HF, rolled: Rollouts, sampling: SamplingParams) -> Array:
    """Return log-probs [P] of the sampled tokens under the distribution of backends.sampling."""
    lp = np.zeros(rolled.positions, np.float64)
    sequence_of_row = np.repeat(np.arange(len(rolled.seq_prompt)), rolled.lengths())
    for rows, logits in row_logits(hf, rolled, batch_tokens=4096):
        for row, scores in zip(rows, logits, strict=True):
            i, token = int(sequence_of_row[row]), int(rolled.tokens[row])
            prompt = rolled.prompts[int(rolled.seq_prompt[i])].token_ids
            seen = [*prompt, *rolled.tokens[rolled.seq_off[i] : row].tolist()]
            expected = distribution(sampling)(torch.tensor([seen]), scores[None].clone())
            lp[row] = expected[0].double().log_softmax(-1)[token]
    return lp


def test_progress_counts_finished_sequences(vllm: VLLM) -> None:
    seen: list[tuple[int, int]] = []
    vllm.generate(
        PROMPTS,
        SamplingParams(n=2, max_new_tokens=12),
        seed=0,
        version=0,
        progress=lambda _, done, total, *__: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {6}
    assert seen[0] == (0, 6)
    assert seen[-1] == (6, 6)
    assert len(set(seen)) > 2, "within the batch too"


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.3},
        {"top_p": 0.8},
        {"top_k": 5},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
        {"temperature": 1.2, "top_k": 9, "min_p": 0.1},
    ],
    ids=str,
)
def test_b_lp_is_the_log_prob_of_the_sampled_distribution(
    vllm: VLLM, hf: HF, sampling: dict[str, Any]
) -> None:
    rolled = generate(vllm, **sampling)
    np.testing.assert_allclose(
        rolled.b_lp, exact_logprobs(hf, rolled, SamplingParams(**sampling)), atol=1e-5, rtol=1e-5
    )


def test_frequencies_follow_the_distribution(vllm: VLLM, hf: HF) -> None:
    prompt, n = PROMPTS[2], 2000
    rolled = generate(vllm, [prompt], n=n, max_new_tokens=1)
    one = dataclasses.replace(rolled, tokens=rolled.tokens[:1], seq_off=rolled.seq_off[:2])
    one = dataclasses.replace(one, seq_prompt=one.seq_prompt[:1])
    (_, logits), *_ = row_logits(hf, one, batch_tokens=4096)
    p = logits[0].double().softmax(-1).numpy()
    common = p * n >= 5
    seen = np.bincount(rolled.tokens, minlength=N_VOCAB)
    chi2 = float(((seen - n * p) ** 2 / (n * p))[common].sum())
    free = int(common.sum())
    # Chi-square has mean `free` and standard deviation sqrt(2 free); allow five of them.
    assert chi2 < free + 5 * (2 * free) ** 0.5


def test_a_sequence_does_not_depend_on_its_neighbours(vllm: VLLM) -> None:
    batched = generate(vllm, n=3)
    again = generate(vllm, n=3)
    np.testing.assert_array_equal(batched.tokens, again.tokens)
    alone = generate(vllm, PROMPTS[1:2], n=2)
    start = int(batched.seq_off[3])
    np.testing.assert_array_equal(alone.tokens, batched.tokens[start : start + alone.positions])
    assert not np.array_equal(alone.tokens, generate(vllm, PROMPTS[1:2], n=2, seed=1).tokens)
    first, second = np.split(alone.tokens, [int(alone.seq_off[1])])
    assert first.tolist() != second.tolist()


def test_greedy_equals_greedy_of_hf(vllm: VLLM, hf: HF) -> None:
    sampling = SamplingParams(n=1, temperature=0.0, max_new_tokens=16, repetition_penalty=1.3)
    from_vllm = vllm.generate(PROMPTS, sampling, seed=0, version=0)
    from_hf = hf.generate(PROMPTS, sampling, seed=0, version=0)
    np.testing.assert_array_equal(from_vllm.tokens, from_hf.tokens)
    np.testing.assert_array_equal(from_vllm.seq_off, from_hf.seq_off)
    assert (from_vllm.b_lp == 0.0).all()


def test_only_stop_ids_stop_and_are_kept(ref: ModelRef, vllm: VLLM) -> None:
    backend = VLLM(dataclasses.replace(ref, stop_ids=STOPS[1:]))
    backend.engines = vllm.engines
    rolled = generate(backend, n=8, max_new_tokens=30, temperature=1.5)
    finishes = set()
    for i, finish in enumerate(rolled.finish):
        ids = rolled.tokens[rolled.seq_off[i] : rolled.seq_off[i + 1]].tolist()
        assert not set(ids[:-1]) & set(STOPS[1:])
        assert (ids[-1] in STOPS[1:]) == (finish == STOP)
        assert finish == STOP or len(ids) == 30
        finishes.add(int(finish))
    assert finishes == {STOP, LENGTH}
    assert EOS in rolled.tokens, "the EOS of the model does not stop unless it is a stop id"


def test_ids_of_a_padded_head_are_never_sampled(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, make_model(hidden=64, vocab_size=N_VOCAB + 61))
    ref = model_ref(str(folder), chat_template=True)
    backend = VLLM(ref)
    hf = HF(ref)
    for sampling in ({"temperature": 2.0}, {"temperature": 0.0}):
        rolled = generate(backend, n=6, max_new_tokens=30, **sampling)
        assert rolled.tokens.max() < N_VOCAB
        if sampling["temperature"]:
            expected = exact_logprobs(hf, rolled, SamplingParams(**sampling))
            np.testing.assert_allclose(rolled.b_lp, expected, atol=1e-5, rtol=1e-5)
    backend.close()


def test_a_distribution_that_vllm_changes_is_an_error(vllm: VLLM) -> None:
    with pytest.raises(ConfigError, match="min-p first"):
        generate(vllm, min_p=0.1, top_p=0.9)
    with pytest.raises(ConfigError, match="0.01 or more"):
        generate(vllm, temperature=0.001)


def test_too_long_responses_and_models_without_weights_are_an_error(
    ref: ModelRef, vllm: VLLM, tmp_path: Path
) -> None:
    with pytest.raises(PromptError, match="context of 256"):
        generate(vllm, max_new_tokens=240)
    # A folder without weights.
    (tmp_path / "config.json").write_text((ref.path / "config.json").read_text())
    with pytest.raises(ModelError, match="cannot open"):
        generate(VLLM(dataclasses.replace(ref, path=tmp_path)))
