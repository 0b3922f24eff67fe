"""The positions of a snapshot as rows of a table: rollouts, the student's and a teacher's scores.

A segment is read at a time, and its rows are made in blocks, so memory is bounded by a segment.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch

from logitcask.engine.metrics.metrics import renormalised
from logitcask.engine.objectives.divergences import DIVERGENCES
from logitcask.engine.store import ScoreSegments, Segment, Snapshot, Store
from logitcask.engine.store.format.layouts import ranked
from logitcask.engine.store.format.ragged import find, matrix, starts
from logitcask.engine.store.inspect import choose, choose_teacher
from logitcask.engine.store.spans.views import check_tokens
from logitcask.engine.types import LENGTH, STOP, Array, CachedScores, Rollouts, Scores

ROWS = 32_768
"""Rows of a block at most."""

COLUMNS = {
    "rollouts": "string",
    "segment": "string",
    "sequence": "int64",
    "prompt": "string",
    "position": "int32",
    "token": "uint32",
    "loss_mask": "bool",
    "finish_reason": "string",
    "reward": "float32",
    "policy_version_start": "int64",
    "policy_version_end": "int64",
    "behavior_logprob": "float32",
    "student_logprob": "float32",
    "student_entropy": "float32",
    "student_log_tail": "float32",
    "student_topk_ids": "list<uint32>",
    "student_topk_logprobs": "list<float32>",
    "mc_ids": "list<uint32>",
    "mc_multiplicities": "list<uint16>",
    "mc_logprobs": "list<float32>",
    "teacher": "string",
    "teacher_logprob": "float32",
    "teacher_entropy": "float32",
    "teacher_entropy_upper": "float32",
    "teacher_log_tail": "float32",
    "teacher_ids": "list<uint32>",
    "teacher_logprobs": "list<float32>",
    "teacher_multiplicities": "list<uint16>",
    "teacher_n_kept": "uint16",
    "kl_n_ids": "uint16",
    "forward_kl": "float32",
    "reverse_kl": "float32",
}
"""Column -> type, in their order; README.md explains each."""
TEXT = "text"
"""Column of the token's text, after `token`, where a tokenizer is given."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of n rows."""

    values: Any
    """[n] numbers or texts; of lists their entries, flat."""
    counts: Array | None = None
    """[n] entries of each list; None for a column without lists."""
    valid: Array | None = None
    """[n] bool, False = null; None = no row is null."""


Block: TypeAlias = dict[str, Column | None]
"""Name of COLUMNS -> its rows; None = all are null."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The rollout segments of a name, and a teacher's scores of them."""

    rollouts: str
    teacher: str | None
    """None where the store has no scores."""
    segments: tuple[tuple[Segment, ScoreSegments], ...]
    """Without scores: an empty tuple."""
    first: tuple[int, ...]
    """Number of each segment's first sequence, as `store show --sequence` counts them."""


def select(
    snapshot: Snapshot,
    *,
    rollouts: str | None = None,
    teacher: str | None = None,
    spans: bool = False,
) -> Selection:
    """Choose rollouts and a teacher by name; each may be None where there is one.

    spans: a teacher with another tokenizer is right too. Raises ConfigError for an unknown or
    ambiguous name, and for such a teacher otherwise; IncompleteError without rollouts.
    """
    name = choose(snapshot.names("rollout"), rollouts, what="rollouts")
    scored = teacher is not None or bool(snapshot.names("score"))
    chosen = choose_teacher(snapshot, teacher) if scored else None
    if chosen is not None and not spans:
        check_tokens(snapshot, chosen)
    scores = {} if chosen is None else snapshot.scores(chosen)
    segments = tuple((each, scores.get(each.seg_id, ())) for each in snapshot.rollouts(name))
    sequences = [each.counts["N"] for each, _ in segments]
    return Selection(
        rollouts=name,
        teacher=chosen,
        segments=segments,
        first=tuple(starts(np.asarray(sequences, np.int64))[:-1].tolist()),
    )


