"""The coverage of spans, counted by hand."""

from dataclasses import replace

import numpy as np
import pytest

from logitcask.engine.alignment.by_sequence import spans_of
from logitcask.engine.alignment.coverage import SpanCoverage, coverage_of, describe
from logitcask.engine.alignment.span_scores import END, GAP, NONE, PATCHED, STARTS, SpanScores

# Text "abcdefghij": the student has ab|cd|e|f|gh|ij, the teacher a|b|cd|ef|g|hij and its control
# token 9, which no token of the student pairs with. `g` is a byte that it would not have chosen.
IDS = np.array([0, 1, 2, 3, 4, 5, 9], np.uint32)
LENGTHS = np.array([1, 1, 2, 2, 1, 3, 0], np.uint16)


def scores() -> SpanScores:
    return SpanScores(
        offsets=np.array([0, 7], np.int64),
        tokens=IDS,
        log_probs=np.full(7, -1.0, np.float32),
        marks=np.array([0, END, END, END, PATCHED, END, GAP], np.uint8),
        student_marks=np.array([END, END, 0, END, 0, END, GAP], np.uint8),
        texts=np.zeros(1, np.int64),
        piece_ids=IDS,
        piece_twins=np.array([-1, 7, 3, -1, -1, -1, -1], np.int64),
        piece_lengths=LENGTHS,
        piece_bytes=np.frombuffer(b"abcdefghij", np.uint8),
        rows=STARTS,
        entropy=np.zeros(4, np.float32),
        log_tail=np.log(np.array([0.1, 0.1, 0.1, 0.5], np.float32)),
        kept=np.array([2, 1, 1, 1], np.uint16),
        cnt=np.array([2, 1, 1, 1], np.uint16),
        ids=np.array([0, 1, 2, 3, 2], np.uint32),
        entry_lp=np.log(np.array([0.6, 0.3, 0.9, 0.9, 0.5], np.float32)),
    )


def test_spans_bytes_and_masses_are_those_counted_by_hand() -> None:
    found = coverage_of([scores()])
    assert found == SpanCoverage(
        responses=1,
        student_tokens=7,
        student_gaps=1,
        teacher_tokens=7,
        teacher_gaps=1,
        spans=4,
        one_to_one=1,
        many_to_one=1,
        one_to_many=1,
        many_to_many=1,
        largest_span=2,
        bytes=10,
        bytes_in_spans=10,
        bytes_patched=1,
        rows=4,
        unmapped_mass=found.unmapped_mass,
        tail_mass=found.tail_mass,
    )
    # Ids 0 and 3 have no token of the same bytes: .6 and .9 of their rows.
    assert found.unmapped_mass == pytest.approx(1.5)
    assert found.tail_mass == pytest.approx(0.8)


def test_segments_add_and_the_words_have_their_shares() -> None:
    twice = coverage_of([scores(), scores()])
    assert (twice.spans, twice.bytes, twice.largest_span) == (8, 20, 2)
    words = describe(twice)
    assert words["aligned"].startswith("1:1 25.0%, n:1 25.0%, 1:m 25.0%, n:m 25.0% of the spans")
    assert words["covered"].startswith("100.0% of the 20 bytes")
    assert words["patched"].startswith("10.00% of the bytes")
    assert "37.50% is at ids that are no token" in words["truncated"]
    assert "20.00% outside" in words["truncated"]


def test_spans_of_a_response_have_both_sides_and_the_kept_ids() -> None:
    found = spans_of(scores(), 0, slice(0, 7))
    assert [each.rows for each in found] == [range(1), range(1, 2), range(2, 4), range(4, 6)]
    assert [[text for _, text in each.tokens] for each in found] == [
        *([b"a", b"b"], [b"cd"], [b"ef"], [b"g", b"hij"])
    ]
    assert [each.log_prob for each in found] == [-2, -1, -1, -2]
    assert [each.at for each in found] == [0, 1, 2, 4]
    first, *_, last = found
    assert [(each.id, each.twin, each.text) for each in first.entries] == [
        *((0, None, b"a"), (1, 7, b"b"))
    ]
    assert [each.id for each in last.entries] == [2]
    assert last.tail == pytest.approx(0.5)


def test_scores_without_rows_have_spans_alone() -> None:
    none = {name: getattr(scores(), name)[:0] for name in ("entropy", "log_tail", "kept", "cnt")}
    bare = replace(scores(), rows=NONE, ids=IDS[:0], entry_lp=none["entropy"], **none)
    found = spans_of(bare, 0, slice(0, 7))
    assert [each.log_prob for each in found] == [-2, -1, -1, -2]
    assert all(each.at is None and not each.entries for each in found)
    assert "alone" in describe(coverage_of([bare]))["boundary-conditioned"]
