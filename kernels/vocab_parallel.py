"""sparse_kl and linear_sparse_kl with a head that is split over the ranks of a process group.

With tensor parallelism each of R ranks has the logits of V_r neighboring columns. It reads its own
and sends K- and S-sized numbers, from which all ranks rebuild the statistics of whole rows. Then
each runs the objective on the same input, and writes the gradient of its own columns. With m_r =
exp(lse_r - lse), the mass of shard r, and H_r the entropy inside it:

    lse = log sum_r exp(lse_r),   H = sum_r m_r (H_r - log m_r)

(grouping of the entropy: Shannon 1948, section 6). The K best of a row are among the K best of its
shards. A rank sends P (2 K + S + 2) numbers, in two collectives for each chunk of rows.

Letters: R shards, V_r columns of one shard, `first` the id of its first column, n_vocab the ids
that count in all shards together. The specification is sparse_kl of the joined shards.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from logitcask.kernels.launch import check_inputs, check_logits, compute_dtype, row_chunks
from logitcask.kernels.linear_sparse_kl import (
    check_head,
    default_chunk_rows,
    needed_grads,
    run_chunks,
)
from logitcask.kernels.logit_transform import PLAIN, LogitTransform
from logitcask.kernels.objective_input import ObjectiveFn, ObjectiveGrad, SparseLoss
from logitcask.kernels.precomputed_grad import attach_grads
from logitcask.kernels.row_losses import RowLosses, RowRead, read_rows
from logitcask.kernels.tp_group import (
    Shards,
    all_gather,
    all_sum,
    check_group,
    fingerprint,
    gather_errors,
    join,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def own_columns(ids: Tensor, first: int, n_own: int) -> Tensor:
    """Return [C, S]: the shard's column of each id; -1 for other shards and padding."""
    return torch.where((ids >= first) & (ids < first + n_own), ids - first, -1)


def read_shard(
    logits: Tensor,
    columns: Tensor,
    k: int,
    first: int,
    n_own: int,
    logit_transform: LogitTransform = PLAIN,
) -> RowRead:
    """Return RowRead of a shard's logits [C, V_r], of which the first n_own columns count.

    columns: [C, S] from own_columns. top and top_ids are [C, min(k, n_own)], with ids of the whole
    vocabulary; at_ids is -inf where columns is -1. A row of -inf alone has mass 0 here, log_sum_exp
    -inf and entropy 0: legal if another shard has mass.
    """
    if n_own == 0:
        lse = logits.new_full((len(logits),), -torch.inf, dtype=compute_dtype(logits.dtype))
        none = lse.new_empty(len(lse), 0)
        at_ids = lse[:, None].expand(columns.shape)
        return RowRead(lse, torch.zeros_like(lse), none, none.long(), at_ids)
    read = read_rows(logits, columns, min(k, n_own), n_own, logit_transform)
    return RowRead(
        read.log_sum_exp,
        read.entropy.masked_fill(read.log_sum_exp == -torch.inf, 0.0),
        read.top,
        read.top_ids + first,
        read.at_ids.masked_fill(columns < 0, -torch.inf),
    )


def merge_reads(parts: Sequence[RowRead], k: int) -> RowRead:
    """Merge read_shard of all shards, in the order of their columns, to RowRead of whole rows.

    The top-k are exactly those of topk_select. A row has NaN statistics if it has them on one
    shard, or is -inf on all.
    """
    dtype = parts[0].top.dtype
    lse_r = torch.stack([part.log_sum_exp for part in parts]).double()  # [R, C]
    entropy_r = torch.stack([part.entropy for part in parts]).double()
    lse = lse_r.logsumexp(0)
    lse = lse.masked_fill(lse == -torch.inf, torch.nan)
    log_mass = lse_r - lse
    mass = log_mass.exp()
    entropy = torch.where(mass == 0, 0.0, mass * (entropy_r - log_mass)).sum(0)  # 0 log 0 = 0
    # A shard's candidates come best first, the lowest id first among equals, and shards come in the
    # order of their ids: a stable sort keeps that order.
    top = torch.cat([part.top for part in parts], 1)
    top, order = top.sort(dim=1, descending=True, stable=True)
    top_ids = torch.cat([part.top_ids for part in parts], 1).gather(1, order)
    at_ids = torch.stack([part.at_ids for part in parts]).amax(0)  # -inf on all shards but one
    return RowRead(lse.to(dtype), entropy.to(dtype), top[:, :k], top_ids[:, :k], at_ids)


