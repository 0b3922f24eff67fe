"""Scores of a teacher with another tokenizer: stored, damaged, and joined with the student."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.engine.alignment.span_scores import END, ENDS, GAP, NONE, STARTS, SpanScores
from logitcask.engine.errors import IdentityError, IntegrityError, StoreError
from logitcask.engine.store import open_store
from logitcask.engine.store.cache import UnitCache, read_unit
from logitcask.engine.store.decoded_unit import SPAN_ARRAYS, decode_unit, size_of
from logitcask.engine.store.format import codecs, layouts, schema
from logitcask.engine.store.format import segment as segments
from logitcask.engine.store.format.archive import write
from logitcask.engine.store.inspect import segment_rows
from logitcask.engine.store.log import record
from logitcask.engine.store.log.body import Bodies
from logitcask.engine.store.log.usual_heads import HeadParser
from logitcask.engine.store.merge import merge
from logitcask.engine.store.spans import arrays as spans
from logitcask.engine.store.spans.checks import check_structure, check_values
from logitcask.engine.store.spans.unit import decode_span_unit
from logitcask.engine.store.storage.hub import HubAddress
from logitcask.engine.store.transfer.card import build_card
from logitcask.engine.store.verify import verify
from logitcask.engine.types import IdLists
from tests.engine.store.made import (
    SCORE_PROVENANCE,
    commit_rollouts,
    commit_scores,
    forged,
    make_rollouts,
    make_scores,
)
from tests.engine.store.made_spans import (
    alignment,
    commit_span_scores,
    make_span_scores,
    slow_rows,
)

EACH = pytest.mark.parametrize("rows", [NONE, STARTS, ENDS])


def same(a: SpanScores, b: SpanScores) -> None:
    for field in fields(SpanScores):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "rows":
            assert x == y
        else:
            assert (x.dtype, x.tobytes()) == (y.dtype, y.tobytes()), field.name


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.sampled_from([NONE, STARTS, ENDS]))
def test_any_scores_come_back_from_a_file(seed: int, rows: str) -> None:
    rollouts = make_rollouts(seed % 1000)
    scores = make_span_scores(seed, rollouts, rows)
    check_structure(scores, rollouts.seq_off)
    check_values(scores)
    layout, profile = spans.LAYOUT_OF[rows], codecs.profile("default")
    arrays = spans.encode(scores, profile)
    data = write(segments.encode(arrays, layout=layout, profile=profile, attributes={}))
    counts = segments.counts_of(layout, arrays)
    back = segments.decode(
        "", data, layout=layout, profile=profile, counts=counts, names=list(arrays)
    )
    rounded = codecs.from_entry(codecs.to_entry(scores.entry_lp, profile), profile)
    same(spans.decode(back, layout, profile), replace(scores, entry_lp=rounded))


@EACH
def test_a_unit_has_what_a_plain_join_has(rows: str) -> None:
    listed = unmapped = one = 0
    for seed in range(12):
        rollouts = make_rollouts(seed)
        scores = make_span_scores(seed, rollouts, rows)
        unit = decode_span_unit("", rollouts, scores).arrays
        s, t = unit["s_off"], unit["t_off"]
        for r, row in enumerate(slow_rows(rollouts, scores)):
            found = {name: unit[name][r] for name in row if name not in "st"}
            assert {name: row[name] for name in found} == pytest.approx(found, nan_ok=True)
            a, b = slice(s[r], s[r + 1]), slice(t[r], t[r + 1])
            ours = [unit[f"s_{name}"][a].tolist() for name in ("ids", "q", "rank", "p")]
            assert [*zip(*ours, strict=True)] == row["s"]
            theirs = [unit[f"t_{name}"][b].tolist() for name in ("ids", "q", "rank")]
            assert [*zip(*theirs, strict=True)] == row["t"]
            listed += sum(lp > -np.inf for _, lp, *_ in row["s"])
            unmapped += sum(v == 0xFFFFFFFF for v, *_ in row["t"])
            one += not np.isnan(row["q_token_lp"])
        assert (len(unit["s_ids"]), len(unit["t_ids"])) == (s[-1], t[-1])
    assert one > 20
    assert rows == NONE or min(listed, unmapped) > 20


@pytest.mark.parametrize("rows", [STARTS, ENDS])
def test_spans_of_one_tokenizer_are_its_ordinary_scores(rows: str) -> None:
    """Score the teacher's list and the student's ids of every token, each a span of its own."""
    rollouts, profile = make_rollouts(5), codecs.profile("raw32")
    student = IdLists(cnt=rollouts.student.cnt, ids=rollouts.student.ids)
    cached = layouts.decode(
        layouts.encode(make_scores(5, rollouts), profile, student), profile, student
    )
    u = layouts.ranked(cached)
    ends = np.full(rollouts.positions, END, np.uint8)
    spans = SpanScores(
        offsets=rollouts.seq_off,
        tokens=rollouts.tokens,
        log_probs=cached.lp,
        marks=ends,
        student_marks=ends,
        texts=np.zeros(len(rollouts.seq_prompt), np.int64),
        piece_ids=np.arange(50, dtype=np.uint32),
        piece_twins=np.arange(50),
        piece_lengths=np.zeros(50, np.uint16),
        piece_bytes=np.zeros(0, np.uint8),
        rows=rows,
        entropy=cached.entropy,
        log_tail=cached.log_tail,
        kept=cached.kept,
        cnt=u.cnt.astype(np.uint16),
        ids=u.ids,
        entry_lp=u.lp,
    )
    check_structure(spans, rollouts.seq_off)
    check_values(spans)
    found = decode_span_unit("", rollouts, spans).arrays
    expected = decode_unit("", rollouts, cached).arrays
    assert found.keys() - expected.keys() == SPAN_ARRAYS
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name
    assert found["span_q"].tobytes() == found["span_row_q"].tobytes() == cached.lp.tobytes()
    assert (found["span_tokens"] == 1).all()


@EACH
def test_a_store_keeps_them(tmp_path: Path, rows: str) -> None:
    store = open_store(tmp_path / "s", create=True)
    base = commit_rollouts(store, 3, student=True)
    rollouts = store.read_rollouts(base)
    scores = make_span_scores(3, rollouts, rows)
    segment = commit_span_scores(store, base, 3, rows, profile="raw32")
    assert commit_span_scores(store, base, 3, rows, profile="raw32") is segment
    # Another process reads the log by the quick parser.
    again = open_store(tmp_path / "s")
    (chain,) = again.head().scores(f"spans-{rows}").values()
    same(again.read_span_scores(chain), scores)
    same(again.read_span_scores(chain, base=rollouts), scores)
    unit = read_unit(again, base, chain)
    expected = decode_span_unit(base.seg_id, rollouts, scores).arrays
    for cache in (UnitCache(tmp_path / "cache"), UnitCache(tmp_path / "cache")):
        mapped = cache.unit(again, base, chain)
        assert mapped.arrays.keys() == unit.arrays.keys() == expected.keys()
        for name, array in expected.items():
            assert unit.arrays[name].tobytes() == array.tobytes() == mapped.arrays[name].tobytes()
    assert unit.size_bytes <= size_of(base, chain)
    other = open_store(tmp_path / "t", create=True)
    assert merge(other, again).added == 2
    assert verify(other, deep=True).segments == 2
    with pytest.raises(StoreError, match="another tokenizer"):
        again.read_scores(chain)
    with pytest.raises(StoreError, match="has scores of rollouts"):
        commit_span_scores(store, base, 4, rows)


def test_a_name_is_of_one_alignment(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", create=True)
    first, second = (commit_rollouts(store, seed, student=True) for seed in (1, 2))
    commit_span_scores(store, first, 1, name="a")
    commit_scores(store, first, 1, name="b")
    for rows in (NONE, ENDS):
        with pytest.raises(IdentityError, match="spans\\+starts"):
            commit_span_scores(store, second, 2, rows, name="a")
    other = SCORE_PROVENANCE | {"alignment": alignment(STARTS) | {"student": "sha256:other"}}
    with pytest.raises(IdentityError, match="alignment"):
        commit_span_scores(store, second, 2, name="a", provenance=other)
    with pytest.raises(IdentityError, match="stands for scores in layout"):
        commit_scores(store, second, 2, name="a")
    with pytest.raises(IdentityError, match="stands for a teacher's best ids"):
        commit_span_scores(store, second, 2, name="b")
    with pytest.raises(IdentityError, match="alignment"):
        store.check_name(schema.SCORE, "a", other, drawn=False)
    with pytest.raises(IdentityError, match="best ids"):
        store.check_name(schema.SCORE, "b", other, drawn=False)
    for lacking in ({}, {"alignment": alignment(ENDS)}, {"alignment": "text"}):
        with pytest.raises(StoreError, match="alignment"):
            commit_span_scores(store, second, 2, provenance=SCORE_PROVENANCE | lacking)
    commit_span_scores(store, second, 2, name="a")


def _at(array: np.ndarray, index: int, value: object) -> np.ndarray:
    out = array.copy()
    out[index] = value
    return out


WRONG = {
    "offsets that": lambda s: {"offsets": _at(s.offsets, 0, 1)},
    "tokens: int64": lambda s: {"tokens": s.tokens.astype(np.int64)},
    "of one dimension": lambda s: {"log_probs": s.log_probs[:, None]},
    "student_marks: ": lambda s: {"student_marks": s.student_marks[:-1]},
    "texts: ": lambda s: {"texts": s.texts[1:]},
    "a mark of 8": lambda s: {"marks": _at(s.marks, 0, 8)},
    "ends a span and is in none": lambda s: {"student_marks": _at(s.student_marks, 0, END | GAP)},
    "that does not end": lambda s: {
        "student_marks": _at(s.student_marks, np.flatnonzero(s.student_marks & END)[-1], 0)
    },
    "another number of spans": lambda s: {
        "student_marks": _at(s.student_marks, np.flatnonzero(s.student_marks & GAP)[0], END)
    },
    "do not ascend": lambda s: {"piece_ids": s.piece_ids[::-1].copy()},
    "bytes are missing": lambda s: {"piece_ids": s.piece_ids + np.uint32(1)},
    "ids of pieces from": lambda s: {"piece_twins": _at(s.piece_twins, 0, 0xFFFFFFFF)},
    "piece_bytes: ": lambda s: {"piece_bytes": s.piece_bytes[1:]},
    "entropy: ": lambda s: {"entropy": s.entropy[1:]},
    "more entries are kept": lambda s: {"kept": s.cnt + np.uint16(1)},
    "a log-prob of nan": lambda s: {"log_probs": _at(s.log_probs, 0, np.nan)},
    "a log-prob of 1.0": lambda s: {"entry_lp": _at(s.entry_lp, 0, 1.0)},
    "entropies from -1.0": lambda s: {"entropy": _at(s.entropy, 0, -1.0)},
    "twice": lambda s: {"ids": np.full_like(s.ids, s.ids[0])},
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_scores_are_refused(fault: str) -> None:
    rollouts = make_rollouts(3)
    scores = make_span_scores(3, rollouts)
    wrong = replace(scores, **WRONG[fault](scores))

    def check() -> None:
        check_structure(wrong, rollouts.seq_off)
        check_values(wrong)

    with pytest.raises(ValueError, match=fault):
        check()


def test_a_flipped_bit_is_an_error(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", create=True)
    base = commit_rollouts(store, 3, student=True)
    segment = commit_span_scores(store, base, 3)
    path = tmp_path / "s" / segment.path
    data = bytearray(path.read_bytes())
    path.chmod(0o644)
    for at in range(0, len(data), len(data) // 9):
        damaged = data.copy()
        damaged[at] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="other bytes"):
            store.read_span_scores((segment,))


def test_counts_that_no_scores_have_are_refused_before_a_file_is_read(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", create=True)
    for seed in (1, 2):
        segment = commit_span_scores(store, commit_rollouts(store, seed, student=True), seed)
    counts = segment.counts
    path = tmp_path / "s/log" / record.file_name(3)
    sound = path.read_bytes()
    # Bundles of records are read by the quick parser, which knows the form of the first one.
    parser, prev = HeadParser(Bodies(store.storage, lambda *_: None)), store.log.sha256(2)

    def parse(data: bytes) -> record.Record:
        return parser.parse(record.split(data, "")[0], "", number=3, prev=prev, name="bundle")

    assert parse(sound).adds[0].counts == parse(sound).adds[0].counts == counts
    for key, most in (
        ("G", min(counts["P"], counts["Q"])),
        ("E", 4096 * counts["G"]),
        ("U", counts["Q"] + counts["E"]),
        ("B", 65535 * counts["U"]),
    ):

        def change(head: dict[str, Any], _: Any, key: str = key, most: int = most) -> None:
            head["adds"][0]["counts"][key] = most + 1

        path.write_bytes(forged(sound, change))
        with pytest.raises(IntegrityError, match=f"{key} {most + 1}, at most {most}"):
            open_store(tmp_path / "s").head()
        with pytest.raises(IntegrityError, match=f"{key} {most + 1}, at most {most}"):
            parse(path.read_bytes())


def test_a_stranger_with_right_digests_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_store(tmp_path / "other", create=True)
    base = commit_rollouts(other, 3, student=True)
    scores = make_span_scores(3, other.read_rollouts(base))
    wrong = replace(scores, piece_twins=_at(scores.piece_twins, 0, -2))
    with monkeypatch.context() as patch:
        patch.setattr("logitcask.engine.store.store.check_structure", lambda *_: None)
        segment = commit_span_scores(other, base, 3, scores=wrong)
    with pytest.raises(IntegrityError, match="ids of pieces from -2"):
        other.read_span_scores((segment,))
    with pytest.raises(IntegrityError, match="ids of pieces from -2"):
        merge(open_store(tmp_path / "s", create=True), open_store(tmp_path / "other"))


def test_a_card_and_a_list_name_the_kind_of_scores(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", create=True)
    base = commit_rollouts(store, 3, student=True)
    request = {"teacher_top_p": 0.9, "teacher_topk_min": 4, "teacher_topk_max": 8}
    for rows in (ENDS, NONE):
        provenance = SCORE_PROVENANCE | {"alignment": alignment(rows), "request": request}
        commit_span_scores(store, base, 3, rows, provenance=provenance)
    found = [row["request"] for row in segment_rows(store.head().segments)[1:]]
    assert found == ["spans, ids at ends, p 0.9, k 4-8", "spans"]
    text = build_card(store.head(), HubAddress(repo="org/name", revision="", path=""), "")
    assert text.count("--objective span_advantage --out ./run") == 2
    assert "`spans, ids at ends, p 0.9, k 4-8`" in text