def positions(
    store: Store,
    snapshot: Snapshot | None = None,
    *,
    rollouts: str | None = None,
    teacher: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield one mapping a response position, with the keys of COLUMNS; lists as lists.

    Raises as `select`, and IntegrityError for damage.
    """
    selection = select(
        store.head() if snapshot is None else snapshot, rollouts=rollouts, teacher=teacher
    )
    for index in range(len(selection.segments)):
        for block in blocks(store, selection, index):
            yield from rows_of(block)


def blocks(store: Store, selection: Selection, index: int) -> Iterator[Block]:
    """Read a segment of the selection and its scores, and yield its rows in blocks."""
    segment, score_segments = selection.segments[index]
    data = store.read_rollouts(segment)
    scores = store.read_scores(score_segments, base=data) if score_segments else None
    made = _columns(segment, data, scores, selection.first[index])
    made["rollouts"] = Column(np.full(data.positions, selection.rollouts))
    if scores is not None:
        made["teacher"] = Column(np.full(data.positions, selection.teacher), valid=scores.scored)
    offsets = {
        name: starts(each.counts)
        for name, each in made.items()
        if each is not None and each.counts is not None
    }
    student, pair = data.student, None
    # Draws are no top list: the mass outside of them is not stored as one number.
    if scores is not None and student is not None and scores.mult is None:
        pair = (student, scores)
        lists = [starts(each) for each in (student.cnt, scores.s_cnt, scores.cnt)]
    for first in range(0, data.positions, ROWS):
        rows = slice(first, min(first + ROWS, data.positions))
        block = {name: _part(made[name], rows, offsets.get(name)) for name in COLUMNS}
        if pair is not None:
            block |= _kl_columns(*pair, rows, lists)
        yield block


def rows_of(block: Block) -> Iterator[dict[str, Any]]:
    """Yield the rows of a block as mappings of Python values."""
    count = next(len(each.values) for each in block.values() if each and each.counts is None)
    columns = {name: _python(each, count) for name, each in block.items()}
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _python(column: Column | None, count: int) -> list[Any]:
    if column is None:
        return [None] * count
    if column.counts is None:
        found = column.values.tolist()
    else:
        off = starts(column.counts).tolist()
        flat = column.values.tolist()
        found = [flat[a:b] for a, b in pairwise(off)]
    if column.valid is None:
        return list(found)
    return [each if valid else None for each, valid in zip(found, column.valid, strict=True)]


def _part(column: Column | None, rows: slice, offsets: Array | None) -> Column | None:
    """Return some rows of a column; offsets: those of its lists."""
    if column is None:
        return None
    valid = None if column.valid is None else column.valid[rows]
    if offsets is None or column.counts is None:
        return Column(column.values[rows], valid=valid)
    entries = column.values[int(offsets[rows.start]) : int(offsets[rows.stop])]
    return Column(entries, column.counts[rows], valid)


def _columns(segment: Segment, data: Rollouts, scores: CachedScores | None, first: int) -> Block:
    """Return the columns of a whole segment without its names."""
    lengths = data.lengths()
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    ids = np.asarray([prompt.id for prompt in data.prompts], object)
    finish = np.full(len(lengths), "", object)
    for code, text in ((STOP, "stop"), (LENGTH, "length")):
        finish[data.finish == code] = text
    made: Block = dict.fromkeys(COLUMNS)
    made |= {
        "segment": Column(np.full(data.positions, segment.seg_id)),
        "sequence": Column(first + sequence),
        "prompt": Column(ids[data.seq_prompt[sequence]]),
        "position": Column(np.arange(data.positions) - data.seq_off[:-1][sequence]),
        "token": Column(data.tokens),
        "loss_mask": Column(data.loss_mask != 0),
        "finish_reason": Column(finish[sequence]),
        "policy_version_start": Column(data.version_start[sequence]),
        "policy_version_end": Column(data.version_end[sequence]),
        "behavior_logprob": Column(data.b_lp, valid=~np.isnan(data.b_lp)),
    }
    if data.reward is not None:
        made["reward"] = Column(data.reward[sequence])
    if (draws := data.draws) is not None:
        made["mc_ids"] = Column(draws.ids, draws.cnt)
        made["mc_multiplicities"] = Column(draws.mult, draws.cnt)
        made["mc_logprobs"] = Column(draws.lp, draws.cnt)
    if (student := data.student) is not None:
        made["student_logprob"] = Column(student.lp)
        made["student_entropy"] = Column(student.entropy)
        made["student_log_tail"] = Column(student.log_tail)
        made["student_topk_ids"] = Column(student.ids, student.cnt)
        made["student_topk_logprobs"] = Column(student.entry_lp, student.cnt)
    if scores is None:
        return made
    valid = scores.scored
    cnt, best, lp = ranked(scores)
    made |= {
        "teacher_logprob": Column(scores.lp, valid=valid),
        "teacher_entropy": Column(scores.entropy, valid=valid),
        "teacher_log_tail": Column(scores.log_tail, valid=valid),
        "teacher_ids": Column(best, cnt, valid),
        "teacher_logprobs": Column(lp, cnt, valid),
        "teacher_n_kept": Column(scores.kept, valid=valid),
    }
    if scores.entropy_hi is not None:
        made["teacher_entropy_upper"] = Column(scores.entropy_hi, valid=valid)
    if scores.mult is not None:
        made["teacher_multiplicities"] = Column(_by_rank(scores, scores.mult, cnt), cnt, valid)
    return made


def _kl_columns(
    student: Scores, scores: CachedScores, rows: slice, offsets: Sequence[Array]
) -> Block:
    """Return the columns of the KL of some rows, which take most of the time of a block."""
    valid = None if scores.scored is None else scores.scored[rows]
    count, forward, reverse = _kl(student, scores, rows, offsets)
    # No id in common says nothing, though its KL would be that of two buckets: 0.
    common = (count > 0) if valid is None else (count > 0) & valid
    return {
        "kl_n_ids": Column(count, valid=valid),
        "forward_kl": Column(forward, valid=common),
        "reverse_kl": Column(reverse, valid=common),
    }


def _by_rank(scores: CachedScores, mult: Array, cnt: Array) -> Array:
    """Return the draws of all stored ids, in the order of `ranked`; 0 for those not drawn."""
    out = np.zeros(int(cnt.sum()), np.uint16)
    out[np.repeat(starts(cnt)[:-1], scores.cnt) + scores.rank] = mult
    return out


def _kl(
    student: Scores, scores: CachedScores, rows: slice, offsets: Sequence[Array]
) -> tuple[Array, Array, Array]:
    """Return (ids compared, KL(q || p), KL(p || q)) of n rows, each [n], of the student that
    sampled.

    Both distributions are coarsened to the ids of the student's list that the teacher scored and
    one bucket of all others, and normalised, since entries are rounded. So each is a lower bound
    of the KL over the whole vocabulary. The bucket is left out where one side has no mass in it.
    offsets: of the lists of the student, of the teacher at the student's ids, and of the teacher.
    """
    of, of_s, of_t = (slice(int(off[rows.start]), int(off[rows.stop])) for off in offsets)
    listed = student.cnt[rows]
    at = find(student.ids[of], listed, scores.s_ids[of_s], scores.s_cnt[rows])
    entry = np.repeat(starts(listed)[:-1], scores.s_cnt[rows]) + at
    flat = np.full(int(listed.sum(dtype=np.int64)), -np.inf)
    flat[entry] = scores.s_lp[of_s]
    scored = np.zeros(len(flat), bool)
    scored[entry] = True
    log_p, _ = matrix(student.entry_lp[of].astype(np.float64), listed, -np.inf)
    log_q, _ = matrix(flat, listed, -np.inf)
    known, _ = matrix(scored, listed, False)
    others, _ = matrix(scores.entry_lp[of_t].astype(np.float64), scores.cnt[rows], -np.inf)
    # An id without mass on one side goes to the bucket, as in the losses.
    on = known & (log_p != -np.inf) & (log_q != -np.inf)
    p_rest = _with_tail(student.log_tail[rows], np.where(on, -np.inf, log_p))
    q_rest = _with_tail(scores.log_tail[rows], others, np.where(known & ~on, log_q, -np.inf))
    both = (p_rest != -np.inf) & (q_rest != -np.inf)
    mask = torch.from_numpy(np.concatenate([on, both[:, None]], 1))
    p, q = (
        renormalised(torch.from_numpy(np.concatenate([x, rest[:, None]], 1)), mask)
        for x, rest in ((log_p, p_rest), (log_q, q_rest))
    )
    forward, reverse = (
        DIVERGENCES[name](p, q, mask, 0.0).numpy().astype(np.float32)
        for name in ("forward_kl", "reverse_kl")
    )
    return on.sum(1).astype(np.uint16), forward, reverse


def _with_tail(log_tail: Array, *left: Array) -> Array:
    """Return the log of a tail's mass [n] and of all entries in `left`, each [n, K]."""
    every = np.concatenate([log_tail.astype(np.float64)[:, None], *left], 1)
    total: Array = np.logaddexp.reduce(every, axis=1)
    return total


def token_texts(tokenizer: Any, tokens: Array, texts: dict[int, str]) -> Array:
    """Return the text [n] of each token id; `texts` keeps those of earlier calls."""
    for token in np.unique(tokens).tolist():
        if token not in texts:
            texts[token] = tokenizer.decode([token])
    return np.asarray([texts[token] for token in tokens.tolist()], object)
