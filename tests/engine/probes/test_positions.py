"""Values by position are means over the rows of a table of positions, computed one by one."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from logitcask.engine.commands.probe import run_position_probe
from logitcask.engine.config.probes import PositionProbeConfig
from logitcask.engine.errors import IncompleteError
from logitcask.engine.exchange.positions import positions, select
from logitcask.engine.probes.positions import MEASURES, common_k
from logitcask.engine.store import Store
from tests.engine.cached import make_store, make_unit

K = 4  # of both lists of these units


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    units = []
    for version in range(3):
        unit = make_unit(version, version=version, lengths=[9, 3, 0, 4, 6, 2])
        mask = unit.rollouts.loss_mask.copy()
        mask[1::4] = 0
        units.append(replace(unit, rollouts=replace(unit.rollouts, loss_mask=mask)))
    return make_store(tmp_path_factory.mktemp("store") / "s", units)


def config(store: Store, **settings: Any) -> PositionProbeConfig:
    return PositionProbeConfig.model_validate(
        {"store": {"url": str(store.url)}, "positions": settings}
    )


def by_hand(row: dict[str, Any]) -> list[float]:
    """Return MEASURES of a row."""
    p, q = (
        dict(zip(row[ids][:K], np.exp(row[lp][:K]), strict=True))
        for ids, lp in (
            ("student_topk_ids", "student_topk_logprobs"),
            ("teacher_ids", "teacher_logprobs"),
        )
    )
    common = p.keys() & q.keys()
    ends = row["teacher_entropy"], row["student_entropy"]
    return [
        *(*ends, abs(ends[0] - ends[1]), row["reverse_kl"], row["forward_kl"], len(common) / K),
        *(sum(of[each] for each in common) for of in (p, q)),
    ]


def test_means_are_those_of_the_rows(store: Store, tmp_path: Path) -> None:
    figure = tmp_path / "positions.png"
    report = run_position_probe(config(store, bins=3), figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    rows = [r for r in positions(store, rollouts="main", teacher="big") if r["loss_mask"]]
    assert report.k == K
    assert [(each.start, each.end) for each in report.ranges] == [(0, 3), (3, 6), (6, 9)]
    assert sorted(report.versions) == [0, 1, 2]
    for version, ranges in [(None, report.ranges), *report.versions.items()]:
        for each in ranges:
            chosen = [
                by_hand(row)
                for row in rows
                if each.start <= row["position"] < each.end
                and version in (None, row["policy_version_start"])
            ]
            assert each.rows == len(chosen)
            means = [each.means[name] for name in MEASURES]
            assert means == pytest.approx(np.mean(chosen, 0).tolist(), rel=1e-5)


def test_the_reading_names_where_the_models_part(tmp_path: Path) -> None:
    """Give the teacher the student's own distribution, but not at the end of the responses."""
    unit = make_unit(0, prompts=8, lengths=[8] * 16, top_p=1.0, k_min=40, k_max=40)
    late = np.tile(np.arange(8) >= 6, 16)
    scores, same = unit.scores, unit.log_p.astype(np.float32)
    order = np.argsort(-same, axis=1)
    ids, lp = scores.ids.reshape(-1, 40).copy(), scores.entry_lp.reshape(-1, 40).copy()
    ids[~late], lp[~late] = order[~late], np.take_along_axis(same, order, 1)[~late]
    student = unit.rollouts.student
    assert student is not None
    at_lp = np.array(scores.at_lp).reshape(len(late), -1)
    at_lp[~late] = student.entry_lp.reshape(len(late), -1)[~late]
    made = replace(
        scores,
        ids=ids.reshape(-1),
        entry_lp=lp.reshape(-1),
        at_lp=at_lp.reshape(-1),
        lp=np.where(late, scores.lp, student.lp),
    )
    store = make_store(tmp_path / "s", [replace(unit, scores=made)])
    report = run_position_probe(config(store, bins=4))
    assert "part towards the end" in report.reading
    assert report.ranges[0].means["kl/reverse_bound"] == pytest.approx(0, abs=1e-4)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    units = [make_unit(0), make_unit(1)]
    with pytest.raises(IncompleteError, match="no scores of 'big'"):
        run_position_probe(config(make_store(tmp_path / "a", units, scored=1)))
    masked = replace(units[0].rollouts, loss_mask=np.zeros_like(units[0].rollouts.loss_mask))
    with pytest.raises(IncompleteError, match="no row"):
        run_position_probe(config(make_store(tmp_path / "b", [replace(units[0], rollouts=masked)])))


def test_draws_of_a_teacher_are_no_top_ids(store: Store) -> None:
    chosen = select(store.head())
    (segment, (scores, *_)), *_ = chosen.segments
    request = {**scores.provenance["request"], "selection": "sampled"}
    drawn: Any = SimpleNamespace(provenance={**scores.provenance, "request": request})
    with pytest.raises(IncompleteError, match="draws"):
        common_k(replace(chosen, segments=((segment, (drawn,)),)))
    assert common_k(chosen) == K
