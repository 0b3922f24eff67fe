"""The rows of an export: those that the store reads, and a KL worked out by hand."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.errors import ConfigError, IdentityError, IncompleteError, StoreError
from logitcask.engine.exchange import parquet, positions
from logitcask.engine.exchange.parquet import export_parquet
from logitcask.engine.exchange.positions import COLUMNS
from logitcask.engine.models.identity import digest, tokenizer_digest
from logitcask.engine.score.unit import IdLists
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.format.rows import lists_at, scores_at
from logitcask.engine.types import Array
from tests.engine.cached import Unit, make_store, make_unit
from tests.engine.tiny import make_model, make_tokenizer, save_folder

pyarrow = pytest.importorskip("pyarrow")
TEACHER = {"teacher": {"weights": digest("other")}, "teacher_kind": "teacher", "context": ""}


def made(folder: Path, **kinds: Any) -> tuple[list[Unit], Store]:
    units = [make_unit(seed, **kinds) for seed in (3, 4)]
    return units, make_store(folder / "store", units)


def rows_of(store: Store, **names: Any) -> list[dict[str, Any]]:
    rows = list(positions.positions(store, **names))
    assert all(list(row) == list(COLUMNS) for row in rows)
    return rows


def coarse_kl(row: dict[str, Any]) -> tuple[int, float, float]:
    """Work out (ids, KL(q || p), KL(p || q)) of one row from its lists alone."""
    p = dict(zip(row["student_topk_ids"], row["student_topk_logprobs"], strict=True))
    q = dict(zip(row["teacher_ids"], row["teacher_logprobs"], strict=True))
    common = [each for each in p if each in q]
    rest_p = np.exp(row["student_log_tail"]) + sum(np.exp(p[i]) for i in p if i not in q)
    rest_q = np.exp(row["teacher_log_tail"]) + sum(np.exp(q[i]) for i in q if i not in p)
    mass_p = np.array([*(np.exp(p[i]) for i in common), rest_p])
    mass_q = np.array([*(np.exp(q[i]) for i in common), rest_q])
    mass_p, mass_q = mass_p / mass_p.sum(), mass_q / mass_q.sum()
    gap = np.log(mass_q) - np.log(mass_p)
    return len(common), float((mass_q * gap).sum()), float(-(mass_p * gap).sum())


@pytest.mark.parametrize("at_student", [True, False])
def test_kl_is_that_of_both_lists_and_a_bucket(tmp_path: Path, at_student: bool) -> None:
    units, store = made(tmp_path, at_student=at_student, lengths=[9, 0, 7, 8, 1, 9])
    log_p, log_q = (np.concatenate([getattr(u, n) for u in units]) for n in ("log_p", "log_q"))
    full = {
        "forward_kl": (np.exp(log_q) * (log_q - log_p)).sum(1),
        "reverse_kl": (np.exp(log_p) * (log_p - log_q)).sum(1),
    }
    rows = rows_of(store)
    assert len(rows) == 68
    none = 0
    for at, row in enumerate(rows):
        count, forward, reverse = coarse_kl(row)
        assert row["kl_n_ids"] == count
        if not count:
            none += 1
            assert row["forward_kl"] is None
            continue
        assert row["forward_kl"] == pytest.approx(forward, abs=1e-6)
        assert row["reverse_kl"] == pytest.approx(reverse, abs=1e-6)
        assert all(0 <= row[name] <= values[at] + 1e-3 for name, values in full.items())
    assert (none > 0) == (not at_student), "a teacher's own list may have no id of the student's"


def test_rows_are_what_the_store_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units, store = made(tmp_path, mc_draws=3)
    whole = rows_of(store)
    monkeypatch.setattr(positions, "ROWS", 5)
    assert rows_of(store) == whole, "blocks do not change a row"
    at, sequences = iter(whole), 0
    for unit, segment in zip(units, store.head().rollouts("main"), strict=True):
        data, student, draws = unit.rollouts, unit.rollouts.student, unit.rollouts.draws
        assert student is not None
        assert draws is not None
        entry = np.cumsum([0, *student.cnt])
        drawn = np.cumsum([0, *draws.cnt])
        for i, prompt in enumerate(data.seq_prompt.tolist()):
            for r in range(int(data.seq_off[i]), int(data.seq_off[i + 1])):
                row = next(at)
                assert row["segment"] == segment.seg_id
                assert row["sequence"] == sequences + i
                assert row["prompt"] == data.prompts[prompt].id
                assert row["position"] == r - data.seq_off[i]
                assert (row["token"], row["loss_mask"]) == (data.tokens[r], True)
                assert (row["finish_reason"], row["reward"]) == ("length", None)
                assert row["student_logprob"] == student.lp[r]
                assert row["behavior_logprob"] == data.b_lp[r]
                listed = slice(entry[r], entry[r + 1])
                assert row["student_topk_ids"] == student.ids[listed].tolist()
                assert row["mc_ids"] == draws.ids[drawn[r] : drawn[r + 1]].tolist()
                assert sum(row["mc_multiplicities"]) == 3
                assert row["teacher_logprob"] == unit.scores.lp[r]
                first = int(unit.scores.cnt[:r].sum())
                own = unit.scores.ids[first : first + int(unit.scores.cnt[r])].tolist()
                assert row["teacher_ids"][: row["teacher_n_kept"]][: len(own)] == own
                assert {*row["student_topk_ids"]} <= {*row["teacher_ids"]}
                assert row["teacher_logprobs"] == sorted(row["teacher_logprobs"], reverse=True)
        sequences += len(data.seq_prompt)
    assert next(at, None) is None


def commit_other(store: Store, unit: Unit, change: Callable[..., Any]) -> Array | None:
    """Commit other scores of the first segment as `other`; return the marks of its rows."""
    segment = store.head().rollouts("main")[0]
    scores, rows, provenance = change(unit)
    store.commit_scores(
        scores,
        base=segment,
        name="other",
        unit_key=digest("other"),
        unit=dict(segment.unit),
        provenance=TEACHER | provenance,
        rows=rows,
    )
    marks: Array | None = rows
    return marks


def test_positions_without_a_score_are_null(tmp_path: Path) -> None:
    (unit, _), store = made(tmp_path, lengths=[5, 4, 3, 6, 2, 4])

    def third(unit: Unit) -> Any:
        marks = np.arange(unit.rollouts.positions) % 3 == 0
        student = unit.rollouts.student
        assert student is not None
        lists = IdLists(cnt=student.cnt, ids=student.ids)
        assert len(lists_at(lists, marks).cnt) == marks.sum()
        return scores_at(unit.scores, marks, lists), marks, {}

    marks = commit_other(store, unit, third)
    assert marks is not None
    rows = rows_of(store, teacher="other")
    teacher = [name for name in COLUMNS if name.startswith(("teacher", "kl"))]
    own = ("teacher_entropy_upper", "teacher_multiplicities")
    for row, scored in zip(rows, marks, strict=False):
        assert all((row[name] is not None) == scored for name in teacher if name not in own)
    unscored = rows[len(marks) :]
    assert unscored, "a segment without scores"
    assert all(row[name] is None for row in unscored for name in teacher)


def test_drawn_ids_have_counts_and_no_kl(tmp_path: Path) -> None:
    (unit, _), store = made(tmp_path)

    def drawn(unit: Unit) -> Any:
        mult = np.arange(1, 1 + len(unit.scores.ids)).astype(np.uint16)
        request = {"request": {"selection": "sampled", "draws": 4, "seed": 0}}
        return replace(unit.scores, mult=mult, at_lp=at_lp), None, request

    at_lp = unit.scores.at_lp
    with pytest.raises(StoreError, match="not stored together"):
        commit_other(store, unit, drawn)
    at_lp = None
    commit_other(store, unit, drawn)
    rows = [row for row in rows_of(store, teacher="other") if row["teacher"]]
    assert sum(sum(row["teacher_multiplicities"]) for row in rows) == sum(
        range(1, 1 + len(unit.scores.ids))
    )
    assert {row["teacher_n_kept"] for row in rows} == {0}
    assert all(row["reverse_kl"] is None for row in rows)


def test_files_have_the_rows(tmp_path: Path) -> None:
    units, store = made(tmp_path)
    rows = rows_of(store)
    report = export_parquet(store, tmp_path / "one.parquet")
    assert (report.files, report.positions, report.there) == (1, len(rows), 0)
    from pyarrow.parquet import read_table

    table = read_table(tmp_path / "one.parquet")
    assert {each.name: str(each.type).replace("element: ", "") for each in table.schema} == {
        name: kind.replace("float32", "float") for name, kind in COLUMNS.items()
    }
    assert table.to_pylist() == rows
    export_parquet(store, tmp_path / "many")
    assert len(list((tmp_path / "many").iterdir())) == len(units)
    found = [row for file in (tmp_path / "many").iterdir() for row in read_table(file).to_pylist()]
    assert sorted(found, key=lambda row: (row["sequence"], row["position"])) == rows


def test_an_export_into_a_folder_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, store = made(tmp_path)
    replaced, left = os.replace, [1]

    def dies_at_the_second(source: Path, target: Path) -> None:
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        replaced(source, target)

    monkeypatch.setattr(parquet.os, "replace", dies_at_the_second)
    with pytest.raises(StoreError, match="No space left on device"):
        export_parquet(store, tmp_path / "many")
    (first,) = (tmp_path / "many").iterdir()
    written = first.stat().st_mtime_ns
    monkeypatch.undo()
    assert export_parquet(store, tmp_path / "many").there == 1
    assert first.stat().st_mtime_ns == written
    assert export_parquet(store, tmp_path / "many").there == 2
    with pytest.raises(ConfigError, match="not of this export"):
        export_parquet(open_store(store.url), tmp_path / "many", snapshot=store.snapshot(1))


def test_targets_and_names_are_checked_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = made(tmp_path)
    target = tmp_path / "one.parquet"
    target.write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        export_parquet(store, target)
    assert target.read_text() == "mine"
    assert export_parquet(store, target, force=True).bytes == target.stat().st_size > 4
    (tmp_path / "text").write_text("")
    with pytest.raises(ConfigError, match="is no folder"):
        export_parquet(store, tmp_path / "text")
    with pytest.raises(ConfigError, match="--teacher small: the store has big"):
        export_parquet(store, tmp_path / "new", teacher="small")
    with pytest.raises(IncompleteError, match="holds no rollouts"):
        export_parquet(open_store(tmp_path / "empty", create=True), tmp_path / "new")
    monkeypatch.setattr(parquet, "import_module", lambda name: __import__(f"no_{name}"))
    with pytest.raises(ConfigError, match="needs the package pyarrow") as error:
        export_parquet(store, tmp_path / "new")
    assert "[data]" in error.value.hint
    assert not (tmp_path / "new").exists()


def test_texts_come_from_the_students_tokenizer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    save_folder(tmp_path / "student", make_model(), tokenizer)
    units = [make_unit(5)]
    store = make_store(tmp_path / "store", units)
    with pytest.raises(IdentityError, match="is not that of these rollouts"):
        export_parquet(store, tmp_path / "a.parquet", tokenizer=str(tmp_path / "student"))
    segment = store.head().rollouts("main")[0]
    student = dict(segment.provenance["student"]) | {"tokenizer": tokenizer_digest(tokenizer)}
    store = open_store(tmp_path / "other", create=True)
    store.commit_rollouts(
        units[0].rollouts,
        name="main",
        unit_key=digest("text"),
        unit=dict(segment.unit),
        provenance=dict(segment.provenance) | {"student": student},
    )
    export_parquet(store, tmp_path / "b.parquet", tokenizer=str(tmp_path / "student"))
    from pyarrow.parquet import read_table

    rows = read_table(tmp_path / "b.parquet").to_pylist()
    assert [row["text"] for row in rows] == [tokenizer.decode([row["token"]]) for row in rows]
    assert all(row["teacher"] is None for row in rows), "a store without scores"
