"""Scores of a teacher with another tokenizer: in its own ids and rows, with the spans of both.

A span is a piece of a response that is whole tokens to both (`spans.align`). Its log-prob is the
sum over the teacher's tokens, by the chain rule: log q(u_c .. u_d-1 | u_<c). It is exact for the
teacher's own ids. Distributions exist at one row of each span, if at all, over the teacher's ids.
"""

from dataclasses import dataclass

import numpy as np

from logitcask.engine.types import Array

END, GAP, PATCHED = 1, 2, 4
"""Bits of a mark: the token ends a span; it is in no span; the tokenizer itself would not have
chosen it. The j-th END of the teacher's tokens of a sequence is the j-th END of the student's."""

NONE, STARTS, ENDS = "none", "starts", "ends"
"""Row of each span that has the teacher's best ids: no row, that of its first token, of its last.
"""

NO_TWIN = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanScores:
    """Scores of N responses with P student tokens: Q teacher tokens, G spans, E entries, U ids.

    A row with entries belongs to each span, in their order: first `kept` best ids of the teacher,
    best first, then ids that were requested, best first.
    """

    offsets: Array
    """[N + 1] int64: sequence i has the teacher tokens offsets[i] : offsets[i + 1]."""
    tokens: Array
    """[Q] uint32, ids of the teacher."""
    log_probs: Array
    """[Q] float32, the teacher's log-prob of each, nats."""
    marks: Array
    """[Q] uint8."""
    student_marks: Array
    """[P] uint8."""
    texts: Array
    """[N] int64, the first eight bytes of the sha256 of the teacher's input: length and ids of the
    prompt, ids of the response. Equal ones need no second scoring."""
    piece_ids: Array
    """[U] uint32, ascending: the teacher's ids that occur in tokens and entries."""
    piece_twins: Array
    """[U] int64, the student's id of the same bytes (the lowest), or NO_TWIN."""
    piece_lengths: Array
    """[U] uint16, bytes of each; 0 for control tokens."""
    piece_bytes: Array
    """[sum of piece_lengths] uint8."""
    rows: str = NONE
    """NONE, STARTS or ENDS. The arrays below are empty without rows."""
    entropy: Array
    """[G] float32, of the teacher's next token, nats; a lower bound where its backend returns its
    best ids alone."""
    log_tail: Array
    """[G] float32, log of its mass outside all entries of the row."""
    kept: Array
    """[G] uint16."""
    cnt: Array
    """[G] uint16, all entries."""
    ids: Array
    """[E] uint32, ids of the teacher."""
    entry_lp: Array
    """[E] float32, nats."""

    @property
    def spans(self) -> int:
        """Return G."""
        return int(np.count_nonzero(self.marks & END))
