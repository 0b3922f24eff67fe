"""Teacher and student on the rows of a sample, wider than any setting keeps.

Where both show all their logits, the KL of the two is over the whole vocabulary. A teacher that
tells its best ids alone is known by those and a tail: the KL of both coarsened to that is the most
that is known of the whole one, and never above it (log-sum inequality).

Shapes: P rows, W wide entries, S ids of the student's list.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcask.engine.backends.scoring import ScoreBuilder, row_logits
from logitcask.engine.store.format import ragged
from logitcask.engine.types import Array, IdLists, Rollouts, ScoreParams, Scores

WHOLE = "the whole vocabulary"


@dataclass(frozen=True, kw_only=True, slots=True)
class WideScores:
    scores: Scores
    """The teacher's, as it was asked: at most W entries in every row, and the student's ids where
    it answers at chosen ones."""
    ids: Array
    """[P, W] uint32, its entries, best first."""
    log_q: Array
    """[P, W] float32, their log-probs; -inf where a row has fewer."""
    log_p: Array
    """[P, W] float64, the student's log-probs at them; -inf likewise."""
    listed: Array
    """[P, W] bool, the student's list names it too."""
    own: Scores
    """The student's: S entries in every row."""

    @property
    def asked(self) -> bool:
        """Whether the teacher was asked at the student's ids."""
        return self.scores.at_lp is not None

    def coarse(self, kept: Array, log_q: Array, at_lp: Array | None) -> tuple[Array, Array]:
        """([P] KL(q || p), [P] KL(p || q)) of both models coarsened to the `kept` [P, W] entries,
        the student's list where the teacher was asked at it, and a tail; nats, float64.

        log_q, at_lp: the teacher's values, as they are or as they would be stored.
        """
        rows = len(kept)
        on = kept & ~self.listed if self.asked else kept
        q = [np.where(on, log_q.astype(np.float64), -np.inf)]
        p = [np.where(on, self.log_p, -np.inf)]
        if at_lp is not None:
            q.insert(0, at_lp.reshape(rows, -1).astype(np.float64))
            p.insert(0, self.own.entry_lp.reshape(rows, -1).astype(np.float64))
        known = np.exp(np.concatenate(p, 1)).sum(1)
        with np.errstate(divide="ignore"):
            tail_p = np.log(np.maximum(1 - known, 0))
        all_q = np.concatenate([*q, self.log_tail(kept)[:, None]], 1)
        all_p = np.concatenate([*p, tail_p[:, None]], 1)
        # What is stored is rounded, and a loss renormalises it.
        all_q -= np.logaddexp.reduce(all_q, axis=1, keepdims=True)
        there = np.isfinite(all_q) & np.isfinite(all_p)
        gap = np.where(there, all_q - np.where(there, all_p, 0), 0)
        return (np.exp(all_q) * gap).sum(1), -(np.exp(all_p) * gap).sum(1)

    def log_tail(self, kept: Array) -> Array:
        """[P] float64, the teacher's mass outside the kept entries and, where it was asked at them,
        the student's ids.
        """
        inside = kept | self.listed if self.asked else kept
        dropped = np.where(inside, -np.inf, self.log_q.astype(np.float64))
        tail: Array = np.logaddexp(
            np.logaddexp.reduce(dropped, axis=1), self.scores.log_tail.astype(np.float64)
        )
        return tail


@dataclass(frozen=True, kw_only=True, slots=True)
class FullScores:
    """The rows, and what a setting's loss is compared with."""

    rows: WideScores
    forward: Array
    """[P] float64, KL(q || p), nats."""
    reverse: Array
    """[P] float64, KL(p || q)."""
    over: str
    """What these are over."""


def full_scores(teacher: Any, student: Any, rolled: Rollouts, k_max: int) -> FullScores:
    """teacher, student: backends over one vocabulary, the student with "at_ids"; k_max: W."""
    if "logits" in teacher.capabilities and "logits" in student.capabilities:
        return _by_logits(teacher, student, rolled, k_max)
    own = _own(rolled)
    # Ids of a padded head may take places of its best.
    asked = ScoreParams(
        top_p=1.0, k_min=1, k_max=k_max, at_student="at_ids" in teacher.capabilities
    )
    scores = teacher.score(rolled, asked)
    at = IdLists(cnt=scores.cnt, ids=scores.ids)
    one = ScoreParams(entry_kind="topk", top_p=1.0, k_min=1, k_max=1, at_student=False)
    at_lp = student.score(rolled, one, at).at_lp
    rows = _wide(scores, own, ragged.matrix(at_lp, scores.cnt, -np.inf)[0].astype(np.float64))
    everything = np.isfinite(rows.log_q)
    forward, reverse = rows.coarse(everything, rows.log_q, scores.at_lp)
    width = rows.ids.shape[1]
    return FullScores(
        rows=rows,
        forward=forward,
        reverse=reverse,
        over=f"the teacher's {width} best ids and a tail: it shows no more",
    )


def _by_logits(teacher: Any, student: Any, rolled: Rollouts, k_max: int) -> FullScores:
    own = _own(rolled)
    width = min(k_max, teacher.n_vocab)
    asked = ScoreParams(entry_kind="topk", top_p=1.0, k_min=width, k_max=width)
    sheet = ScoreBuilder(rolled, asked, IdLists(cnt=own.cnt, ids=own.ids))
    log_p = np.empty((rolled.positions, width))
    forward, reverse = np.empty((2, rolled.positions))
    tokens = min(teacher.batch_tokens, student.batch_tokens)
    both = zip(
        row_logits(teacher, rolled, batch_tokens=tokens),
        row_logits(student, rolled, batch_tokens=tokens),
        strict=True,
    )
    for (rows, q_logits), (_, p_logits) in both:
        q, p = (
            q_logits.double().log_softmax(1),
            p_logits.double().log_softmax(1).to(q_logits.device),
        )
        forward[rows] = (q.exp() * (q - p)).sum(1).cpu()
        reverse[rows] = (p.exp() * (p - q)).sum(1).cpu()
        sheet.write(rows, q_logits)
        log_p[rows] = np.take_along_axis(p.cpu().numpy(), sheet.ids[rows].astype(np.int64), 1)
    return FullScores(
        rows=_wide(sheet.scores(), own, log_p), forward=forward, reverse=reverse, over=WHOLE
    )


def _own(rolled: Rollouts) -> Scores:
    assert rolled.student is not None, "the student has scored its rollouts"
    return rolled.student


def _wide(scores: Scores, own: Scores, log_p: Array) -> WideScores:
    """log_p: [P, W], the student's at the teacher's entries."""
    ids, valid = ragged.matrix(scores.ids.astype(np.uint32), scores.cnt, 0)
    log_q, _ = ragged.matrix(scores.entry_lp, scores.cnt, -np.inf)
    listed = np.zeros(valid.shape, bool)
    for column in own.ids.reshape(len(valid), -1).T:
        listed |= valid & (ids == column[:, None])
    return WideScores(scores=scores, ids=ids, log_q=log_q, log_p=log_p, listed=listed, own=own)
