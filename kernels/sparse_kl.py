"""From logits: a loss of the log-probs at listed ids and of the live top-k, with its gradient.

The vocabulary-sized work is the same for every such loss, so the loss is a parameter: an objective,
plain torch on [C, S] and [C, K] tensors of C rows at a time. Around it stand the kernels: row_stats
and topk_select before, row_grad after. p is the student.

    dL_r/dy_v = dense_r p_v                      v not listed
              = at_ids_v + dense_at_ids_v p_v    v listed

and dy/dz is logit_map's, 1 for most models.

Gradients are made in the forward pass and handed over in the backward pass (see made_ahead), so
nothing vocabulary-sized is kept but the gradient itself. There is no second and no double backward.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from logitcask.kernels.launch import (
    check_chunk_rows,
    check_ids,
    check_k,
    check_logits,
    check_row_vector,
    compute_dtype,
    row_chunks,
)
from logitcask.kernels.logit_map import PLAIN, LogitMap
from logitcask.kernels.made_ahead import attach_grads
from logitcask.kernels.row_grad import grad_rows, row_grad_reference
from logitcask.kernels.row_stats import row_stats_reference, scan_rows
from logitcask.kernels.topk_select import group_size, select_rows, topk_select_reference


class RowView(NamedTuple):
    """What an objective sees of C rows. Float tensors are float32, or float64 for float64 logits;
    natural logs."""

    index: Tensor  # type: ignore[assignment]  # it hides tuple.index, which nobody needs here
    """[C] int64: positions of these rows in the call."""
    log_p: Tensor
    """[C, S]: the student's log-prob at the listed ids; -inf where the id is -1."""
    top_ids: Tensor
    """[C, K] int64: the student's live top-k, best first."""
    top_log_p: Tensor
    """[C, K]: its log-probs."""
    entropy: Tensor
    """[C] nats: the student's entropy."""


class RowGrad(NamedTuple):
    """What an objective answers for C rows.

    For a loss of {log p at S} alone, dense and dense_at_ids are both -sum(at_ids). With a tail
    bucket of mass r = 1 - sum p
    and target t they differ at the listed ids, because r depends on p there as well: see the
    formulas of the objective. They are asked for separately so that terms near 1/r can cancel
    before they are rounded.
    """

    loss: Tensor
    """[C] nats, not weighted."""
    at_ids: Tensor
    """[C, S]: derivative of the loss by log p at the listed ids, apart from the dense coefficients.
    Ignored where the id is -1."""
    dense: Tensor
    """[C]: coefficient of p_v at ids that are not listed."""
    dense_at_ids: Tensor
    """[C, S]: coefficient of p_v at the listed ids."""
    metrics: dict[str, Tensor]
    """name -> [C]. The same names for every chunk of rows."""


RowObjective = Callable[[RowView], RowGrad]


class SparseLoss(NamedTuple):
    loss: Tensor
    """[]: sum over rows of row_weight * row_loss; differentiable."""
    row_loss: Tensor
    """[P] nats, not weighted, detached."""
    metrics: dict[str, Tensor]
    """name -> [P], detached."""


