"""A probe measures the numbers that training logs at the same weights on the same rows."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.engine.errors import IncompleteError
from logitcask.engine.metrics.metrics import COMMON_METRICS
from logitcask.engine.models.identity import model_ref
from logitcask.engine.models.load import load_student
from logitcask.engine.objectives import Objective, parse_objective
from logitcask.engine.packing.batches import PlannedPacks, planned
from logitcask.engine.packing.source import Pack
from logitcask.engine.probes import full_kl
from logitcask.engine.probes.metrics import measure, probe
from logitcask.engine.store import Store
from logitcask.engine.training.metric_sampling import MetricSampling
from logitcask.engine.types import ModelRef
from tests.engine.cached import make_unit
from tests.engine.fitting import make_case, make_trainer
from tests.engine.tiny import make_model, save_folder

LENGTHS = [9, 4, 0, 7, 2, 8]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, ModelRef]:
    units = [make_unit(seed, vocab=99, lengths=LENGTHS) for seed in range(2)]
    return make_case(tmp_path_factory.mktemp("case"), units)


def rows_of(store: Store) -> PlannedPacks:
    return planned(store, snapshot=store.head(), rollouts="main", teacher="big", pack_length=40)


@pytest.mark.parametrize("name", ["overlap", "forward_kl", "sampled_token", "opd", "opd_released"])
def test_numbers_equal_those_of_a_training_step(
    case: tuple[Store, ModelRef], tmp_path: Path, name: str
) -> None:
    """Compare with one update over all rows, which logs loss and metrics before its step."""
    store, model = case
    rows, objective = (
        rows_of(store),
        parse_objective(name, k=None if name == "sampled_token" else 4),
    )
    trainer, _ = make_trainer(
        load_student(model),
        rows,
        tmp_path / "run",
        objective=objective.objective,
        accumulation=len(rows),
    )
    trainer._sampling = MetricSampling(fraction=1.0, steps=1, updates=1)
    trainer.train()
    logged: dict[str, Any] = trainer.state.log_history[0]
    (every, alone) = probe(
        load_student(model), rows_of(store), objectives={name: objective.objective}, n_vocab=99
    )
    assert (every.rows, every.start, every.end) == (2 * sum(LENGTHS), 0, max(LENGTHS))
    assert alone == every
    # The Trainer rounds the printed loss; the metrics are sums of the same numbers.
    assert every.means[f"loss/{name}"] == pytest.approx(logged["loss"], abs=1e-4)
    for metric in COMMON_METRICS:
        assert every.means[metric] == pytest.approx(logged[metric], rel=1e-5, abs=1e-7), metric


def test_metrics_do_not_depend_on_which_losses_are_shown(case: tuple[Store, ModelRef]) -> None:
    store, model = case
    objectives: dict[str, Objective] = {
        name: parse_objective(name, k=4).objective for name in ("teacher_topk", "forward_kl")
    }
    bare, both = (
        probe(load_student(model), rows_of(store), objectives=each, n_vocab=99)[0].means
        for each in ({}, objectives)
    )
    assert set(both) - set(bare) == {"loss/teacher_topk", "loss/forward_kl"}
    assert all(bare[name] == pytest.approx(both[name], rel=1e-6) for name in COMMON_METRICS)


def test_spans_of_one_token_have_the_loss_of_the_sampled_token(
    case: tuple[Store, ModelRef],
) -> None:
    store, model = case
    names = ("span_advantage", "sampled_token")
    objectives = {name: parse_objective(name).objective for name in names}
    means = probe(load_student(model), rows_of(store), objectives=objectives, n_vocab=99)[0].means
    assert means["loss/span_advantage"] == pytest.approx(means["loss/sampled_token"], rel=1e-6)
    assert means["span/one_to_one"] == 1


@pytest.mark.parametrize("bins", [1, 3, 12])
def test_bins_are_means_of_their_rows_and_together_all(
    case: tuple[Store, ModelRef], bins: int
) -> None:
    store, model = case
    every, *parts = probe(load_student(model), rows_of(store), objectives={}, n_vocab=99, bins=bins)
    assert len(parts) == bins
    assert [p.start for p in parts[1:]] == [p.end for p in parts[:-1]]
    per_row = np.concatenate([np.arange(n) for n in LENGTHS * 2])
    assert [p.rows for p in parts] == [
        int(((p.start <= per_row) & (per_row < p.end)).sum()) for p in parts
    ]
    for name in COMMON_METRICS:
        pairs = [(p.rows, p.means[name]) for p in parts if p.rows]
        total = math.fsum(n * mean for n, mean in pairs if mean is not None)
        assert total / every.rows == pytest.approx(every.means[name], rel=1e-9, abs=1e-12)
        assert all(p.means[name] is None for p in parts if not p.rows)


def test_the_kl_over_the_vocabulary_is_that_of_whole_logits_in_float64(
    case: tuple[Store, ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare with forward passes of single sequences; the bounds are of other scores there."""
    store, model = case
    save_folder(tmp_path / "teacher", make_model(seed=5))
    teacher = load_student(model_ref(str(tmp_path / "teacher"), chat_template=True))
    student, packs = load_student(model), rows_of(store)
    found = []
    for chunk in (full_kl.CHUNK_LOGITS, 99 * 7):  # 7 rows at a time
        monkeypatch.setattr(full_kl, "CHUNK_LOGITS", chunk)
        measured = measure(
            *(student, packs, range(len(packs))),
            objectives={},
            n_vocab=99,
            device="cpu",
            teacher=teacher,
        )
        found.append([measured.sums[f"kl/{name}"][0] for name in ("forward", "reverse")])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    # The student that sampled is the same model, so the KL is that of its own numbers.
    same = measure(
        *(student, packs, range(1)), objectives={}, n_vocab=99, device="cpu", teacher=student
    )
    assert np.abs(same.sums["kl/forward"][0]).max() < 1e-12
    pack, at = packs.pack(0), 0
    for number, length in enumerate(pack.lengths):
        ids = pack.input_ids[:, at : at + length]
        in_it = (pack.predict_at >= at) & (pack.predict_at < at + length)
        rows = pack.predict_at[in_it] - at
        with torch.no_grad():
            log_p, log_q = (
                each(input_ids=ids).logits[0, rows].double().log_softmax(-1)
                for each in (student, teacher)
            )
        of = np.flatnonzero(measured.sequence[: len(pack.targets)] == number)
        assert len(of) == len(rows)
        for values, (a, b) in zip(found[0], ((log_q, log_p), (log_p, log_q)), strict=True):
            expected = (a.exp() * (a - b)).sum(-1)
            np.testing.assert_allclose(values[of], expected, rtol=2e-5, atol=1e-7)
        at += length


