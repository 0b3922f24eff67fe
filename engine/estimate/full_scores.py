"""Scores of teacher and student on a sample, with more entries than any setting keeps.

Where both return all logits, the KL is over the whole vocabulary. A teacher that returns only top-k
log-probs gives these and a tail: the KL of both models coarsened to them is a lower bound of the
full KL (log-sum inequality).

Shapes: P rows, W entries of the teacher, S ids of the student's top-k.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from logitcask.engine.backends.row_scores import ScoreBuilder
from logitcask.engine.backends.scoring import paired_logits
from logitcask.engine.store.format import ragged
from logitcask.engine.types import Array, IdLists, Rollouts, ScoreParams, Scores


@dataclass(frozen=True, kw_only=True, slots=True)
class FullScores:
    """Both models at the teacher's W best ids, and their KL."""

    scores: Scores
    """The teacher's: at most W entries in every row, and the student's ids where it can score
    requested ids."""
    ids: Array
    """[P, W] uint32, the teacher's ids, best first."""
    log_q: Array
    """[P, W] float32, their log-probs; -inf where a row has fewer."""
    log_p: Array
    """[P, W] float64, the student's log-probs at them; -inf likewise."""
    listed: Array
    """[P, W] bool, the id is also in the student's top-k."""
    student: Scores
    """The student's: S entries in every row."""
    forward: Array = field(default_factory=lambda: np.zeros(0))
    """[P] float64, KL(q || p), nats."""
    reverse: Array = field(default_factory=lambda: np.zeros(0))
    """[P] float64, KL(p || q)."""
    kl_over: str = "the whole vocabulary"
    """Ids that both KL are over."""

    @property
    def at_student(self) -> bool:
        """Return True if the teacher has scored the student's ids."""
        return self.scores.at_lp is not None

    def coarse_kl(self, mask: Array, log_q: Array, at_lp: Array | None) -> tuple[Array, Array]:
        """Return ([P] KL(q || p), [P] KL(p || q)) of both models coarsened to some ids and a tail.

        These are the entries in `mask` [P, W] and, where the teacher has scored them, the student's
        ids; log_q, at_lp: the teacher's values there, exact or as stored. Nats, float64.
        """
        rows = len(mask)
        others = mask & ~self.listed if self.at_student else mask
        q = [np.where(others, log_q.astype(np.float64), -np.inf)]
        p = [np.where(others, self.log_p, -np.inf)]
        if at_lp is not None:
            q.insert(0, at_lp.reshape(rows, -1).astype(np.float64))
            p.insert(0, self.student.entry_lp.reshape(rows, -1).astype(np.float64))
        mass_p = np.exp(np.concatenate(p, 1)).sum(1)
        with np.errstate(divide="ignore"):
            tail_p = np.log(np.maximum(1 - mass_p, 0))
        all_q = np.concatenate([*q, self.log_tail(mask)[:, None]], 1)
        all_p = np.concatenate([*p, tail_p[:, None]], 1)
        # Stored values are rounded, and a loss renormalises them.
        all_q -= np.logaddexp.reduce(all_q, axis=1, keepdims=True)
        finite = np.isfinite(all_q) & np.isfinite(all_p)
        gap = np.where(finite, all_q - np.where(finite, all_p, 0), 0)
        return (np.exp(all_q) * gap).sum(1), -(np.exp(all_p) * gap).sum(1)

    def log_tail(self, mask: Array) -> Array:
        """Return [P] float64, the log of the teacher's mass outside the ids of `coarse_kl`."""
        inside = mask | self.listed if self.at_student else mask
        dropped = np.where(inside, -np.inf, self.log_q.astype(np.float64))
        tail: Array = np.logaddexp(
            np.logaddexp.reduce(dropped, axis=1), self.scores.log_tail.astype(np.float64)
        )
        return tail


def full_scores(teacher: Any, student: Any, rolled: Rollouts, k_max: int) -> FullScores:
    """Score rollouts with both models; W = k_max.

    teacher, student: backends over one vocabulary; the student has the capability "at_ids".
    """
    assert rolled.student is not None, "the student has scored its rollouts"
    if "logits" in teacher.capabilities and "logits" in student.capabilities:
        return _from_logits(teacher, student, rolled, rolled.student, k_max)
    # k_min = 1: the best ids can include padding of the head, which is dropped.
    params = ScoreParams(
        top_p=1.0, k_min=1, k_max=k_max, at_student="at_ids" in teacher.capabilities
    )
    scores = teacher.score(rolled, params)
    at = IdLists(cnt=scores.cnt, ids=scores.ids)
    one = ScoreParams(entry_kind="topk", top_p=1.0, k_min=1, k_max=1, at_student=False)
    at_lp = student.score(rolled, one, at).at_lp
    log_p = ragged.matrix(at_lp, scores.cnt, -np.inf)[0].astype(np.float64)
    full = _full(scores, rolled.student, log_p)
    forward, reverse = full.coarse_kl(np.isfinite(full.log_q), full.log_q, scores.at_lp)
    kl_over = f"the teacher's {full.ids.shape[1]} best ids and a tail: it shows no more"
    return replace(full, forward=forward, reverse=reverse, kl_over=kl_over)


def _from_logits(
    teacher: Any, student: Any, rolled: Rollouts, own: Scores, k_max: int
) -> FullScores:
    width = min(k_max, teacher.n_vocab)
    params = ScoreParams(entry_kind="topk", top_p=1.0, k_min=width, k_max=width)
    builder = ScoreBuilder(rolled, params, IdLists(cnt=own.cnt, ids=own.ids))
    log_p = np.empty((rolled.positions, width))
    forward, reverse = np.empty((2, rolled.positions))
    for rows, q_logits, p_logits in paired_logits(teacher, student, rolled):
        q = q_logits.double().log_softmax(1)
        p = p_logits.double().log_softmax(1).to(q_logits.device)
        forward[rows] = (q.exp() * (q - p)).sum(1).cpu()
        reverse[rows] = (p.exp() * (p - q)).sum(1).cpu()
        builder.write(rows, q_logits)
        log_p[rows] = np.take_along_axis(p.cpu().numpy(), builder.ids[rows].astype(np.int64), 1)
    return replace(_full(builder.scores(), own, log_p), forward=forward, reverse=reverse)


def _full(scores: Scores, own: Scores, log_p: Array) -> FullScores:
    """Return full scores without KL; log_p: [P, W], the student's at the teacher's entries."""
    ids, valid = ragged.matrix(scores.ids.astype(np.uint32), scores.cnt, 0)
    log_q, _ = ragged.matrix(scores.entry_lp, scores.cnt, -np.inf)
    listed = np.zeros(valid.shape, bool)
    for column in own.ids.reshape(len(valid), -1).T:
        listed |= valid & (ids == column[:, None])
    return FullScores(scores=scores, ids=ids, log_q=log_q, log_p=log_p, listed=listed, student=own)
