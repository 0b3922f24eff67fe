"""Agreement of a teacher with the student that sampled, row by row, and its means over prompts.

p is the student that sampled, as stored, q the teacher; S(p) and S(q) are their top-k. The numbers
are those of `METRICS` (engine/metrics) for the stored student:

    overlap/ratio                      |S(p) and S(q)| / k (Eq. 6 of arXiv 2604.13016)
    overlap/mass_student, _teacher     mass of the common ids under p and under q (Eq. 9 and 10)
    topk/mass_student, _teacher        mass of S(p) under p and of S(q) under q, which bound them
    overlap/advantage                  (1 / |I|) sum_I p-(v) [log q-(v) - log p-(v)], nats (Eq. 7)
    acceptance                         sum_I min(p(v), q(v)): chance that one token serves both
    entropy/gap                        |H(q) - H(p)|, nats (Eq. 8)
    entropy/teacher, entropy/student   nats, over the vocabulary
    kl/reverse_bound, _forward_bound   nats, lower bounds: see engine/exchange/README.md
    novelty                            1 - sum_S(p) q(v): mass of the teacher outside S(p)

A novelty counts ids of S(p) that the teacher did not score as outside: an upper bound by less than
the mass that its stored ids leave.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from logitcask.engine.errors import IncompleteError
from logitcask.engine.exchange.positions import Block, blocks, select
from logitcask.engine.probes.columns import (
    column_of,
    counted_rows,
    lists_of,
    numbers_of,
    teacher_entropy,
)
from logitcask.engine.probes.reward import clustered_mean
from logitcask.engine.store import Snapshot, Store
from logitcask.engine.types import Array

MEASURES = (
    *("overlap/ratio", "overlap/mass_student", "overlap/mass_teacher", "overlap/advantage"),
    *("topk/mass_student", "topk/mass_teacher", "acceptance"),
    *("entropy/gap", "entropy/teacher", "entropy/student"),
    *("kl/reverse_bound", "kl/forward_bound", "novelty"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean, and its standard error over prompts."""

    mean: float
    se: float | None
    """None for a single prompt."""

    def beyond(self, level: float) -> int:
        """Return 1 or -1 if the mean is above or below `level` by two standard errors, else 0."""
        if self.se is None or not abs(self.mean - level) > 2 * self.se:
            return 0
        return 1 if self.mean > level else -1


@dataclass(frozen=True, kw_only=True, slots=True)
class AgreementRows:
    """The scored rows that count in a loss."""

    values: Mapping[str, Array]
    """Name of MEASURES -> [P] float64; NaN where a row has none."""
    prompt: Array
    """[P] int64, number of the prompt in `prompts`."""
    position: Array
    """[P] int64, which token of its response a row predicts, from 0."""
    reward: Array
    """[P] float64, the grader's reward of the row's response; NaN without one."""
    prompts: tuple[str, ...]
    """Ids of the prompts."""

    def mean(self, name: str, rows: Array | None = None) -> Estimate | None:
        """Return the mean of a measure over the marked rows [P] bool; None where none has it."""
        chosen = ~np.isnan(self.values[name])
        chosen &= True if rows is None else rows
        if not chosen.any():
            return None
        return estimate(self.values[name][chosen], self.prompt[chosen])

    def ratio(self, above: str, below: str) -> Estimate:
        """Return the mean of a measure over that of another; its error is of the residuals
        `above - ratio * below` of the prompts.
        """
        x, y = self.values[above], self.values[below]
        total = float(y.mean())
        if total <= 0:
            return Estimate(mean=1.0 if float(x.mean()) <= 0 else math.inf, se=None)
        ratio = float(x.mean()) / total
        residual = estimate(x - ratio * y, self.prompt)
        return Estimate(mean=ratio, se=None if residual.se is None else residual.se / total)

    def weakest(self, least_prompts: int) -> tuple[int, Estimate] | None:
        """Return the position whose acceptance is lowest, error included, and its mean.

        Only positions with rows of so many prompts; None where there is none.
        """
        order = np.argsort(self.position, kind="stable")
        cuts = np.flatnonzero(np.diff(self.position[order])) + 1
        found = None
        for rows in np.split(order, cuts):
            if len(np.unique(self.prompt[rows])) < least_prompts:
                continue
            each = estimate(self.values["acceptance"][rows], self.prompt[rows])
            upper = each.mean + 2 * (each.se or 0)
            if found is None or upper < found[0]:
                found = upper, int(self.position[rows[0]]), each
        return None if found is None else found[1:]

    def correct(self, correct_from: float) -> Array:
        """Return [P] bool: the row is of a response with a reward of at least `correct_from`."""
        return self.reward >= correct_from


def estimate(values: Array, prompt: Array) -> Estimate:
    """Return the mean of [N] values; prompt: [N] int64, number of each one's prompt."""
    mean, error = clustered_mean(values, prompt)
    return Estimate(mean=mean, se=None if np.isnan(error) else error)