class Masked:
    """Packs without a counted row."""

    def __init__(self, rows: PlannedPacks) -> None:
        self.rows, self.prefetch = rows, rows.prefetch

    def __len__(self) -> int:
        return len(self.rows)

    def pack(self, index: int) -> Pack:
        row = self.rows.pack(index)
        row.targets.weight.zero_()
        return row


def test_rows_that_are_masked_are_not_measured(case: tuple[Store, ModelRef]) -> None:
    store, model = case
    rows: Any = Masked(rows_of(store))
    with pytest.raises(IncompleteError, match="no row of these rollouts is counted"):
        probe(load_student(model), rows, objectives={}, n_vocab=99)


def test_metrics_of_the_released_code_are_pooled_over_rows(case: tuple[Store, ModelRef]) -> None:
    """Compare its masses with Eq.9-10 over the rows that have an overlap, in every bin."""
    store, model = case
    every, *parts = probe(load_student(model), rows_of(store), objectives={}, n_vocab=99, bins=3)
    assert 0 < (every.means["overlap/empty_share"] or 0) < 1
    for each in (every, *parts):
        share = 1 - (each.means["overlap/empty_share"] or 0)
        for side in ("student", "teacher"):
            mass, released = (each.means[f"overlap/mass_{side}{s}"] for s in ("", "_released"))
            assert mass is not None
            assert released == (pytest.approx(mass / share) if share else None)
