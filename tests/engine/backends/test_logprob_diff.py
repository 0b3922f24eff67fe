"""Fingerprints of models, differences of log-probs, and bounded tolerances."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.logprob_diff import (
    compare_scores,
    fingerprint,
    probe_request,
    probe_rollouts,
    select_sequences,
    self_consistency,
    take_rows,
    tolerance,
)
from logitcask.engine.errors import IdentityError
from logitcask.engine.models.fingerprint import (
    MAX_SPREAD,
    MIN_TOLERANCE,
    SPREAD_FACTOR,
    ModelFingerprint,
    fingerprint_distance,
    fingerprint_of,
)
from logitcask.engine.models.identity import canonical
from logitcask.engine.types import Prompt, Rollouts, SamplingParams, ScoreParams, Scores
from tests.engine.tiny import EOS, N_VOCAB, make_model, save_folder

REQUEST = ScoreParams(entry_kind="topk", top_p=1.0, k_min=8, k_max=8, at_student=False)


def load(folder: Path, model: Any = None, dtype: str = "float32") -> HF:
    return HF(save_folder(folder, model), n_vocab=N_VOCAB, stop_ids=(EOS,), dtype=dtype)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> HF:
    return load(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def rolled(teacher: HF) -> Rollouts:
    prompts = [Prompt(id=str(i), token_ids=tuple(range(5, 9 + i))) for i in range(5)]
    return teacher.generate(prompts, SamplingParams(n=2, max_new_tokens=12), seed=3, version=0)


class BatchDependent:
    """A scorer whose log-probs depend on the size of the batch."""

    capabilities = frozenset({"top", "entropy", "tail"})

    def __init__(self, inner: HF, by: float) -> None:
        self.inner, self.by = inner, by

    def score(self, rollouts: Rollouts, request: ScoreParams, at: Any = None, **_: Any) -> Scores:
        scores = self.inner.score(rollouts, request, at)
        off = np.float32(self.by if len(rollouts.finish) > 5 else 0.0)
        return replace(scores, lp=scores.lp - off, entry_lp=scores.entry_lp - off)

    def describe(self) -> dict[str, str]:
        return {"name": "shaky"}


def with_noise(sigma: float) -> Callable[[], Any]:
    def make() -> Any:
        model = make_model()
        torch.manual_seed(7)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(sigma * torch.randn_like(weight))
        return model

    return make


def test_a_fingerprint_round_trips_and_is_reproducible(teacher: HF, tmp_path: Path) -> None:
    original = fingerprint(teacher, N_VOCAB)
    canonical(original.record())
    assert fingerprint_distance(original, fingerprint_of(original.record())) < 1e-6
    reloaded = load(tmp_path / "again")
    reloaded.batch_tokens = 8
    assert fingerprint_distance(original, fingerprint(reloaded, N_VOCAB)) < 1e-6


@pytest.mark.parametrize("make", [lambda: make_model(seed=1), with_noise(0.003), with_noise(0.05)])
def test_other_weights_differ_by_more_than_the_floor(
    make: Callable[[], Any], teacher: HF, tmp_path: Path
) -> None:
    other = fingerprint(load(tmp_path, make()), N_VOCAB)
    assert fingerprint_distance(fingerprint(teacher, N_VOCAB), other) > 10 * MIN_TOLERANCE


def test_a_temperature_changes_the_fingerprint(teacher: HF) -> None:
    original = fingerprint(teacher, N_VOCAB)
    at_temperature = replace(original, lp=original.lp * 0.9)
    assert fingerprint_distance(original, at_temperature) > 10 * MIN_TOLERANCE


def test_an_id_missing_in_one_counts_by_the_last_id_of_that_one() -> None:
    a = ModelFingerprint(ids=np.array([[1, 2]]), lp=np.log([[0.5, 0.3]]))
    b = ModelFingerprint(ids=np.array([[1, 3]]), lp=np.log([[0.5, 0.1]]))
    assert fingerprint_distance(a, b) == pytest.approx(np.log(3))
    rare = ModelFingerprint(ids=np.array([[1, 2]]), lp=np.log([[0.5, 5e-5]]))
    other = ModelFingerprint(ids=np.array([[1, 9]]), lp=np.log([[0.5, 1e-6]]))
    assert fingerprint_distance(rare, other) == 0.0


def test_self_consistency_compares_every_row_with_itself(teacher: HF, rolled: Rollouts) -> None:
    found = self_consistency(teacher, rolled, REQUEST)
    assert found.largest < 1e-5
    assert found.same_best == 1.0
    assert found.compared > 8 * rolled.positions / 2
    unsteady = self_consistency(BatchDependent(teacher, 0.02), rolled, REQUEST)
    assert unsteady.largest == pytest.approx(0.02, rel=1e-3)


def test_selected_sequences_have_the_scores_of_the_full_rollouts(
    teacher: HF, rolled: Rollouts
) -> None:
    all_scores = teacher.score(rolled, REQUEST)
    order = [7, 0, 3]
    part = teacher.score(select_sequences(rolled, order), REQUEST)
    rows = np.concatenate([np.arange(rolled.seq_off[i], rolled.seq_off[i + 1]) for i in order])
    np.testing.assert_allclose(part.lp, all_scores.lp[rows], atol=1e-5)


def test_take_rows_keeps_full_sequences(rolled: Rollouts) -> None:
    assert take_rows(rolled, int(rolled.seq_off[3])).lengths().tolist() == list(
        rolled.lengths()[:3]
    )
    assert len(take_rows(rolled, int(rolled.seq_off[3]) - 1).finish) == 2
    assert len(take_rows(rolled, 1).finish) == 1
    assert take_rows(rolled, 10**9).positions == rolled.positions


def test_compare_finds_shifted_rows(teacher: HF, rolled: Rollouts) -> None:
    once = teacher.score(rolled, REQUEST)
    shifted = replace(once, ids=np.roll(once.ids, 8), entry_lp=np.roll(once.entry_lp, 8))
    assert compare_scores(once, shifted).largest > 0.1
    assert compare_scores(once, shifted).same_best < 0.9


def test_the_tolerance_follows_self_consistency_within_bounds() -> None:
    assert tolerance(0.0) == MIN_TOLERANCE
    assert tolerance(0.02) == pytest.approx(SPREAD_FACTOR * 0.02)
    with pytest.raises(IdentityError, match="differs from itself by 0.2 nats"):
        tolerance(2 * MAX_SPREAD)


def test_the_probe_fits_any_vocabulary() -> None:
    for n_vocab in (3, 99, 151_936):
        probe, request = probe_rollouts(n_vocab, 3), probe_request(n_vocab)
        assert int(probe.tokens.max()) < n_vocab
        assert probe.positions == 48
        assert request.k_max <= n_vocab