class _ShardLosses(RowLosses):
    """RowLosses of a shard's logits, which merges its statistics with those of the other ranks."""

    def __init__(self, shards: Shards, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.shards = shards

    def run(self, rows: slice, logits: Tensor, out: Tensor | None, n_vocab: int) -> ObjectiveGrad:
        """Compute one chunk: logits [C, V_r] of `rows`, n_vocab columns of which count here."""
        columns = own_columns(self.ids[rows], self.shards.first, n_vocab)
        first = self.shards.first
        part = read_shard(logits, columns, self.k, first, n_vocab, self.logit_transform)
        read = merge_reads(self._gather(part), self.k)
        if out is not None and n_vocab == 0:
            out.zero_()
        return self.finish(rows, read, logits, columns, out if n_vocab else None, n_vocab)

    def _gather(self, part: RowRead) -> list[RowRead]:
        """Gather the RowRead of all shards in the order of their columns."""
        fill = (0, self.k - part.top.shape[1])  # messages of one size, also from a narrow shard
        stats = torch.stack([part.log_sum_exp, part.entropy], 1)
        floats = torch.cat([stats, F.pad(part.top, fill), part.at_ids], 1)
        all_floats = all_gather(floats, self.shards.group)
        all_ids = all_gather(F.pad(part.top_ids, fill), self.shards.group)
        parts = []
        for rank, count in zip(self.shards.ranks, self.shards.counts, strict=True):
            stats, top, at_ids = all_floats[rank].tensor_split([2, 2 + self.k], 1)
            lse, entropy = stats.unbind(1)
            n = min(self.k, count)
            parts.append(RowRead(lse, entropy, top[:, :n], all_ids[rank][:, :n], at_ids))
        return parts


def _check_shard(first: int, n_vocab: int) -> None:
    if first < 0:
        raise ValueError(
            f"first={first} must be at least 0, the id of this shard's first column; "
            "pass the number of columns of the shards before it"
        )
    if n_vocab < 1:
        raise ValueError(f"n_vocab={n_vocab} must be at least 1; pass the ids of the whole head")


def _equal_numbers(
    k: int,
    chunk_rows: int,
    dtype: torch.dtype,
    logit_transform: LogitTransform,
    hidden_size: int = 0,
    sums_hidden: bool = False,
) -> dict[str, int]:
    """Return more numbers that must be equal on all ranks, or messages would not match."""
    factors = torch.tensor(
        [logit_transform.slope_at_0, *logit_transform.factors()], dtype=torch.float64
    )
    return {
        "k": k,
        "fingerprint of logit_transform": int(fingerprint(factors)),
        "hidden size (0: logits)": hidden_size,
        "hidden needs a gradient": int(sums_hidden),
        "chunk_rows": chunk_rows,
        "bytes per statistic": dtype.itemsize,
    }


def vocab_parallel_sparse_kl(
    logits: Tensor,
    ids: Tensor,
    objective: ObjectiveFn,
    *,
    first: int,
    n_vocab: int,
    group: "ProcessGroup | None" = None,
    k: int = 16,
    row_weight: Tensor | None = None,
    logit_transform: LogitTransform = PLAIN,
    chunk_rows: int | None = None,
) -> SparseLoss:
    """Compute sparse_kl of logits with columns on all ranks of a process group; all ranks call it.

    logits: [P, V_r], columns first to first + V_r - 1 of the whole; differentiable, not modified.
    Shards of any width, on ranks in any order, must follow each other without a gap from column 0.
    n_vocab: rows are normalized over columns [0, n_vocab) of the whole; the gradient of the others
    is 0. A shard may lie beyond it.
    group: None for the group of all processes.
    ids: [P, S] as in sparse_kl: ids of the whole vocabulary, the same on every rank.
    objective, k, row_weight, logit_transform, chunk_rows: as in sparse_kl.

    Every rank returns the same loss, row_loss and metrics, bit by bit on equal devices, and gets
    the gradient of its own columns. The backward pass sends nothing.

    Rows, ids, row_weight, n_vocab, k, logit_transform and chunk_rows must be equal on all ranks:
    if they are not, or one rank rejects its input, all ranks raise. The objective must be equal
    too, which is not checked: otherwise losses differ, and the gradients do not fit together. If
    the objective raises on one rank alone, the others wait until the group's timeout.

    Raises ValueError or TypeError for a shape, layout, dtype, device, id, k, n_vocab,
    logit_transform, first or group that does not fit, before any logit is read.
    """
    with gather_errors(group, logits.device):
        check_logits(logits, None)
        _check_shard(first, n_vocab)
        check_inputs(logits, ids, n_vocab, k, row_weight, chunk_rows, logit_transform)
        check_group(group)
    n_rows, n_columns = logits.shape
    dtype = compute_dtype(logits.dtype)
    if chunk_rows is None:  # by n_vocab, because ranks differ in V_r
        chunk_rows = max(1, n_rows if logits.is_cuda else (1 << 24) // n_vocab)
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        equal = _equal_numbers(k, chunk_rows, dtype, logit_transform)
        shards = join(group, first, n_columns, n_vocab, ids, row_weight, equal)
        losses = _ShardLosses(shards, ids, objective, k, row_weight, dtype, logit_transform)
        d_logits = None
        if needs_grad:
            d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for rows in row_chunks(n_rows, chunk_rows):
            out = None if d_logits is None else d_logits[rows]
            losses.run(rows, logits[rows], out, shards.n_own)
        result = losses.result()
    if d_logits is None:
        return result
    return result._replace(loss=attach_grads(result.loss, [logits], [d_logits]))


def vocab_parallel_linear_sparse_kl(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    objective: ObjectiveFn,
    *,
    first: int,
    n_vocab: int,
    group: "ProcessGroup | None" = None,
    k: int = 16,
    row_weight: Tensor | None = None,
    logit_transform: LogitTransform = PLAIN,
    chunk_rows: int | None = None,
) -> SparseLoss:
    """Compute vocab_parallel_sparse_kl of the logits hidden @ weight.T, without a tensor [P, V_r].

    hidden: [P, D] as in linear_sparse_kl, equal on all ranks, which is not checked. Every rank gets
    its whole gradient, summed over the shards in float32 (float64 for float64), so no layer before
    the head may sum it over the group again.
    weight: [V_r, D], the head's rows first to first + V_r - 1; its gradient is this shard's own.
    chunk_rows: as in linear_sparse_kl.
    All else as in vocab_parallel_sparse_kl.
    """
    with gather_errors(group, hidden.device):
        n_columns = check_head(hidden, weight, None)
        _check_shard(first, n_vocab)
        check_inputs(hidden, ids, n_vocab, k, row_weight, chunk_rows, logit_transform)
        check_group(group)
    dtype = compute_dtype(hidden.dtype)
    chunk_rows = chunk_rows or default_chunk_rows(n_vocab, hidden)
    needs = needed_grads(hidden, weight)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        equal = _equal_numbers(k, chunk_rows, dtype, logit_transform, hidden.shape[1], needs[0])
        shards = join(group, first, n_columns, n_vocab, ids, row_weight, equal)
        losses = _ShardLosses(shards, ids, objective, k, row_weight, dtype, logit_transform)
        d_hidden, d_weight = run_chunks(losses, hidden, weight, shards.n_own, chunk_rows, needs)
        if d_hidden is not None:
            d_hidden = all_sum(d_hidden.to(dtype), group).to(hidden.dtype)
        result = losses.result()
    if not any(needs):
        return result
    grads = [d_hidden, d_weight]
    return result._replace(loss=attach_grads(result.loss, [hidden, weight], grads))
