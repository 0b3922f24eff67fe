"""Bias and variance of the gradients that estimate reverse KL over the whole vocabulary.

Both models score a sample of rows, float64. By the student's logits z of a row, with A = log p -
log q and K = KL(p || q), the gradient is

    g_v = p_v (A_v - K)

An estimator returns a random g^; per row

    bias      ||E g^ - g|| / ||g||
    variance  E ||g^ - E g^||^2 / ||g||^2

Nothing is drawn here: E is a sum over the vocabulary. e_y is the unit vector of id y, r and t the
mass of p and q outside S, p~ and q~ are renormalised on S.

    sampled              A_y (e_y - p), y ~ p (Eq. 3)
                         E ||g^||^2 = sum_y p_y A_y^2 (1 - 2 p_y + sum p^2)
    mc                   the mean of m such draws
    student_topk         Eq. 5 on S(p):  p~_v (log(p~_v / q~_v) - KL(p~ || q~)) on S
    student_topk_bucket  K', KL on S(p) and one bucket:
                         p_v (A_v - K') on S, p_v (log(r / t) - K') outside
    student_released     the code's, on S(p):  p~_v A_v [v in S] - p_v sum_S p~ A
    teacher_topk, teacher_topk_bucket, overlap   the same forms on S(q), and on S(p) & S(q)

Those on a top-k have no variance. The tokens of an older student have another E: see probe drift.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from logitcask.engine.errors import IncompleteError, ModelError
from logitcask.engine.probes.reward import clustered_mean
from logitcask.engine.types import Array

CHUNK = 1 << 24
"""Numbers of a float64 tensor of rows and vocabulary in memory: 128 MiB."""


class Estimate(NamedTuple):
    """An estimator of C rows."""

    mean: Tensor
    """[C, V] E g^."""
    variance: Tensor
    """[C] E ||g^ - E g^||^2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimator:
    """One line of the table: means over the rows, ± standard errors over prompts."""

    estimator: str
    k: int
    """Ids of the top-k, or draws."""
    bias: float
    bias_se: float | None
    variance: float
    variance_se: float | None
    rms_error: float
    """sqrt(sum over rows of E ||g^ - g||^2 / sum of ||g||^2): rows with a large gradient count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatorReport:
    rows: int
    left_out: int
    """Rows where p = q, which have no gradient."""
    reverse_kl: float
    """Mean KL(p || q) over the vocabulary, nats."""
    table: tuple[Estimator, ...]
    reading: str


@dataclass(slots=True)
class EstimatorSums:
    """Values of every row, filled pack by pack."""

    ks: Sequence[int]
    draws: Sequence[int]
    prompt: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)
    """[C, 2 + 2 E]: KL, ||g||^2, and of each estimator the squared bias and the variance."""

    def add(self, p_logits: Tensor, q_logits: Tensor, prompt: Array) -> None:
        """Measure rows: logits [R, V] of both models, prompt [R] its number.

        Raises ModelError for logits that are not finite.
        """
        size = max(1, CHUNK // p_logits.shape[1])
        for start in range(0, len(p_logits), size):
            part = slice(start, start + size)
            log_p, log_q = (x[part].double().log_softmax(1) for x in (p_logits, q_logits))
            if not (log_p.isfinite().all() and log_q.isfinite().all()):
                raise ModelError(
                    "a model gives logits that are not finite",
                    hint="load it in another --dtype, or use another model",
                )
            g, kl = full_gradient(log_p, log_q)
            found = [kl, g.square().sum(1)]
            for _, each in estimates(log_p, log_q, self.ks, self.draws):
                found += [(each.mean - g).square().sum(1), each.variance]
            self.values.append(torch.stack(found, 1).cpu().numpy())
            self.prompt.append(prompt[part])

    def report(self) -> EstimatorReport:
        """Return the means over the rows.

        Raises IncompleteError without a row, or where p = q on all rows.
        """
        width = 2 + 2 * len(names(self.ks, self.draws))
        values = np.concatenate([np.zeros((0, width)), *self.values])
        prompt = np.concatenate([np.zeros(0, np.int64), *self.prompt])
        has = values[:, 1] > 0
        if not has.any():
            what = "both models agree on" if len(values) else "there is no row among"
            raise IncompleteError(
                f"{what} the sampled rows, so no estimator of their difference can be measured",
                hint="give another teacher or student, or more --positions",
            )
        kept, (_, cluster) = values[has], np.unique(prompt[has], return_inverse=True)
        square = kept[:, 1]
        table = tuple(
            _line(name, k, kept[:, 2 + 2 * i], kept[:, 3 + 2 * i], square, cluster)
            for i, (name, k) in enumerate(names(self.ks, self.draws))
        )
        return EstimatorReport(
            rows=len(kept),
            left_out=len(values) - len(kept),
            reverse_kl=float(values[:, 0].mean()),
            table=table,
            reading=_reading(table),
        )


def full_gradient(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return ([C, V] dKL(p || q)/dz, [C] KL(p || q)) over the whole vocabulary, nats."""
    ratio, p = log_p - log_q, log_p.exp()
    kl = (p * ratio).sum(1)
    return p * (ratio - kl[:, None]), kl


