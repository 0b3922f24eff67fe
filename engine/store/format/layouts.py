"""Scores <-> the arrays of a score segment, without duplicate entries and without loss of order.

Where the teacher scored the student's stored ids, most of its own top entries are among them.
Layout `dedup` stores the teacher's log-prob at every student id, and of its own kept entries only
the extras, which the student's list lacks.

The order needs care, because rounded log-probs make ties. In each row let U be the extras and the
student's ids together, in the teacher's exact order: its kept entries in their order, then the rest
by float32 log-prob, the lower id first. Then

  implied rank of a student id = members of U whose *stored* value orders before its own,
  at_student_rank_fix              = its true rank in U - its implied rank   (modulo 2^16).

The reader computes the implied rank from the same stored values and adds the correction; the
extras, which are stored in rank order, take the remaining ranks. The first `kept` of U are the
teacher's list. The correction is mostly 0, and never negative when the kept entries descend; it is
taken modulo 2^16 so that the order is exact even where a scorer's values do not descend.

Rows are ragged and flat throughout: E entries, P rows, S entries of the student's lists.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.ragged as ragged
import logitcask.engine.store.format.rows as rows
import logitcask.engine.store.format.schema as schema
from logitcask.engine.errors import StoreError
from logitcask.engine.types import Array, CachedScores, IdLists, Scores

RESCORE = "this is a bug of the scorer: correct it and score the unit again"
AGREE = 1e-4
"""Nats, plus a thousandth: tolerance between a scorer's two log-probs of one id."""


class Ranked(NamedTuple):
    """Entries of P rows, flat, best first."""

    cnt: Array
    """[P] int64."""
    ids: Array
    """[E] uint32."""
    lp: Array
    """[E] float32."""


def stored_order(stored: Array) -> Array:
    """Return unsigned numbers that ascend as the stored log-probs descend: their bits."""
    return stored.view(np.uint32 if stored.dtype.itemsize == 4 else np.uint16)


def exact_order(log_probs: Array, ids: Array) -> Array:
    """Return uint64 that ascend as float32 log-probs descend, the lower id first among equals."""
    # A log-prob above 0 by rounding counts as 0; + 0.0 makes -0.0 and 0.0 one value.
    bits = (np.minimum(log_probs.astype(np.float32), 0.0) + np.float32(0.0)).view(np.uint32)
    order: Array = (bits.astype(np.uint64) << np.uint64(32)) | ids.astype(np.uint64)
    return order


def encode(scores: Scores, profile: codecs.Profile, student: IdLists | None) -> dict[str, Array]:
    """Return the arrays of a teacher's first score segment, of checked scores.

    student: the lists of the rollouts. Raises StoreError where two log-probs of one id differ.
    """
    cnt = scores.cnt.astype(np.uint16)
    arrays: dict[str, Array] = {
        "teacher_logprobs": scores.lp.astype(np.float32),
        "entropy": scores.entropy.astype(np.float32),
        "log_tail": scores.log_tail.astype(np.float32),
    }
    if scores.entropy_hi is not None:
        arrays["entropy_upper"] = scores.entropy_hi.astype(np.float32)
    if scores.at_lp is None or student is None:
        arrays |= {
            "topk_counts": cnt,
            "topk_ids": scores.ids.astype(np.uint32),
            "topk_logprobs": codecs.to_entry(scores.entry_lp, profile),
        }
        return arrays | (
            {} if scores.mult is None else {"multiplicities": scores.mult.astype(np.uint16)}
        )

    s_cnt, s_ids = student.cnt, student.ids.astype(np.uint32)
    index = ragged.find(scores.ids.astype(np.uint32), cnt, s_ids, s_cnt)
    shared = index >= 0
    twin = np.repeat(ragged.starts(cnt)[:-1], s_cnt)[shared] + index[shared]
    """Index of each shared student id in the teacher's lists."""
    if not np.allclose(scores.entry_lp[twin], scores.at_lp[shared], rtol=1e-3, atol=AGREE):
        raise StoreError(
            "the teacher has two log-probs of one id, in its own list and at the student's ids",
            hint=RESCORE,
        )
    extra = np.ones(len(scores.ids), bool)
    extra[twin] = False
    shared_cnt = ragged.count_marked(shared, s_cnt)
    extra_cnt = cnt - shared_cnt
    # Student ids outside the teacher's list follow it, by exact value, then by id.
    rest_cnt = (s_cnt - shared_cnt).astype(np.uint16)
    rest = exact_order(scores.at_lp[~shared], s_ids[~shared])
    true = index.astype(np.int64)
    true[~shared] = ragged.rank_in_row(rest, rest_cnt) + np.repeat(cnt, rest_cnt)

    lp_x = codecs.to_entry(scores.entry_lp[extra], profile)
    lp_s = codecs.to_entry(scores.at_lp, profile)
    return arrays | {
        "n_kept": cnt,
        "topk_counts": extra_cnt,
        "topk_ids": scores.ids[extra].astype(np.uint32),
        "topk_logprobs": lp_x,
        "at_student_logprobs": lp_s,
        "at_student_rank_fix": true.astype(np.uint16) - _implied(lp_x, extra_cnt, lp_s, s_cnt),
    }


