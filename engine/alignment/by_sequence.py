"""Spans of one response for a reader: tokens of both sides, their bytes, and the teacher's ids."""

from dataclasses import dataclass

import numpy as np

from logitcask.engine.alignment.span_scores import END, ENDS, GAP, NO_TWIN, NONE, SpanScores
from logitcask.engine.types import Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One of the teacher's ids at the row of a span."""

    id: int
    twin: int | None
    """The student's id of the same bytes."""
    text: bytes
    log_prob: float
    """Nats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A piece of the response that is whole tokens to both."""

    rows: range
    """The student's tokens, from 0 in the response."""
    tokens: tuple[tuple[int, bytes], ...]
    """Ids and bytes of the teacher's tokens; a control token has no bytes."""
    log_prob: float
    """Of the whole span by the chain rule, nats."""
    at: int | None
    """The row that has `entries`; None for scores without them."""
    entropy: float | None
    """Of the teacher at that row, nats."""
    tail: float | None
    """Its mass outside of all entries."""
    entries: tuple[Entry, ...]
    """Its kept ids, best first."""


def spans_of(scores: SpanScores, sequence: int, rows: slice) -> list[Span]:
    """Return the spans of a response in their order.

    rows: its tokens among all of the student's.
    """
    tokens = slice(*(int(each) for each in scores.offsets[sequence : sequence + 2]))
    first_span = int(np.count_nonzero(scores.marks[: tokens.start] & END))
    ours = _members(scores.student_marks[rows])
    theirs = _members(scores.marks[tokens])
    pieces = _Pieces(scores)
    with_row = scores.rows != NONE
    entry = np.concatenate([[0], np.cumsum(scores.cnt, dtype=np.int64)])
    found = []
    for number, (own, other) in enumerate(zip(ours, theirs, strict=True), first_span):
        at = tokens.start + other
        begin = int(entry[number]) if with_row else 0
        kept = range(begin, begin + int(scores.kept[number]) if with_row else 0)
        found.append(
            Span(
                rows=range(int(own[0]), int(own[-1]) + 1),
                tokens=tuple((int(i), pieces.text(int(i))) for i in scores.tokens[at]),
                log_prob=float(scores.log_probs[at].astype(np.float64).sum()),
                at=None if not with_row else int(own[-1 if scores.rows == ENDS else 0]),
                entropy=float(scores.entropy[number]) if with_row else None,
                tail=float(np.exp(scores.log_tail[number])) if with_row else None,
                entries=tuple(
                    Entry(
                        id=int(scores.ids[e]),
                        twin=pieces.twin(int(scores.ids[e])),
                        text=pieces.text(int(scores.ids[e])),
                        log_prob=float(scores.entry_lp[e]),
                    )
                    for e in kept
                ),
            )
        )
    return found


def _members(marks: Array) -> list[Array]:
    """Return the tokens of each span of a response, without those in none."""
    inside = np.flatnonzero(marks & GAP == 0)
    ends = np.flatnonzero(marks[inside] & END) + 1
    return np.split(inside, ends)[: len(ends)]


class _Pieces:
    """Bytes and twins of the teacher's ids."""

    def __init__(self, scores: SpanScores) -> None:
        self._ids, self._twins = scores.piece_ids, scores.piece_twins
        self._ends = np.cumsum(scores.piece_lengths, dtype=np.int64)
        self._bytes = scores.piece_bytes.tobytes()

    def text(self, token: int) -> bytes:
        at = int(np.searchsorted(self._ids, token))
        return self._bytes[int(self._ends[at - 1]) if at else 0 : int(self._ends[at])]

    def twin(self, token: int) -> int | None:
        found = int(self._twins[np.searchsorted(self._ids, token)])
        return None if found == NO_TWIN else found