def sparse_kl_reference(
    logits: Tensor,
    ids: Tensor,
    objective: RowObjective,
    *,
    k: int = 16,
    row_weight: Tensor | None = None,
    n_vocab: int | None = None,
    logit_map: LogitMap = PLAIN,
) -> tuple[SparseLoss, Tensor]:
    """The specification of sparse_kl: its result, and d loss / d logits [P, V]."""
    stats = row_stats_reference(logits, n_vocab=n_vocab, logit_map=logit_map)
    values, top_ids = topk_select_reference(logits, k, n_vocab=n_vocab)
    lse = stats.log_sum_exp[:, None]
    at = logits.gather(1, ids.clamp(min=0)).to(values.dtype)
    log_p = torch.where(ids < 0, -torch.inf, logit_map.apply(at) - lse)
    index = torch.arange(len(ids), device=ids.device)
    grad = objective(RowView(index, log_p, top_ids, logit_map.apply(values) - lse, stats.entropy))
    w = torch.ones_like(grad.loss) if row_weight is None else row_weight.to(grad.loss.dtype)
    used = w != 0  # a row of weight 0 adds exactly 0, whatever it holds
    loss = torch.where(used, w * grad.loss, 0.0).sum()
    final = (grad.at_ids + grad.dense_at_ids * log_p.exp()) * logit_map.slope(at)
    final = torch.where(used[:, None], w[:, None] * final, 0.0)
    dense = torch.where(used, w * grad.dense, 0.0)
    d_logits = row_grad_reference(
        logits, stats.log_sum_exp, dense, ids, final, n_vocab=n_vocab, logit_map=logit_map
    )
    return SparseLoss(loss, grad.loss, grad.metrics), d_logits


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
    logits: Tensor, ids: Tensor, k: int, n_vocab: int, logit_map: LogitMap = PLAIN
) -> RowRead:
    """RowRead of logits [C, V] at ids [C, S], without checks."""
    group = group_size(logits, k, n_vocab)
    (lse, entropy), group_max = scan_rows(logits, n_vocab, group, logit_map)
    top, top_ids = select_rows(logits, group_max, k, n_vocab, group)
    return RowRead(lse, entropy, top, top_ids, logits.gather(1, ids.clamp(min=0)).to(lse.dtype))


class RowLosses:
    """Collects the rows' losses and metrics, chunk by chunk, and writes their gradients over the
    logits."""

    def __init__(
        self,
        ids: Tensor,
        objective: RowObjective,
        k: int,
        row_weight: Tensor | None,
        dtype: torch.dtype,
        logit_map: LogitMap = PLAIN,
    ) -> None:
        """ids [P, S]; row_weight [P] or None for ones; dtype of statistics and losses."""
        self.ids = ids
        self.objective = objective
        self.k = k
        self.logit_map = logit_map
        self.weighted = row_weight is not None  # else every row is used
        self.weight = (
            torch.ones(len(ids), dtype=dtype, device=ids.device)
            if row_weight is None
            else row_weight.to(dtype)
        )
        self.row_loss = torch.zeros_like(self.weight)
        self.metrics: dict[str, Tensor] = {}

    def run(self, rows: slice, logits: Tensor, out: Tensor | None, n_vocab: int) -> RowGrad:
        """One chunk: logits [C, V] of `rows`. Its weighted gradient goes to `out` [C, V], which may
        be logits."""
        ids = self.ids[rows]  # [C, S]
        read = read_rows(logits, ids, self.k, n_vocab, self.logit_map)
        return self.finish(rows, read, logits, ids, out, n_vocab)

    def finish(
        self,
        rows: slice,
        read: RowRead,
        logits: Tensor,
        columns: Tensor,
        out: Tensor | None,
        n_vocab: int,
    ) -> RowGrad:
        """The objective on what was read of `rows`, and the gradient by the logits [C, V] at hand.

        columns: [C, S], where in logits the listed ids lie; -1 where they lie elsewhere.
        """
        lse, y = read.log_sum_exp, self.logit_map
        log_p = torch.where(self.ids[rows] >= 0, y.apply(read.at_ids) - lse[:, None], -torch.inf)
        index = torch.arange(rows.start, rows.stop, device=lse.device)
        top_log_p = y.apply(read.top) - lse[:, None]
        view = RowView(index, log_p, read.top_ids, top_log_p, read.entropy)
        answer = self.ask(rows, view)
        if out is None:
            return answer
        w = self.weight[rows]
        used = w != 0  # never 0 * NaN: a row of weight 0 adds exactly 0, whatever it holds
        final = w[:, None] * (answer.at_ids + answer.dense_at_ids * log_p.exp())
        if not y.is_plain:
            final = final * y.slope(read.at_ids)
        final = torch.where(used[:, None], final, 0.0)
        dense = torch.where(used, w * answer.dense, 0.0)
        grad_rows(logits, lse, dense, columns, final, out, n_vocab, y)
        return answer

    def ask(self, rows: slice, view: RowView) -> RowGrad:
        """What the objective says of `rows`, seen by this view; losses and metrics are kept."""
        answer = self.objective(view)
        _check_answer(answer, view.log_p)
        self.row_loss[rows] = answer.loss
        for name, value in answer.metrics.items():
            if name not in self.metrics:
                self.metrics[name] = value.new_empty(len(self.ids))
            self.metrics[name][rows] = value
        return answer

    def result(self) -> SparseLoss:
        loss = torch.where(self.weight != 0, self.weight * self.row_loss, 0.0).sum()
        return SparseLoss(loss, self.row_loss, self.metrics)