def decode(
    arrays: dict[str, Array], profile: codecs.Profile, student: IdLists | None
) -> CachedScores:
    """Invert `encode`, and its marks of the scored rows if it has some.

    student: the lists of all rows. Raises ValueError where the arrays contradict each other.
    """
    cnt = arrays["topk_counts"]
    if "scored" in arrays:
        marks = rows.marks_of(arrays["scored"], len(cnt))
        own = {name: array for name, array in arrays.items() if name != "scored"}
        if student is not None and len(student.cnt) == len(marks):
            student = rows.lists_at(student, marks)
        return rows.expanded(decode(own, profile, student), marks)
    ragged.check_counts(cnt, len(arrays["topk_ids"]), schema.MAX_K)
    every: dict[str, Any] = {
        "lp": arrays["teacher_logprobs"],
        "entropy": arrays["entropy"],
        "entropy_hi": arrays.get("entropy_upper"),
        "log_tail": arrays["log_tail"],
        "cnt": cnt,
        "ids": arrays["topk_ids"],
        "entry_lp": codecs.from_entry(arrays["topk_logprobs"], profile),
    }
    if "at_student_logprobs" not in arrays:
        return CachedScores(
            **every,
            kept=np.zeros_like(cnt) if "multiplicities" in arrays else cnt,
            s_cnt=np.zeros_like(cnt),
            s_ids=np.zeros(0, np.uint32),
            s_lp=np.zeros(0, np.float32),
            s_rank=np.zeros(0, np.uint16),
            rank=ragged.index_in_row(cnt).astype(np.uint16),
            mult=arrays.get("multiplicities"),
        )
    if (
        student is None
        or len(student.cnt) != len(cnt)
        or len(arrays["at_student_logprobs"]) != len(student.ids)
    ):
        raise ValueError("the student's lists of the rollouts have another length")
    s_cnt = student.cnt
    if (arrays["n_kept"] > cnt.astype(np.int64) + s_cnt).any():
        raise ValueError("more entries are kept than there are")
    s_rank = arrays["at_student_rank_fix"] + _implied(
        arrays["topk_logprobs"], cnt, arrays["at_student_logprobs"], s_cnt
    )
    return CachedScores(
        **every,
        kept=arrays["n_kept"],
        s_cnt=s_cnt,
        s_ids=student.ids,
        s_lp=codecs.from_entry(arrays["at_student_logprobs"], profile),
        s_rank=s_rank,
        rank=ragged.remaining(s_rank, s_cnt, cnt),
    )


def split_by_student(cached: CachedScores, student: IdLists) -> CachedScores:
    """Move ids of the student's list to the student's part of scores in a `full` layout."""
    index = ragged.find(cached.ids, cached.cnt, student.ids, student.cnt)
    listed = index >= 0
    at = np.repeat(ragged.starts(cached.cnt)[:-1], student.cnt)[listed] + index[listed]
    others = np.ones(len(cached.ids), bool)
    others[at] = False
    s_cnt = ragged.count_marked(listed, student.cnt)
    return replace(
        cached,
        s_cnt=s_cnt,
        s_ids=cached.ids[at],
        s_lp=cached.entry_lp[at],
        s_rank=cached.rank[at],
        cnt=cached.cnt - s_cnt,
        ids=cached.ids[others],
        entry_lp=cached.entry_lp[others],
        rank=cached.rank[others],
    )


def ranked(cached: CachedScores) -> Ranked:
    """Return all entries of each row, best first."""
    cnt = cached.s_cnt.astype(np.int64) + cached.cnt
    offset = ragged.starts(cnt)[:-1]
    ids = np.empty(int(cnt.sum()), np.uint32)
    lp = np.empty(len(ids), np.float32)
    s_at = np.repeat(offset, cached.s_cnt) + cached.s_rank
    at = np.repeat(offset, cached.cnt) + cached.rank
    ids[s_at], lp[s_at] = cached.s_ids, cached.s_lp
    ids[at], lp[at] = cached.ids, cached.entry_lp
    return Ranked(cnt, ids, lp)


def kept_lists(cached: CachedScores) -> tuple[Array, Array]:
    """Return (ids, log-probs) of the teacher's lists, flat, best first, `kept` in each row."""
    cnt, ids, lp = ranked(cached)
    kept = ragged.index_in_row(cnt) < np.repeat(cached.kept, cnt)
    return ids[kept], lp[kept]


def _implied(lp_x: Array, cnt_x: Array, lp_s: Array, cnt_s: Array) -> Array:
    """Return for each student id the number [S] uint16 of U whose stored value orders before it."""
    x, s = stored_order(lp_x), stored_order(lp_s)
    implied: Array = ragged.count_less(x, cnt_x, s, cnt_s) + ragged.rank_in_row(s, cnt_s)
    return implied
