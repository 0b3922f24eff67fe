"""The ledger of a run: the segments of each update, on any number of processes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Train
from logitcask.engine.errors import IntegrityError
from logitcask.engine.packing.source import PackSource
from logitcask.engine.packing.teachers import Source
from logitcask.engine.training.provenance.ledger import Ledger, Update, read_lines, sources_of
from logitcask.engine.training.train import train
from tests.engine.cached import make_store, make_unit
from tests.engine.fitting import REVERSE, make_case

A = Source(rollouts="a" * 32, version=1, teacher="big", scores=("c" * 32,))
B = Source(rollouts="b" * 32, version=3, teacher="big", scores=("d" * 32, "e" * 32), base=("f",))


def test_lines_worked_by_hand(tmp_path: Path) -> None:
    """Let a student of version 3 take 30 rows of version 1 and 10 of 3: their mean age is 1.5."""
    ledger = Ledger(tmp_path / "ledger.jsonl", version=3)
    one: list[Update] = [(1, {A: 10}, ["e"]), (2, {}, ())]
    two: list[Update] = [(1, {A: 20, B: 10}, ["e"]), (2, {B: 4}, ())]
    ledger.write([one, two], {"cache/approx_kl": 0.0123456, "cache/skipped_share": 0.0})
    text = (tmp_path / "ledger.jsonl").read_text()
    first, second = read_lines(ledger.path, text)
    assert first["segments"] == [
        {"rollouts": "a" * 32, "version": 1, "teacher": "big", "scores": ["c" * 32]},
        {
            **{"rollouts": "b" * 32, "version": 3, "teacher": "big"},
            **{"scores": ["d" * 32, "e" * 32], "base": ["f"]},
        },
    ]
    assert (first["rows"], first["age"]) == ({"0": 30, "1": 10}, [0, 1.5, 2])
    assert first["resampled"] == ["e"]
    assert second == {"update": 2, "rows": {"1": 4}, "age": [1, 1.0, 1], "drift": 0.01235}
    assert list(sources_of([first, second])) == [A, B]
    # The same packs on one process, resumed after the first update.
    again = Ledger(tmp_path / "again.jsonl", text.splitlines(keepends=True)[0], version=3)
    again.write([[(2, {B: 4}, ())]], {"cache/approx_kl": 0.0123456})
    assert again.path.read_text() == text


def test_a_teacher_that_follows_has_an_age_too(tmp_path: Path) -> None:
    """Let 30 rows have a refresh that is 3 updates old, and 10 one of 1 update."""
    ours = [
        A._replace(teacher="big.v1-00000000", teacher_version=1),
        A._replace(teacher="big.v3-00000000", teacher_version=3),
    ]
    ledger = Ledger(tmp_path / "ledger.jsonl", version=3)
    ledger.write([[(1, {}, ()), (2, dict(zip(ours, (30, 10), strict=True)), ())]])
    _, line = read_lines(ledger.path)
    assert (line["age"], line["teacher_age"]) == ([3, 3.0, 3], [1, 2.5, 3])
    assert list(sources_of([line])) == ours


@pytest.mark.parametrize(
    "text",
    [
        '{"update": 1, "rows": {"0": 3}}',
        '{"update": 1, "segments": [{"rollouts": "a"}], "rows": {}}',
        '{"update": 1, "ro',
        "[]",
    ],
)
def test_a_damaged_ledger_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(IntegrityError, match=r"ledger\.jsonl is damaged"):
        read_lines(tmp_path / "ledger.jsonl", text)


def test_every_row_of_a_run_is_in_its_ledger_also_without_a_line_of_metrics(tmp_path: Path) -> None:
    units = [make_unit(i, prompts=2, vocab=99, lengths=[9, 4, 7, 6], version=i) for i in range(3)]
    store, model = make_case(tmp_path, units, hidden=16, layers=1)
    settings = Train(
        learning_rate=1e-3, num_train_epochs=2, pack_length=24, logging_steps=3, save_steps=2
    )
    out = tmp_path / "out"
    report = train(
        store,
        model=model,
        teacher="big",
        objective=REVERSE,
        settings=settings,
        run=Run(out=out, device="cpu"),
    )
    lines = read_lines(out, (out / "ledger.jsonl").read_text())
    assert [line["update"] for line in lines] == list(range(1, report.updates + 1))
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    drifts = {line["progress/step"]: line["cache/approx_kl"] for line in logged}
    assert len(drifts) < report.updates
    assert {line["update"]: line["drift"] for line in lines if "drift" in line} == {
        step: pytest.approx(drift, rel=1e-3) for step, drift in drifts.items() if drift
    }
    sources = list(sources_of(lines))
    snapshot = store.head()
    scores = snapshot.scores("big")
    assert {(s.rollouts, s.scores) for s in sources} == {
        (s.seg_id, tuple(each.seg_id for each in scores[s.seg_id]))
        for s in snapshot.rollouts("main")
    }
    assert sorted(s.version for s in sources) == [0, 1, 2], "of the sequences"
    rows: dict[Source, int] = {}
    for line in lines:
        for number, count in line["rows"].items():
            rows[sources[int(number)]] = rows.get(sources[int(number)], 0) + count
    assert set(rows.values()) == {2 * (9 + 4 + 7 + 6)}, "two epochs"
    for line in lines:
        ages = [line["update"] - 1 - sources[int(n)].version for n in line["rows"]]
        mean = np.average(ages, weights=list(line["rows"].values()))
        assert line["age"] == [min(ages), pytest.approx(mean, rel=1e-3), max(ages)]


def test_rows_without_a_weight_are_not_counted_and_rows_of_two_teachers_twice(
    tmp_path: Path,
) -> None:
    unit: Any = make_unit(0, prompts=1, vocab=40, lengths=[5, 3])
    unit.rollouts.loss_mask[:2] = 0
    store = make_store(tmp_path, [unit])
    members = np.array([[0, 0], [0, 1]])
    source = PackSource(store, store.head(), "main", "big")
    assert list(source.pack(members).sources.values()) == [3 + 3]
    segment = store.head().rollouts("main")[0]
    store.commit_scores(
        unit.scores,
        base=segment,
        name="small",
        unit_key="sha256:" + "0" * 64,
        unit=dict(segment.unit),
        provenance=store.head().scores("big")[segment.seg_id][0].provenance,
    )
    both = PackSource(store, store.head(), "main", "big=1,small=3").pack(members)
    assert {s.teacher: n for s, n in both.sources.items()} == {"big": 6, "small": 6}
