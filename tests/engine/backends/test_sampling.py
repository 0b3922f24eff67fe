"""The sampled distribution against the exact softmax, of the tiny model and of random logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.sampling import distribution, draw, sample_batch, uniforms
from logitcask.engine.errors import ModelError, PromptError
from logitcask.engine.types import (
    LENGTH,
    NO_DETAIL,
    STOP,
    Detail,
    Prompt,
    Rollouts,
    SamplingParams,
    ScoreParams,
)
from tests.engine.tiny import EOS, N_VOCAB, make_model, save_folder
from tests.models.build import make_family

HOSTILE = {
    "do_sample": True,
    "top_k": 1,
    "top_p": 0.01,
    "temperature": 0.01,
    "repetition_penalty": 9.0,
    "max_length": 3,
    "max_new_tokens": 2,
    "min_new_tokens": 40,
    "eos_token_id": list(range(3, 60)),
    "suppress_tokens": list(range(40, 80)),
    "forced_eos_token_id": 7,
    "no_repeat_ngram_size": 1,
    "num_beams": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def hf(folder: Path) -> HF:
    return HF(folder, n_vocab=N_VOCAB, stop_ids=(EOS,))


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(id=t, token_ids=tuple(ord(c) - 28 for c in t)) for t in texts]


PROMPTS = prompts("a", "12+34=", "the quick brown fox", "zz", "x" * 40)


def generate(hf: HF, which: list[Prompt] = PROMPTS, seed: int = 0, **sampling: Any) -> Rollouts:
    params = SamplingParams(**{"max_new_tokens": 24, **sampling})
    return hf.generate(which, params, seed=seed, version=0)


def assert_equal_rollouts(a: Rollouts, b: Rollouts) -> None:
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.seq_off, b.seq_off)
    np.testing.assert_array_equal(a.finish, b.finish)
    np.testing.assert_allclose(a.b_lp, b.b_lp, atol=2e-5)


def exact_distribution(logits: Tensor, seen: list[int], s: SamplingParams) -> Tensor:
    """Return float64 probabilities [V] by the definitions, one id at a time."""
    z = logits.double().clone()
    for i in set(seen):
        z[i] = z[i] * s.repetition_penalty if z[i] < 0 else z[i] / s.repetition_penalty
    z = z / s.temperature
    p = z.softmax(-1)
    best_first = sorted(range(len(p)), key=lambda i: -float(p[i]))
    if s.top_k:
        for i in best_first[s.top_k :]:
            p[i] = 0.0
        p = p / p.sum()
    mass = 0.0
    if s.top_p < 1.0:
        for i in best_first:
            if mass >= s.top_p:
                p[i] = 0.0
            mass += float(p[i])
        p = p / p.sum()
    p[p < s.min_p * p.max()] = 0.0
    return p / p.sum()


DISTRIBUTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 1.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {
        "temperature": 1.2,
        "top_k": 8,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
    },
}


@pytest.mark.parametrize("params", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_frequencies_follow_the_exact_distribution(params: dict[str, Any]) -> None:
    """Test by chi-square with at most 11 degrees of freedom: 40 is above its 1 - 4e-5 quantile."""
    sampling = SamplingParams(**params)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    seen = [2, 5, 5]
    n = 40_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ids = torch.tensor([seen])
    scores: Any = distribution(sampling)(ids, logits[None].clone())
    token, lp = draw(scores.expand(n, -1), u)
    p = exact_distribution(logits, seen, sampling)
    counts = torch.bincount(token, minlength=12).double()
    assert counts[p == 0].sum() == 0
    kept = p > 0
    chi2 = ((counts - n * p)[kept] ** 2 / (n * p[kept])).sum()
    assert chi2 < 40
    torch.testing.assert_close(lp.double(), p[token].log(), atol=1e-6, rtol=0)


def test_the_inverse_of_the_distribution_function_by_hand() -> None:
    scores = torch.tensor([[0.25, 0.0, 0.5, 0.25]], dtype=torch.float64).log().expand(6, -1)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.74, 0.75, 1 - 2**-53], dtype=torch.float64)
    token, lp = draw(scores, u)
    assert token.tolist() == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(lp.exp()[[0, 2, 4]], torch.tensor([0.25, 0.5, 0.25]).double())


@pytest.mark.parametrize("vocabulary", [511, 512, 513, 1800])
def test_ids_are_those_of_the_whole_sum_in_float64(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(400, vocabulary, generator=generator) * 3
    logits[:, ::3] = -torch.inf
    logits[:200, 512:] = -torch.inf
    u = torch.rand(400, generator=generator, dtype=torch.float64)
    u[::50], u[1::50] = 0.0, 1 - 2**-53
    token, lp = draw(logits, u)
    log_p = logits.double().log_softmax(1)
    total = log_p.exp().cumsum(1)
    at = torch.arange(400)
    # A drawn id has mass, and u lies in its interval up to the rounding of float32.
    assert bool((log_p[at, token] > -torch.inf).all())
    assert float((total[at, token] - u).min()) > -1e-6
    assert float((u - total[at, token] + log_p[at, token].exp()).min()) > -1e-6
    torch.testing.assert_close(lp.double(), log_p[at, token], atol=1e-5, rtol=0)


@pytest.mark.parametrize("params", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_b_lp_is_the_log_prob_of_the_sampled_distribution(hf: HF, params: dict[str, Any]) -> None:
    rolled = generate(hf, n=1, **params)
    sampling = SamplingParams(**params)
    for i, prompt in enumerate(rolled.prompts):
        start, end = int(rolled.seq_off[i]), int(rolled.seq_off[i + 1])
        response = rolled.tokens[start:end].tolist()
        ids = [*prompt.token_ids, *response]
        logits = hf.model(torch.tensor([ids])).logits[0].detach()
        for r in (0, 1, len(response) - 1):
            at = len(prompt.token_ids) + r
            p = exact_distribution(logits[at - 1], ids[:at], sampling)
            assert rolled.b_lp[start + r] == pytest.approx(float(p[response[r]].log()), abs=1e-5)


def test_a_hostile_generation_config_changes_nothing(hf: HF, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "hostile")
    (folder / "generation_config.json").write_text(json.dumps(HOSTILE))
    hostile = HF(folder, n_vocab=N_VOCAB, stop_ids=(EOS,))
    assert_equal_rollouts(generate(hf), generate(hostile))
    assert_equal_rollouts(generate(hf, temperature=0.0), generate(hostile, temperature=0.0))


def test_greedy_is_the_argmax_with_log_prob_zero(hf: HF) -> None:
    rolled = generate(hf, n=1, temperature=0.0)
    assert not rolled.b_lp.any()
    for i, prompt in enumerate(rolled.prompts):
        response = rolled.tokens[rolled.seq_off[i] : rolled.seq_off[i + 1]].tolist()
        ids = torch.tensor([[*prompt.token_ids, *response]])
        best = hf.model(ids).logits[0].argmax(-1)[len(prompt.token_ids) - 1 : -1]
        assert best.tolist() == response


def test_a_sequence_does_not_depend_on_its_batch(hf: HF, folder: Path) -> None:
    batched = generate(hf)
    one_by_one = HF(folder, n_vocab=N_VOCAB, stop_ids=(EOS,), batch_tokens=1)
    assert_equal_rollouts(batched, generate(one_by_one))
    backwards = generate(hf, PROMPTS[::-1])
    n = SamplingParams().n
    for i in range(len(batched.finish)):
        j = (len(PROMPTS) - 1 - i // n) * n + i % n
        a = batched.tokens[batched.seq_off[i] : batched.seq_off[i + 1]]
        b = backwards.tokens[backwards.seq_off[j] : backwards.seq_off[j + 1]]
        np.testing.assert_array_equal(a, b)


def test_seeds_samples_and_versions_differ(hf: HF) -> None:
    draws = {
        tuple(uniforms(*key, 4).tolist())
        for key in [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    }
    assert len(draws) == 5
    one = generate(hf, PROMPTS[:1], n=4)
    assert len({tuple(t) for t in np.split(one.tokens, one.seq_off[1:-1])}) == 4
    assert_equal_rollouts(one, generate(hf, PROMPTS[:1], n=4))


def test_a_shorter_response_is_the_beginning_of_a_longer_one(hf: HF) -> None:
    long, short = generate(hf, n=1, max_new_tokens=20), generate(hf, n=1, max_new_tokens=5)
    for i in range(len(PROMPTS)):
        a = long.tokens[long.seq_off[i] : long.seq_off[i + 1]][:5]
        np.testing.assert_array_equal(a, short.tokens[short.seq_off[i] : short.seq_off[i + 1]])


def test_the_stop_token_is_kept_and_nothing_follows_it(folder: Path) -> None:
    """Use a third of the ids as stop ids, so that most responses stop, at different lengths."""
    stops = set(range(3, 36))
    hf = HF(folder, n_vocab=N_VOCAB, stop_ids=stops)
    rolled = generate(hf, n=16, max_new_tokens=6)
    for i in range(len(rolled.finish)):
        response = rolled.tokens[rolled.seq_off[i] : rolled.seq_off[i + 1]].tolist()
        ends = [t in stops for t in response]
        assert not any(ends[:-1])
        assert rolled.finish[i] == (STOP if ends[-1] else LENGTH)
        assert len(response) == 6 or ends[-1]
    assert len(set(rolled.lengths().tolist())) >= 4
    assert set(rolled.finish.tolist()) == {STOP, LENGTH}
    assert (rolled.loss_mask == 1).all()
    # Stop ids do not change the tokens before them.
    without_stops = generate(HF(folder, n_vocab=N_VOCAB, stop_ids=(EOS,)), n=16, max_new_tokens=6)
    for i in range(len(rolled.finish)):
        a = rolled.tokens[rolled.seq_off[i] : rolled.seq_off[i + 1]]
        b = without_stops.tokens[without_stops.seq_off[i] : without_stops.seq_off[i + 1]]
        np.testing.assert_array_equal(a[: len(b)], b[: len(a)])


def test_padded_ids_of_the_head_are_never_sampled(tmp_path: Path) -> None:
    model = make_model(vocab_size=N_VOCAB + 29, tie=False)
    plain = HF(save_folder(tmp_path / "a", model), n_vocab=N_VOCAB, stop_ids=(EOS,))
    with torch.no_grad():
        model.lm_head.weight[N_VOCAB:] *= 1e4
    large_padding = HF(save_folder(tmp_path / "b", model), n_vocab=N_VOCAB, stop_ids=(EOS,))
    assert_equal_rollouts(generate(plain), generate(large_padding))
    assert generate(large_padding).tokens.max() < N_VOCAB


def test_a_repetition_penalty_does_not_see_padding(hf: HF, folder: Path) -> None:
    one_by_one = HF(folder, n_vocab=N_VOCAB, stop_ids=(EOS,), batch_tokens=1)
    params = {"n": 1, "repetition_penalty": 3.0, "temperature": 0.0}
    assert_equal_rollouts(generate(hf, **params), generate(one_by_one, **params))


def test_a_response_that_could_exceed_the_context_is_an_error_before_sampling(hf: HF) -> None:
    with pytest.raises(
        PromptError, match=r"'x+' has 40 tokens, and with max_new_tokens=217 .* 256"
    ):
        generate(hf, max_new_tokens=217)
    fits = generate(hf, PROMPTS[-1:], n=1, max_new_tokens=216)
    assert fits.lengths()[0] <= 216


def test_progress_counts_sequences(hf: HF) -> None:
    seen: list[tuple[Any, ...]] = []
    small = SamplingParams(n=2, max_new_tokens=4)
    rolled = hf.generate(PROMPTS, small, seed=0, version=0, progress=lambda *x: seen.append(x))
    assert seen[0] == ("rollout", 0, 10)
    assert seen[-1] == ("rollout", 10, 10, Detail(rolled.positions))


def test_progress_is_reported_within_a_batch(hf: HF) -> None:
    """Report every token of one sequence, although its batch ends only with the last."""
    seen: list[tuple[int, Detail]] = []

    def progress(stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
        seen.append((done, detail))

    endless = HF(Path(), n_vocab=N_VOCAB, stop_ids=(), network=hf.model)
    long = SamplingParams(n=1, max_new_tokens=12)
    endless.generate(PROMPTS[:1], long, seed=0, version=0, progress=progress)
    assert seen[0] == (0, NO_DETAIL)
    assert seen[1:12] == [(0, Detail(t, share=t / 12)) for t in range(1, 12)]
    assert seen[12:] == [(1, Detail(12))]


class Broken:
    """A network with NaN logits."""

    device = torch.device("cpu")
    switch = 1 << 62

    def new_cache(self) -> None: ...

    def hidden(self, ids: Tensor, *_: Any) -> Tensor:
        return torch.zeros(*ids.shape, 4)

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.full((len(hidden), 8), torch.nan)


def test_nan_logits_are_an_error() -> None:
    params = SamplingParams(max_new_tokens=2)
    with pytest.raises(ModelError, match="NaN or infinity"):
        sample_batch(Broken(), [(1,)], torch.rand(1, 2, dtype=torch.float64), params, (0,))


@pytest.mark.parametrize("name", ["phi3 longrope", "qwen3_5_text", "mamba", "gpt_oss"])
def test_log_probs_of_other_architectures_are_those_of_each_prefix(
    name: str, tmp_path: Path
) -> None:
    network = make_family(name)
    stops = tuple(range(60, 64))  # half of the responses end early
    ours = HF(tmp_path, n_vocab=N_VOCAB, stop_ids=stops, network=network)
    rolled = generate(ours, prompts("a", "bc", "x" * 50, "y" * 50, "z" * 66), n=3)
    assert 1 < rolled.lengths().min() + 1 < rolled.lengths().max() == 24
    scored = ours.score(rolled, ScoreParams(at_student=False))
    for i in range(0, len(rolled.seq_prompt), 2):
        prompt = rolled.prompts[int(rolled.seq_prompt[i])].token_ids
        start, end = map(int, rolled.seq_off[i : i + 2])
        for row in {start, (start + end) // 2, end - 1}:
            ids = torch.tensor([[*prompt, *rolled.tokens[start:row].tolist()]])
            with torch.no_grad():
                exact = network(input_ids=ids).logits[0, -1, :N_VOCAB].log_softmax(-1)
            expected = float(exact[int(rolled.tokens[row])])
            assert rolled.b_lp[row] == pytest.approx(expected, abs=1e-4)
            assert scored.lp[row] == pytest.approx(expected, abs=1e-4)


def test_a_model_whose_cache_is_wrong_is_refused_before_sampling(tmp_path: Path) -> None:
    network = make_family("rwkv")
    ours = HF(tmp_path, n_vocab=N_VOCAB, stop_ids=(EOS,), network=network)
    with pytest.raises(ModelError, match="not right in sampling: cached sampling gives"):
        generate(ours)
