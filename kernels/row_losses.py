"""The rows of a sparse_kl, chunk by chunk: what is read of them, their losses and gradients.

An objective is asked between the kernels, in torch; a FusedObjective, where its form applies, is
part of their launches.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from logitcask.kernels.fused_objective import FusedObjective
from logitcask.kernels.fused_rows import fused_rows
from logitcask.kernels.logit_transform import PLAIN, LogitTransform
from logitcask.kernels.objective_input import ObjectiveFn, ObjectiveGrad, ObjectiveInput, SparseLoss
from logitcask.kernels.row_grad import grad_rows, p_log_p
from logitcask.kernels.row_stats import scan_rows
from logitcask.kernels.topk_select import group_size, select_rows


class RowRead(NamedTuple):
    """What the vocabulary-sized passes before the objective leave of C rows. Float tensors are
    float32, or float64 for float64 logits."""

    log_sum_exp: Tensor
    """[C] nats"""
    entropy: Tensor
    """[C] nats"""
    top: Tensor
    """[C, K]: the largest logits, best first, as the head made them."""
    top_ids: Tensor
    """[C, K] int64: their ids."""
    at_ids: Tensor
    """[C, S]: the logits at the listed ids; unspecified where the id is -1."""


def read_rows(
    logits: Tensor, ids: Tensor, k: int, n_vocab: int, logit_transform: LogitTransform = PLAIN
) -> RowRead:
    """RowRead of logits [C, V] at ids [C, S], without checks."""
    group = group_size(logits, k, n_vocab)
    (lse, entropy), group_max = scan_rows(logits, n_vocab, group, logit_transform)
    top, top_ids = select_rows(logits, group_max, k, n_vocab, group)
    return RowRead(lse, entropy, top, top_ids, logits.gather(1, ids.clamp(min=0)).to(lse.dtype))


class RowLosses:
    """Collects the rows' losses and metrics, chunk by chunk, and writes their gradients over the
    logits."""

    def __init__(
        self,
        ids: Tensor,
        objective: ObjectiveFn,
        k: int,
        row_weight: Tensor | None,
        dtype: torch.dtype,
        logit_transform: LogitTransform = PLAIN,
    ) -> None:
        """ids [P, S]; row_weight [P] or None for ones; dtype of statistics and losses.

        Raises ValueError or TypeError where a FusedObjective is not of these rows.
        """
        if isinstance(objective, FusedObjective):
            objective.check(ids)
        self.ids = ids
        self.objective = objective
        self.k = k
        self.logit_transform = logit_transform
        self.weighted = row_weight is not None  # else every row is used
        self.weight = (
            torch.ones(len(ids), dtype=dtype, device=ids.device)
            if row_weight is None
            else row_weight.to(dtype)
        )
        self.row_loss = torch.zeros_like(self.weight)
        self.metrics: dict[str, Tensor] = {}

    def run(self, rows: slice, logits: Tensor, out: Tensor | None, n_vocab: int) -> ObjectiveGrad:
        """One chunk: logits [C, V] of `rows`. Its weighted gradient goes to `out` [C, V], which may
        be logits."""
        ids = self.ids[rows]  # [C, S]
        if isinstance(self.objective, FusedObjective) and self.objective.fits(logits, self.k):
            fused = self.objective.of(rows)
            weight, y = self.weight[rows], self.logit_transform
            answer = fused_rows(fused, logits, ids, weight, self.k, out, n_vocab, y, rows.start)
            _check_answer(answer, answer.at_ids)
            self._keep(rows, answer)
            return answer
        read = read_rows(logits, ids, self.k, n_vocab, self.logit_transform)
        return self.finish(rows, read, logits, ids, out, n_vocab)

    def finish(
        self,
        rows: slice,
        read: RowRead,
        logits: Tensor,
        columns: Tensor,
        out: Tensor | None,
        n_vocab: int,
    ) -> ObjectiveGrad:
        """The objective on what was read of `rows`, and the gradient by the logits [C, V] at hand.

        columns: [C, S], where in logits the listed ids lie; -1 where they lie elsewhere.
        """
        lse, y = read.log_sum_exp, self.logit_transform
        log_p = torch.where(self.ids[rows] >= 0, y.apply(read.at_ids) - lse[:, None], -torch.inf)
        index = torch.arange(rows.start, rows.stop, device=lse.device)
        top_log_p = y.apply(read.top) - lse[:, None]
        view = ObjectiveInput(index, log_p, read.top_ids, top_log_p, read.entropy)
        answer = self.ask(rows, view)
        if out is None:
            return answer
        w = self.weight[rows]
        used = w != 0  # never 0 * NaN: a row of weight 0 adds exactly 0, whatever it holds
        final, dense_log = answer.at_ids + answer.dense_at_ids * log_p.exp(), None
        if answer.dense_log is not None:
            final = final + answer.dense_log[:, None] * p_log_p(log_p)
            dense_log = torch.where(used, w * answer.dense_log, 0.0)
        final = w[:, None] * final
        if not y.is_plain:
            final = final * y.slope(read.at_ids)
        final = torch.where(used[:, None], final, 0.0)
        dense = torch.where(used, w * answer.dense, 0.0)
        grad_rows(logits, lse, dense, columns, final, out, n_vocab, y, dense_log)
        return answer

    def ask(self, rows: slice, view: ObjectiveInput) -> ObjectiveGrad:
        """What the objective says of `rows`, seen by this view; losses and metrics are kept."""
        answer = self.objective(view)
        _check_answer(answer, view.log_p)
        self._keep(rows, answer)
        return answer

    def _keep(self, rows: slice, answer: ObjectiveGrad) -> None:
        self.row_loss[rows] = answer.loss
        for name, value in answer.metrics.items():
            if name not in self.metrics:
                self.metrics[name] = value.new_empty(len(self.ids))
            self.metrics[name][rows] = value

    def result(self) -> SparseLoss:
        loss = torch.where(self.weight != 0, self.weight * self.row_loss, 0.0).sum()
        return SparseLoss(loss, self.row_loss, self.metrics)


def _check_answer(answer: ObjectiveGrad, log_p: Tensor) -> None:
    n_rows, n_ids = log_p.shape
    shapes = {
        "loss": (n_rows,),
        "at_ids": (n_rows, n_ids),
        "dense": (n_rows,),
        "dense_at_ids": (n_rows, n_ids),
    }
    got = {name: tuple(getattr(answer, name).shape) for name in shapes}
    if answer.dense_log is not None:
        got["dense_log"] = tuple(answer.dense_log.shape)
    got |= {f"metrics[{name!r}]": tuple(value.shape) for name, value in answer.metrics.items()}
    for name, shape in got.items():
        want = shapes.get(name, (n_rows,))
        if shape != want:
            raise ValueError(
                f"the objective's {name} has shape {shape}, must be {want} for this chunk of rows"
            )
