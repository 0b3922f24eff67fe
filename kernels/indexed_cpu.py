"""Products with listed rows of the head in torch on a CPU, without a tensor [P, S, D].

Such a tensor costs more than the products do: its memory is new in every call.
"""

import warnings
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from logitcask.kernels.launch import row_chunks

CPU_GATHER = 1 << 18
"""Gathered elements per chunk: they stay in cache between gather and product."""


def listed_products(hidden: Tensor, weight: Tensor, listed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [P, S] in `dtype`: hidden [P, D] by the rows of weight [V, D] at `listed` [P, S]."""
    if hidden.dtype == weight.dtype == dtype and weight.is_contiguous():
        return _sampled(hidden, weight, listed)
    out = torch.empty(listed.shape, dtype=dtype)
    for rows, near in _gathered(weight, listed, dtype):
        torch.bmm(near, hidden[rows, :, None].to(dtype), out=out[rows, :, None])
    return out


def _sampled(hidden: Tensor, weight: Tensor, listed: Tensor) -> Tensor:
    """Compute listed_products by a product that is sampled at the listed places."""
    _pass_warning()
    n_rows, n_ids = listed.shape
    places = torch.sparse_csr_tensor(
        torch.arange(0, listed.numel() + 1, n_ids),
        listed.flatten(),
        hidden.new_zeros(listed.numel()),
        (n_rows, len(weight)),
        check_invariants=False,
    )
    product: Tensor = torch.sparse.sampled_addmm(places, hidden, weight.T, beta=0.0)
    return product.values().view(listed.shape)


@cache
def _pass_warning() -> None:
    """Let torch warn of its CSR tensors here, which it does once in a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.eye(1).to_sparse_csr()


def listed_sums(coefficients: Tensor, weight: Tensor, listed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [P, D] in `dtype`: rows of weight [V, D] at `listed` [P, S] by coefficients [P, S]."""
    if weight.dtype == coefficients.dtype:
        return F.embedding_bag(
            listed, weight, per_sample_weights=coefficients.contiguous(), mode="sum"
        ).to(dtype)
    out = torch.empty(len(listed), weight.shape[1], dtype=dtype)
    for rows, near in _gathered(weight, listed, coefficients.dtype):
        out[rows] = torch.bmm(coefficients[rows, None], near)[:, 0].to(dtype)
    return out


def _gathered(weight: Tensor, listed: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, weight's rows [C, S, D] in `dtype` at listed[rows]), from one buffer."""
    n_rows, n_ids = listed.shape
    n_columns = weight.shape[1]
    chunk_rows = max(1, CPU_GATHER // (n_ids * n_columns))
    taken = weight.new_empty(min(chunk_rows, n_rows) * n_ids, n_columns)
    near = taken if weight.dtype == dtype else torch.empty(taken.shape, dtype=dtype)
    for rows in row_chunks(n_rows, chunk_rows):
        at = listed[rows].flatten()
        torch.index_select(weight, 0, at, out=taken[: len(at)])
        if near is not taken:
            near[: len(at)] = taken[: len(at)]
        yield rows, near[: len(at)].view(-1, n_ids, n_columns)


def sums_from(starts: Tensor, row: Tensor, coefficients: Tensor, hidden: Tensor) -> Tensor:
    """Return sums [n, D] of hidden [P, D] at `row` [m] by coefficients [m], in their dtype.

    starts: [n] int64, the first term of each sum; a sum ends where the next one begins.
    """
    return F.embedding_bag(
        row,
        hidden.to(coefficients.dtype),
        offsets=starts,
        per_sample_weights=coefficients,
        mode="sum",
    )


def sums_of_every_id(
    by_id: Tensor, row: Tensor, coefficients: Tensor, hidden: Tensor, n_vocab: int
) -> Tensor:
    """Return sums [n_vocab, D] of the terms of each id; by_id: [m] int64, ascending.

    The zeros of ids without a term are written in the same pass.
    """
    counts = torch.bincount(by_id, minlength=n_vocab)
    return sums_from(counts.cumsum(0) - counts, row, coefficients, hidden)