def names(ks: Sequence[int], draws: Sequence[int]) -> list[tuple[str, int]]:
    """Return (estimator, its k) in the order of `estimates`."""
    found = [("sampled", 1), *(("mc", m) for m in draws)]
    for k in ks:
        renormalised = ("student_topk", "teacher_topk", "overlap") if k > 1 else ()
        others = ("student_topk_bucket", "teacher_topk_bucket", "student_released")
        found += [(name, k) for name in (*renormalised, *others)]
    return found


def estimates(
    log_p: Tensor, log_q: Tensor, ks: Sequence[int], draws: Sequence[int]
) -> Iterator[tuple[tuple[str, int], Estimate]]:
    """Yield every estimator of C rows; log_p, log_q [C, V] float64.

    With k = 1 a renormalised top-k has no gradient, so it is left out.
    """
    g, _ = full_gradient(log_p, log_q)
    p, ratio = log_p.exp(), log_p - log_q
    sums = p.square().sum(1, keepdim=True)
    one = (p * ratio.square() * (1 - 2 * p + sums)).sum(1) - g.square().sum(1)
    yield ("sampled", 1), Estimate(g, one)
    for m in draws:
        yield ("mc", m), Estimate(g, one / m)
    none, order = torch.zeros_like(one), {}
    for k in ks:
        for side, x in (("student", log_p), ("teacher", log_q)):
            order[side] = torch.zeros_like(x, dtype=torch.bool)
            order[side].scatter_(1, x.topk(k, dim=1).indices, True)
        student, teacher = order["student"], order["teacher"]
        sets = {"student_topk": student, "teacher_topk": teacher, "overlap": student & teacher}
        if k > 1:
            for name, mask in sets.items():
                yield (name, k), Estimate(_renormalised(log_p, log_q, mask), none)
        for name in ("student_topk", "teacher_topk"):
            yield (f"{name}_bucket", k), Estimate(_bucket(log_p, log_q, sets[name]), none)
        yield ("student_released", k), Estimate(_released(log_p, log_q, student), none)


def _renormalised(log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
    log_p, log_q = (_on(x, mask) for x in (log_p, log_q))
    ratio = torch.where(mask, log_p - log_q, 0.0)
    kl = (log_p.exp() * ratio).sum(1, keepdim=True)
    return torch.where(mask, log_p.exp() * (ratio - kl), 0.0)


def _bucket(log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
    p, ratio = log_p.exp(), log_p - log_q
    outside_p, outside_q = (_mass_outside(x, mask) for x in (log_p, log_q))
    inside = mask.all(1, keepdim=True)
    bucket = torch.where(inside, 0.0, outside_p - outside_q)
    kl = torch.where(mask, p * ratio, 0.0).sum(1, keepdim=True)
    kl = kl + torch.where(inside, 0.0, outside_p.exp() * bucket)
    return p * (torch.where(mask, ratio, bucket) - kl)


def _released(log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
    weighted = torch.where(mask, _on(log_p, mask).exp() * (log_p - log_q), 0.0)
    return weighted - log_p.exp() * weighted.sum(1, keepdim=True)


def _on(log_x: Tensor, mask: Tensor) -> Tensor:
    """Return log_x renormalised on the ids in `mask`; any value elsewhere, without NaN."""
    total = log_x.masked_fill(~mask, -torch.inf).logsumexp(1, keepdim=True)
    return log_x - torch.where(mask.any(1, keepdim=True), total, 0.0)


def _mass_outside(log_x: Tensor, mask: Tensor) -> Tensor:
    """Return [C, 1] the log of the mass outside `mask`, summed there: no difference of 1."""
    return log_x.masked_fill(mask, -torch.inf).logsumexp(1, keepdim=True)


def _line(
    name: str, k: int, bias: Array, variance: Array, square: Array, cluster: Array
) -> Estimator:
    """Return the line of an estimator: bias [R] squared, variance and ||g||^2 [R]."""
    found = [clustered_mean(x, cluster) for x in (np.sqrt(bias / square), variance / square)]
    (mean, mean_se), (spread, spread_se) = found
    return Estimator(
        estimator=name,
        k=k,
        bias=mean,
        bias_se=_or_none(mean_se),
        variance=spread,
        variance_se=_or_none(spread_se),
        rms_error=float(np.sqrt((bias + variance).sum() / square.sum())),
    )


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def _reading(table: Sequence[Estimator]) -> str:
    one = table[0]
    biased: Mapping[int, Estimator] = {
        each.k: each for each in table if each.estimator == "student_topk"
    }
    text = f"one sampled token has no bias, and an error of {one.rms_error:.2g} times the gradient"
    better = [k for k, each in biased.items() if each.rms_error < one.rms_error]
    if not better:
        return f"{text}, less than that of any top-k here"
    k, last = better[0], max(biased)
    return (
        f"{text}, which more tokens average out; the student's top-k has a smaller one from k = "
        f"{k} on, {biased[last].rms_error:.2g} at k = {last}, which they do not"
    )
