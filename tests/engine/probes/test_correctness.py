"""Measures of correct and incorrect responses: means of their rows, errors over prompts."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.commands.probe import run_correctness_probe, run_position_probe
from logitcask.engine.config.probes import CorrectnessProbeConfig, PositionProbeConfig
from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.exchange.positions import positions
from logitcask.engine.probes.correctness import split
from logitcask.engine.probes.positions import MEASURES
from logitcask.engine.store import Store
from tests.engine.cached import GRADED_LENGTHS, make_graded_unit, make_store, make_unit


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    units = [make_graded_unit(seed) for seed in range(2)]
    return make_store(tmp_path_factory.mktemp("store") / "s", units)


def config(store: Store, **settings: Any) -> CorrectnessProbeConfig:
    return CorrectnessProbeConfig.model_validate(
        {"store": {"url": str(store.url)}, "correctness": settings}
    )


def test_means_are_those_of_the_rows_of_each_group(store: Store, tmp_path: Path) -> None:
    figure = tmp_path / "correctness.svg"
    report = run_correctness_probe(config(store, correct_from=0.5), figure)
    assert figure.read_text().startswith("<?xml")
    rows = [r for r in positions(store, rollouts="main", teacher="big") if r["loss_mask"]]
    groups = [[r for r in rows if (r["reward"] >= 0.5) == kind] for kind in (True, False)]
    assert (report.correct_rows, report.incorrect_rows) == tuple(map(len, groups))
    counts = tuple(len({r["sequence"] for r in group}) for group in groups)
    assert (report.correct, report.incorrect) == counts
    for group, rows_of in zip(("correct", "incorrect"), groups, strict=True):
        gap = np.array([r["teacher_logprob"] - r["student_logprob"] for r in rows_of])
        expected = {
            "token/advantage": gap.mean(),
            "token/advantage_size": np.abs(gap).mean(),
            "token/negative_share": (gap < 0).mean(),
            "token/disagree_share": np.mean([r["teacher_ids"][0] != r["token"] for r in rows_of]),
            "kl/reverse_bound": np.mean([r["reverse_kl"] for r in rows_of]),
        }
        found = {name: getattr(report.measures[name], group) for name in expected}
        assert found == pytest.approx(expected, rel=1e-5)
    # Both groups together are all rows, as `probe positions` has them.
    whole = PositionProbeConfig.model_validate(
        {"store": {"url": str(store.url)}, "positions": {"bins": 1}}
    )
    (every,) = run_position_probe(whole).ranges
    for name in MEASURES:
        each = report.measures[name]
        total = report.correct_rows * (each.correct or 0) + report.incorrect_rows * (
            each.incorrect or 0
        )
        assert total / len(rows) == pytest.approx(every.means[name], rel=1e-6), name
    json.dumps(asdict(report), allow_nan=False)


def test_the_error_of_the_difference_is_over_prompts() -> None:
    """Compare with the spread of the difference over 2,000 draws of 40 prompts of alike rows."""
    rng = np.random.default_rng(0)
    differences, errors = [], []
    prompt = np.repeat(np.arange(40), 6)
    for _ in range(2000):
        is_first = rng.random(240) < 0.5
        values = np.repeat(rng.normal(size=40), 6) + 0.5 * is_first + 0.3 * rng.normal(size=240)
        each = split(values, is_first, prompt)
        assert each.difference is not None
        assert each.difference_se is not None
        differences.append(each.difference)
        errors.append(each.difference_se)
    assert np.mean(differences) == pytest.approx(0.5, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.06)


def test_a_measure_may_be_missing_in_a_group() -> None:
    values = np.array([np.nan, np.nan, 1.0, 3.0])
    each = split(values, np.array([True, True, False, False]), np.arange(4))
    assert (each.correct, each.incorrect, each.difference) == (None, 2.0, None)
    alone = split(np.array([1.0, 3.0]), np.array([True, False]), np.zeros(2, np.int64))
    assert (alone.difference, alone.difference_se) == (-2.0, None), "one prompt has no error"


def test_what_cannot_be_compared_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written as"):
        run_correctness_probe(config(store), tmp_path / "figure.jpg")
    with pytest.raises(IncompleteError, match="no rewards"):
        run_correctness_probe(config(make_store(tmp_path / "plain", [make_unit(0)])))
    unit = make_unit(1, lengths=GRADED_LENGTHS)
    alike = replace(unit, rollouts=replace(unit.rollouts, reward=np.ones(6, np.float32)))
    with pytest.raises(ConfigError, match="20 of 20 rows"):
        run_correctness_probe(config(make_store(tmp_path / "alike", [alike])))
