"""Drift: the numbers of `probe metrics` for each version of the rollouts, against the lag."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from logitcask.engine.commands.probe import run_position_probe
from logitcask.engine.commands.probes.topk import run_drift_probe
from logitcask.engine.config.probes import DriftProbeConfig, PositionProbeConfig
from logitcask.engine.errors import ConfigError, IdentityError, ObjectiveError
from logitcask.engine.models.identity import write_metadata
from logitcask.engine.models.load import load_student
from logitcask.engine.objectives.bounds import Bounds
from logitcask.engine.packing.batches import planned
from logitcask.engine.probes.drift import MEASURES, SAMPLER, Drift, drift_report
from logitcask.engine.probes.metrics import probe
from logitcask.engine.store import Store
from logitcask.engine.types import ModelRef
from tests.engine.cached import make_unit
from tests.engine.fitting import make_case
from tests.engine.tiny import make_model, save_folder

LENGTHS = [7, 3, 0, 5, 6, 2]
Case = tuple[Store, ModelRef, Path]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Return rollouts of versions 0 and 3, their student, and a run with a student of version 5."""
    folder = tmp_path_factory.mktemp("drift")
    units = [make_unit(i, vocab=99, lengths=LENGTHS, version=3 * i) for i in range(2)]
    store, ref = make_case(folder, units)
    later = save_folder(folder / "run" / "versions" / "v5", make_model(seed=0, spread=0.31))
    write_metadata(
        later,
        base_weights=ref.base_weights,
        parent=ref.digest,
        version=5,
        pin=None,
        plan="",
        objective=None,
    )
    return store, ref, folder / "run"


def config(store: Store, **settings: Any) -> DriftProbeConfig:
    values = {"store": {"url": str(store.url)}, "drift": settings, "run": {"device": "cpu"}}
    return DriftProbeConfig.model_validate(values)


def test_lines_are_means_of_probe_metrics(case: Case, tmp_path: Path) -> None:
    store, ref, run = case
    figure = tmp_path / "drift.svg"
    report = run_drift_probe(config(store), [ref.name], run, figure)
    assert ElementTree.parse(figure).getroot().tag.endswith("svg")
    found = [(each.student == SAMPLER, each.version, each.lag) for each in report.lines]
    assert found == [
        (False, 0, -3),
        (True, 0, 0),
        (False, 0, 0),
        (True, 3, 0),
        (False, 5, 2),
        (False, 5, 5),
    ]
    packs = planned(store, snapshot=store.head(), rollouts="main", teacher="big")
    (whole, _) = probe(load_student(ref), packs, objectives={}, n_vocab=99)
    own = [each for each in report.lines if each.student == ref.name]
    assert sum(each.rows for each in own) == whole.rows
    for name in MEASURES:
        mean = sum(each.rows * each.means[name] for each in own) / whole.rows
        assert mean == pytest.approx(whole.means[name], rel=1e-6), name
    json.dumps(asdict(report), allow_nan=False)


def test_the_sampler_is_measured_from_the_store_alone(case: Case) -> None:
    store, _, _ = case
    report = run_drift_probe(config(store))
    assert {each.student for each in report.lines} == {SAMPLER}
    assert "give --model" in report.reading
    whole = PositionProbeConfig.model_validate(
        {"store": {"url": str(store.url)}, "positions": {"bins": 1}}
    )
    versions = run_position_probe(whole).versions
    for each in report.lines:
        (of_version,) = versions[each.version]
        assert each.rows == of_version.rows
        assert each.means["overlap/ratio"] == pytest.approx(of_version.means["overlap/ratio"])
        assert each.means["cache/approx_kl"] == 0
        assert each.means["cache/uncached_mass"] == 0
        assert 0 < each.means["cache/coverage"] < 1


def test_the_reading_names_the_first_lag_beyond_a_bound() -> None:
    def line(lag: int, coverage: float, k3: float) -> Drift:
        values = (coverage, 0.0, k3, 0.5)
        return Drift(
            student="s",
            version=lag,
            rollouts_version=0,
            lag=lag,
            rows=1,
            means=dict(zip(MEASURES, values, strict=True)),
        )

    # A student from before the rollouts says nothing about how long they stay good.
    lines = [line(9, 0.7, 0.3), line(1, 0.99, 0.01), line(4, 0.79, 0.1), line(-3, 0.1, 9)]
    reading = drift_report(lines, Bounds()).reading
    assert "under 0.8 from 4 updates on" in reading
    assert "over 0.2 nats from 9 updates on" in reading
    reading = drift_report(lines[1:2], Bounds()).reading
    assert "0.8 or more up to 1 updates" in reading
    assert "stays within 0.2 nats" in reading


def test_a_student_without_a_lag_is_refused(case: Case, tmp_path: Path) -> None:
    store, _, _ = case
    other = save_folder(tmp_path / "other", make_model(seed=9))
    with pytest.raises(IdentityError, match="other base weights"):
        run_drift_probe(config(store), [str(other)])
    with pytest.raises(ConfigError, match="holds no student"):
        run_drift_probe(config(store), [], tmp_path)
    bare = make_unit(0, vocab=99, lengths=LENGTHS, at_student=False)
    without, ref = make_case(tmp_path / "bare", [bare])
    with pytest.raises(ObjectiveError, match="log-probs at the student's ids"):
        run_drift_probe(config(without))
    (line,) = run_drift_probe(config(without), [ref.name]).lines
    assert np.isfinite(list(line.means.values())).all()