def _check_answer(answer: RowGrad, log_p: Tensor) -> None:
    n_rows, n_ids = log_p.shape
    shapes = {
        "loss": (n_rows,),
        "at_ids": (n_rows, n_ids),
        "dense": (n_rows,),
        "dense_at_ids": (n_rows, n_ids),
    }
    got = {name: tuple(getattr(answer, name).shape) for name in shapes}
    got |= {f"metrics[{name!r}]": tuple(value.shape) for name, value in answer.metrics.items()}
    for name, shape in got.items():
        want = shapes.get(name, (n_rows,))
        if shape != want:
            raise ValueError(
                f"the objective's {name} has shape {shape}, must be {want} for this chunk of rows"
            )


def sparse_kl(
    logits: Tensor,
    ids: Tensor,
    objective: RowObjective,
    *,
    k: int = 16,
    row_weight: Tensor | None = None,
    n_vocab: int | None = None,
    logit_map: LogitMap = PLAIN,
    chunk_rows: int | None = None,
    in_place: bool = False,
) -> SparseLoss:
    """Loss, metrics and gradient of an objective from logits [P, V].

    logits: as in row_stats; differentiable. Where they need no gradient, or gradients are off,
    row_grad is skipped.
    ids: [P, S] int64, distinct in a row, -1 is padding.
    objective: called under no_grad with chunks of rows (sizes are an implementation matter,
    possibly all at once).
    k: size of the live top-k that the objective sees; 1 <= k <= n_vocab.
    row_weight: [P] float, default ones. A row of weight 0 has metrics, and adds exactly 0, also if
    it holds NaN.
    n_vocab: rows are normalised over columns [0, n_vocab); the gradient of the others is 0.
    logit_map: scale, soft cap and temperature between the logits and the student's law p.
    chunk_rows: rows per call of the objective; default all on a GPU, about 16 Mi logits on a CPU.
    in_place: the gradient is written over the logits, so that nothing of their size is made; nobody
    may need them afterwards. They must be contiguous. Otherwise they are not modified.

    Raises ValueError or TypeError on a shape, layout, dtype, device, id, k, n_vocab or logit_map
    that does not fit.
    """
    n_vocab = check_logits(logits, n_vocab)
    logit_map.check()
    check_k(k, n_vocab)
    check_ids(ids, logits, n_vocab)
    check_chunk_rows(chunk_rows)
    if in_place and not logits.is_contiguous():
        raise ValueError(
            f"in_place needs contiguous logits, got strides {logits.stride()} of shape "
            f"{tuple(logits.shape)}; call .contiguous(), or leave in_place out"
        )
    if row_weight is not None:
        check_row_vector(row_weight, logits, "row_weight")
    n_rows = logits.shape[0]
    if chunk_rows is None:
        chunk_rows = max(1, n_rows if logits.is_cuda else (1 << 24) // logits.shape[1])
    wants_grad = torch.is_grad_enabled() and logits.requires_grad
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        dtype = compute_dtype(logits.dtype)
        losses = RowLosses(ids, objective, k, row_weight, dtype, logit_map)
        d_logits = None
        if wants_grad and in_place:
            d_logits = logits.detach()
        elif wants_grad:
            d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for rows in row_chunks(n_rows, chunk_rows):
            losses.run(rows, logits[rows], None if d_logits is None else d_logits[rows], n_vocab)
        result = losses.result()
    if d_logits is None:
        return result
    return result._replace(loss=attach_grads(result.loss, [logits], [d_logits]))