def agreement(
    store: Store, snapshot: Snapshot, *, rollouts: str, teacher: str, k: int, swapped: bool = False
) -> AgreementRows:
    """Measure the rows of rollouts with the scores of `teacher` at this k.

    swapped: the teacher sampled, and the scores `teacher` are the student's; only the novelty is
    then a number of both lists. Raises IncompleteError without scores, or where a list is shorter
    than k, and as `select`.
    """
    selection = select(snapshot, rollouts=rollouts, teacher=teacher)
    number_of: dict[str, int] = {}
    found: list[tuple[dict[str, Array], Array, Array, Array]] = []
    for index, (segment, scores) in enumerate(selection.segments):
        if not scores:
            raise IncompleteError(
                f"rollouts {segment.seg_id} have no scores of {teacher!r}",
                hint="rerun the same command, which scores what is missing",
            )
        sampled = int(segment.provenance.get("set", {}).get("student_topk", 0))
        listed = int(scores[0].provenance["request"]["teacher_topk_min"])
        if min(sampled, listed) < k:
            raise IncompleteError(
                f"k = {k}, and rollouts {rollouts!r} hold {sampled} ids of the sampler and "
                f"{listed} of {teacher!r} in each row",
                hint="give a smaller --k, or another --store or --rollouts for this one",
            )
        for block in blocks(store, selection, index):
            found.append(_measure(block, k, number_of, swapped=swapped))
    names = found[0][0] if found else ()
    return AgreementRows(
        values={name: np.concatenate([each[0][name] for each in found]) for name in names},
        prompt=np.concatenate([each[1] for each in found]),
        reward=np.concatenate([each[2] for each in found]),
        position=np.concatenate([each[3] for each in found]),
        prompts=tuple(number_of),
    )


def _measure(
    block: Block, k: int, number_of: dict[str, int], *, swapped: bool
) -> tuple[dict[str, Array], Array, Array, Array]:
    """Return measures, numbers of the prompts, rewards and positions of the rows that count."""
    counts = counted_rows(block)
    sampler = lists_of(block, "student_topk_ids", "student_topk_logprobs", counts)
    scorer = lists_of(block, "teacher_ids", "teacher_logprobs", counts)
    ids = column_of(block, "prompt")[counts]
    prompt = np.array([number_of.setdefault(each, len(number_of)) for each in ids], np.int64)
    reward, position = numbers_of(block, "reward")[counts], column_of(block, "position")[counts]
    if swapped:
        return {"novelty": novelty(sampler, scorer[0][:, :k])}, prompt, reward, position
    q, p = teacher_entropy(block)[counts], numbers_of(block, "student_entropy")[counts]
    values = {
        **overlap((sampler[0][:, :k], sampler[1][:, :k]), (scorer[0][:, :k], scorer[1][:, :k])),
        **{"entropy/gap": np.abs(q - p), "entropy/teacher": q, "entropy/student": p},
        "kl/reverse_bound": numbers_of(block, "reverse_kl")[counts],
        "kl/forward_bound": numbers_of(block, "forward_kl")[counts],
        "novelty": novelty(scorer, sampler[0][:, :k]),
    }
    return values, prompt, reward, position


Lists = tuple[Array, Array]
"""([P, K] int64 ids, [P, K] float64 log-probs), best first; -inf where a row has fewer."""


def overlap(student: Lists, teacher: Lists) -> dict[str, Array]:
    """Return the seven measures of S(p) and S(q), each [P]; both lists hold k ids.

    The advantage is 0 in rows with at most one common id, as in METRICS.
    """
    k = student[0].shape[1]
    same = student[0][:, :, None] == teacher[0][:, None, :]  # [P, k, k]
    common = same.any(2)
    log_q = np.where(same, teacher[1][:, None, :], -np.inf).max(2)  # at the student's ids
    finite = common & (log_q > -np.inf) & (student[1] > -np.inf)
    p, q = (_renormalised(each, finite) for each in (student[1], log_q))
    gap = np.where(finite, np.where(finite, q, 0) - np.where(finite, p, 0), 0)
    advantage = (np.exp(p) * gap).sum(1) / np.maximum(finite.sum(1), 1)
    return {
        "overlap/ratio": common.sum(1) / k,
        "overlap/mass_student": (np.exp(student[1]) * common).sum(1),
        "overlap/mass_teacher": np.exp(log_q).sum(1),
        "overlap/advantage": advantage,
        "topk/mass_student": np.exp(student[1]).sum(1),
        "topk/mass_teacher": np.exp(teacher[1]).sum(1),
        "acceptance": np.exp(np.minimum(student[1], log_q)).sum(1),
    }


def novelty(teacher: Lists, student_ids: Array) -> Array:
    """Return [P] the teacher's mass outside the student's ids [P, k]."""
    listed = (teacher[0][:, :, None] == student_ids[:, None, :]).any(2) & (teacher[1] > -np.inf)
    inside: Array = (np.exp(teacher[1]) * listed).sum(1)
    outside: Array = np.clip(1 - inside, 0, 1)
    return outside


def _renormalised(log_x: Array, mask: Array) -> Array:
    """Return log_x [P, k] normalised over the ids in `mask`; -inf elsewhere and for none."""
    kept = np.where(mask, log_x, -np.inf)
    total = np.logaddexp.reduce(kept, axis=1, keepdims=True)
    out: Array = kept - np.where(np.isfinite(total), total, 0)
    return out
