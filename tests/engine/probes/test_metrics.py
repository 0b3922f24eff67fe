"""A probe measures the numbers that training logs at the same weights on the same rows."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.errors import IncompleteError
from logitcask.engine.metrics.metrics import COMMON_METRICS
from logitcask.engine.models.load import load_student
from logitcask.engine.objectives import Objective, parse_objective
from logitcask.engine.packing.batches import PlannedPacks, planned
from logitcask.engine.packing.source import Pack
from logitcask.engine.probes.metrics import probe
from logitcask.engine.store import Store
from logitcask.engine.training.metric_sampling import MetricSampling
from logitcask.engine.types import ModelRef
from tests.engine.cached import make_unit
from tests.engine.fitting import make_case, make_trainer

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
