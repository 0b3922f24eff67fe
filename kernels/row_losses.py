"""Statistics, losses and gradients of the rows of a sparse_kl, chunk by chunk.

An objective runs between the kernels, in torch; a FusedObjective that fits runs inside them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from logitcask.kernels.fused_objective import FusedObjective
from logitcask.kernels.fused_rows import fused_rows
from logitcask.kernels.launch import runs_triton
from logitcask.kernels.logit_transform import PLAIN, LogitTransform
from logitcask.kernels.objective_input import ObjectiveFn, ObjectiveGrad, ObjectiveInput, SparseLoss
from logitcask.kernels.row_grad import grad_rows, p_log_p
from logitcask.kernels.row_stats import scan_rows
from logitcask.kernels.topk_select import group_size, select_rows


class RowRead(NamedTuple):
    """Results of the vocabulary-sized passes on C rows.

    Float tensors are float32, or float64 for float64 logits.
    """

    log_sum_exp: Tensor
    """[C] nats; -inf for a row of -inf alone, NaN for one with NaN or +inf."""
    entropy: Tensor
    """[C] nats"""
    top: Tensor
    """[C, K]: the largest raw logits, best first."""
    top_ids: Tensor
    """[C, K] int64: their ids."""
    at_ids: Tensor
    """[C, S]: the logits at the listed ids; unspecified where the id is -1."""


def read_rows(
    logits: Tensor,
    ids: Tensor,
    k: int,
    n_vocab: int,
    logit_transform: LogitTransform = PLAIN,
    exp_out: Tensor | None = None,
) -> RowRead:
    """Return RowRead of logits [C, V] at ids [C, S], without checks; exp_out as of scan_rows."""
    group = group_size(logits, k, n_vocab)
    (lse, entropy), group_max = scan_rows(logits, n_vocab, group, logit_transform, exp_out)
    top, top_ids = select_rows(logits, group_max, k, n_vocab, group)
    return RowRead(lse, entropy, top, top_ids, logits.gather(1, ids.clamp(min=0)).to(lse.dtype))


class RowLosses:
    """Losses, metrics and gradients of P rows, computed chunk by chunk."""

    def __init__(
        self,
        ids: Tensor,
        objective: ObjectiveFn,
        k: int,
        row_weight: Tensor | None,
        dtype: torch.dtype,
        logit_transform: LogitTransform = PLAIN,
    ) -> None:
        """Allocate results for ids [P, S]; row_weight [P], None for ones; dtype of the statistics.

        Raises ValueError for a FusedObjective of other rows.
        """
        if isinstance(objective, FusedObjective):
            objective = objective.bind(ids)
        self.ids = ids
        self.objective = objective
        self.k = k
        self.logit_transform = logit_transform
        self.weighted = row_weight is not None  # else every row is used
        ones = torch.ones(len(ids), dtype=dtype, device=ids.device)
        self.weight = ones if row_weight is None else row_weight.to(dtype)
        self.row_loss = torch.zeros_like(self.weight)
        self.metrics: dict[str, Tensor] = {}

    def run(self, rows: slice, logits: Tensor, out: Tensor | None, n_vocab: int) -> ObjectiveGrad:
        """Compute one chunk, logits [C, V] of `rows`.

        The weighted gradient goes to `out` [C, V], which may be logits.
        """
        ids = self.ids[rows]  # [C, S]
        if isinstance(self.objective, FusedObjective) and self.objective.fits(logits, self.k):
            fused = self.objective.rows(rows)
            weight, y = self.weight[rows], self.logit_transform
            output = fused_rows(fused, logits, ids, weight, self.k, out, n_vocab, y, rows.start)
            _check_output(output, output.at_ids)
            self._keep(rows, output)
            return output
        exp_out = out[:, :n_vocab] if out is not None and self._keeps_exp(logits, out) else None
        read = read_rows(logits, ids, self.k, n_vocab, self.logit_transform, exp_out)
        return self.finish(rows, read, logits, ids, out, n_vocab, has_exp=exp_out is not None)

    def _keeps_exp(self, logits: Tensor, out: Tensor) -> bool:
        """Return whether `out` can hold the exponentials of the scan until the gradient."""
        return (
            not runs_triton(logits)
            and out.dtype == self.weight.dtype
            and out.data_ptr() != logits.data_ptr()
            and self.logit_transform.softcap is None
        )

    def finish(
        self,
        rows: slice,
        read: RowRead,
        logits: Tensor,
        columns: Tensor,
        out: Tensor | None,
        n_vocab: int,
        *,
        has_exp: bool = False,
    ) -> ObjectiveGrad:
        """Evaluate the objective on `rows` and write the gradient by the logits [C, V].

        columns: [C, S], the column of each listed id in logits; -1 if it has none. has_exp: `out`
        holds the exponentials of the scan.
        """
        lse, y = read.log_sum_exp, self.logit_transform
        log_p = torch.where(self.ids[rows] >= 0, y.apply(read.at_ids) - lse[:, None], -torch.inf)
        index = torch.arange(rows.start, rows.stop, device=lse.device)
        top_log_p = y.apply(read.top) - lse[:, None]
        view = ObjectiveInput(index, log_p, read.top_ids, top_log_p, read.entropy)
        output = self.evaluate(rows, view)
        if out is None:
            return output
        w = self.weight[rows]
        used = w != 0  # never 0 * NaN: a row of weight 0 adds exactly 0, whatever it holds
        final, dense_log = output.at_ids + output.dense_at_ids * log_p.exp(), None
        if output.dense_log is not None:
            final = final + output.dense_log[:, None] * p_log_p(log_p)
            dense_log = torch.where(used, w * output.dense_log, 0.0)
        final = w[:, None] * final
        if not y.is_plain:
            final = final * y.slope(read.at_ids)
        final = torch.where(used[:, None], final, 0.0)
        dense = torch.where(used, w * output.dense, 0.0)
        shift = y.apply(read.top[:, 0]) if has_exp and dense_log is None else None
        grad_rows(logits, lse, dense, columns, final, out, n_vocab, y, dense_log, shift)
        return output

    def evaluate(self, rows: slice, view: ObjectiveInput) -> ObjectiveGrad:
        """Evaluate the objective on `rows` and keep their losses and metrics."""
        output = self.objective(view)
        _check_output(output, view.log_p)
        self._keep(rows, output)
        return output

    def _keep(self, rows: slice, output: ObjectiveGrad) -> None:
        self.row_loss[rows] = output.loss
        for name, value in output.metrics.items():
            if name not in self.metrics:
                self.metrics[name] = value.new_empty(len(self.ids))
            self.metrics[name][rows] = value

    def result(self) -> SparseLoss:
        """Return the weighted loss with the row losses and metrics."""
        loss = torch.where(self.weight != 0, self.weight * self.row_loss, 0.0).sum()
        return SparseLoss(loss, self.row_loss, self.metrics)


def _check_output(output: ObjectiveGrad, log_p: Tensor) -> None:
    """Raise ValueError unless the output has the shapes of log_p [C, S]."""
    n_rows, n_ids = log_p.shape
    tensors = {f"metrics[{name!r}]": value for name, value in output.metrics.items()}
    tensors |= {name: getattr(output, name) for name in output._fields if name != "metrics"}
    for name, tensor in tensors.items():
        expected = (n_rows, n_ids) if name in ("at_ids", "dense_at_ids") else (n_rows,)
        if tensor is not None and tensor.shape != expected:
            raise ValueError(
                f"the objective's {name} has shape {tuple(tensor.shape)}, must be {expected} for "
                "this chunk of rows"
            )
