"""Exact top-k of each row of logits; among equal logits the lowest id comes first.

Two stages. row_stats stores the maximum of every group of `group` neighboring logits. The top-k lie
in the k groups with the best maxima: an element outside them is beaten by one element of each. With
ties it still holds if the lower group wins, for a lower group has only lower ids. So: select k
groups, then select among their k * group logits.

The kernel finds a threshold bit by bit on integers that order as the floats do, compacts by prefix
sum, which keeps the id order, and ranks by counting. tl.topk on packed keys would cost 2.5 times
the instructions, and one tl.topk per tile of the row 30 times. More than MAX_TRITON_K ids are
selected by torch, on any device.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitcask.kernels.launch import (
    check_k,
    check_logits,
    compile_options,
    compute_dtype,
    cpu_chunk_rows,
    next_power_of_2,
    num_warps,
    on_device,
    row_chunks,
    runs_triton,
)
from logitcask.kernels.row_stats import group_maxima

MAX_TRITON_K = 128
"""Largest k of the kernel: 16 warps hold its k x 64 candidates, 16 a thread."""

COMPARED = tl.constexpr(32)
"""Ids that K or S others are compared with at a time: all of them would fill the registers."""

ZERO_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Low bits that are 0 in a number of the dtype widened to float32; the search skips them."""


def topk_select_reference(
    logits: Tensor, k: int, *, n_vocab: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return topk_select by a full stable sort: its specification."""
    z = logits[:, :n_vocab].to(compute_dtype(logits.dtype))
    values, ids = z.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


@triton.jit  # type: ignore[untyped-decorator]
def order_key(x, ZERO_BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    # int32 that orders as the float32 does; -0.0 equals 0.0. Without the low bits that are zero in
    # half precision.
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> ZERO_BITS


@triton.jit  # type: ignore[untyped-decorator]
def kth_key(key, K: tl.constexpr, ZERO_BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    # Largest t with at least K keys >= t, from the top bit down; the smallest possible key if there
    # is none.
    n_positive = tl.sum((key >= 0).to(tl.int32), 0)
    t = tl.where(n_positive >= K, 0, -(1 << (31 - ZERO_BITS)))
    for b in tl.static_range(ZERO_BITS, 31):
        candidate = t + (1 << (30 - b))
        n = tl.sum((key >= candidate).to(tl.int32), 0)
        t = tl.where(n >= K, candidate, t)
    return t


@triton.jit  # type: ignore[untyped-decorator]
def place_best(key, K: tl.constexpr, ZERO_BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    # For each key: whether it is among the K best (the earlier wins ties), and its position among
    # them in the order of the keys.
    t = kth_key(key, K, ZERO_BITS)
    above = (key > t).to(tl.int32)
    equal = (key == t).to(tl.int32)
    # One scan for both counts: at most 65535 of each fit.
    before = tl.cumsum((above << 16) | equal, 0) - ((above << 16) | equal)
    n_equal_before = before & 0xFFFF
    n_equal_kept = K - tl.sum(above, 0)
    keep = (above == 1) | ((equal == 1) & (n_equal_before < n_equal_kept))
    return keep, (before >> 16) + tl.minimum(n_equal_before, n_equal_kept)


@triton.jit  # type: ignore[untyped-decorator]
def select_row(  # type: ignore[no-untyped-def]
    logits,  # [V], one row
    group_max,  # [n_slots] float32, of which n_groups are set
    kept_group,  # [K] int32 scratch
    kept_place,  # [K] int32 scratch
    kept_key,  # [K] int32 scratch
    n_vocab,
    n_groups,
    n_slots,
    K: tl.constexpr,  # k, rounded up to a power of two
    GROUPS: tl.constexpr,  # n_groups likewise, and at least K
    GROUP: tl.constexpr,
    ZERO_BITS: tl.constexpr,
):
    # [K] values, ids and ranks, in the order of the ids; the best has rank 0. If K exceeds k, the
    # caller drops the ranks from k on.
    # Below the key of -inf: columns outside the row come last.
    lowest: tl.constexpr = -(1 << (31 - ZERO_BITS))

    g = tl.arange(0, GROUPS)
    # Up to the end of the scratch's row, a multiple of 16: the mask splits no 128-bit load.
    best = tl.load(group_max + g, mask=g < n_slots, other=-float("inf"))
    keep, at = place_best(tl.where(g < n_groups, order_key(best, ZERO_BITS), lowest), K, ZERO_BITS)
    tl.store(kept_group + at, g, mask=keep)
    tl.debug_barrier()

    slot = tl.arange(0, K)
    group = tl.load(kept_group + slot)  # [K], ascending, so candidates are in id order
    # Flat only once they are loaded: Triton 3.6 would read a flat list one logit at a time.
    o = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits + o, mask=o < n_vocab, other=-float("inf")).to(tl.float32)
    key = tl.reshape(tl.where(o < n_vocab, order_key(x, ZERO_BITS), lowest), (K * GROUP,))
    keep, at = place_best(key, K, ZERO_BITS)
    # Their places alone: with logits and ids, too, the search would not fit the registers.
    tl.store(kept_place + at, tl.arange(0, K * GROUP), mask=keep)
    tl.debug_barrier()

    place = tl.load(kept_place + slot)
    id_k = tl.load(kept_group + place // GROUP) * GROUP + place % GROUP
    x_k = tl.load(logits + id_k, mask=id_k < n_vocab, other=-float("inf")).to(tl.float32)
    key_k = tl.where(id_k < n_vocab, order_key(x_k, ZERO_BITS), lowest)
    tl.store(kept_key + slot, key_k)
    tl.debug_barrier()

    rank = tl.zeros((K,), tl.int32)
    step: tl.constexpr = K if K < COMPARED else COMPARED
    for start in range(0, K, step):
        other = start + tl.arange(0, step)
        key_o = tl.load(kept_key + other)
        better = (key_o[None, :] > key_k[:, None]) | (
            (key_o[None, :] == key_k[:, None]) & (other[None, :] < slot[:, None])
        )
        rank += tl.sum(better.to(tl.int32), 1)
    return x_k, id_k, rank


@triton.jit  # type: ignore[untyped-decorator]
def select_kernel(  # type: ignore[no-untyped-def]
    logits,  # [P, V], row stride `stride`
    group_max,  # [P, n_slots] float32
    values,  # [P, k] float32
    ids,  # [P, k] int64
    kept_group,  # [P, K] int32 scratch
    kept_place,  # [P, K] int32 scratch
    kept_key,  # [P, K] int32 scratch
    stride,
    n_vocab,
    n_groups,
    n_slots,
    k,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO_BITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_k, id_k, rank = select_row(
        logits + row * stride,
        group_max + row * n_slots,
        kept_group + row * K,
        kept_place + row * K,
        kept_key + row * K,
        n_vocab,
        n_groups,
        n_slots,
        K,
        GROUPS,
        GROUP,
        ZERO_BITS,
    )
    tl.store(values + row * k + rank, x_k, mask=rank < k)
    tl.store(ids + row * k + rank, id_k.to(tl.int64), mask=rank < k)


def group_size(logits: Tensor, k: int, n_vocab: int) -> int:
    """Return the logits per group of scan_rows' maxima for a top-k; 0: select from the row itself.

    Near sqrt(n_vocab / k) both stages have equal work, but torch's maxima of fewer than 32 logits
    are slow; at most 4096 groups keep the kernel's first stage in registers.
    """
    if runs_triton(logits):
        return triton_group(k, n_vocab) if k <= MAX_TRITON_K else 0
    if n_vocab < 2 * 32 * k:
        return 0
    return 32 if n_vocab < 600 * k else 64 if n_vocab < 2000 * k else 128


def triton_group(k: int, n_vocab: int) -> int:
    """Return group_size for the kernel."""
    return max(128 if k <= 16 else 64, next_power_of_2(-(-n_vocab // 4096)))


def select_sizes(k: int, n_vocab: int, group: int) -> dict[str, int]:
    """Return the compile-time sizes of a kernel that calls select_row."""
    k_padded = next_power_of_2(k)
    n_groups = max(next_power_of_2(-(-n_vocab // group)), k_padded)
    warps = num_warps(max(n_groups, k_padded * group))
    return {"K": k_padded, "GROUPS": n_groups, "GROUP": group, "num_warps": warps}


def select_rows(
    logits: Tensor, group_max: Tensor | None, k: int, n_vocab: int, group: int
) -> tuple[Tensor, Tensor]:
    """Select the top-k of logits [P, V] with the group maxima of scan_rows.

    Returns values [P, k] and ids [P, k].
    """
    n_rows = logits.shape[0]
    values = logits.new_empty(n_rows, k, dtype=compute_dtype(logits.dtype))
    ids = logits.new_empty(n_rows, k, dtype=torch.int64)
    if group_max is not None and k <= MAX_TRITON_K and runs_triton(logits):
        if n_rows:
            with on_device(logits):
                arguments = select_arguments(logits, group_max, k, n_vocab, group)
                options = compile_options("select_kernel", logits, arguments["K"])
                select_kernel[(n_rows,)](logits, values=values, ids=ids, **arguments, **options)
        return values, ids
    n_read = n_vocab if group_max is None else k * group + group_max.shape[1]
    for rows in row_chunks(n_rows, cpu_chunk_rows(n_read)):
        z_c = logits[rows, :n_vocab]
        maxima_c = None if group_max is None else group_max[rows]
        values[rows], ids[rows] = _select_torch(z_c, maxima_c, k, group)
    return values, ids


def select_arguments(
    logits: Tensor, group_max: Tensor, k: int, n_vocab: int, group: int
) -> dict[str, Any]:
    """Return the arguments of a kernel that calls select_row."""
    n_rows, n_slots = group_max.shape
    sizes = select_sizes(k, n_vocab, group)
    scratch = group_max.new_empty(3, n_rows, sizes["K"], dtype=torch.int32)
    return {
        "group_max": group_max,
        "kept_group": scratch[0],
        "kept_place": scratch[1],
        "kept_key": scratch[2],
        "stride": logits.stride(0),
        "n_vocab": n_vocab,
        "n_groups": -(-n_vocab // group),
        "n_slots": n_slots,
        "k": k,
        **sizes,
        "ZERO_BITS": ZERO_BITS[logits.dtype],
    }


def _select_torch(z: Tensor, group_max: Tensor | None, k: int, group: int) -> tuple[Tensor, Tensor]:
    """Return the top-k of z [C, V]: all logits from the k-th best maximum on, sorted."""
    if group_max is None and k < z.shape[1]:
        values, ids = z.topk(k + 1)
        if bool((values[:, 1:] < values[:, :-1]).all()):  # without equals there is one order
            return values[:, :k], ids[:, :k]
    best = z if group_max is None else group_max[:, : -(-z.shape[1] // group)]
    edge = best.topk(k, sorted=False).values.amin(1)
    # Not `>=`: of a row with a NaN more stays, and k ids are found. Row by row, lowest id first.
    row, ids = (~(best < edge[:, None])).nonzero().unbind(1)
    if group_max is None:
        values = z[row, ids]
    else:
        found = read_groups(z, row, ids, group)  # [N, group]
        flat = nonzero_bytes(torch.lt(found, edge.index_select(0, row)[:, None]).logical_not_())
        at = flat // group
        row = row.index_select(0, at)
        ids = ids.index_select(0, at).mul_(group).add_(flat).sub_(at.mul_(group))
        values = found.view(-1).index_select(0, flat)
    count = row.bincount(minlength=len(z))
    width = int(count.max())
    if width > 4 * k:  # a row may be constant: of equal logits the first k are enough
        at_edge = (values == edge[row]).long()
        rank = at_edge.cumsum(0) - at_edge
        enough = (at_edge == 0) | (rank - rank[count.cumsum(0) - count][row] < k)
        row, ids, values = row[enough], ids[enough], values[enough]
        count = row.bincount(minlength=len(z))
        width = int(count.max())
    # Row r's logits go to [r, 0 ...] of a matrix. Padding comes after every id, so it wins no tie.
    shift = torch.arange(0, len(z) * width, width, device=z.device) - (count.cumsum(0) - count)
    at = torch.arange(len(row), device=z.device) + shift.index_select(0, row)
    ordered = values.new_full((len(z), width), -torch.inf)
    ordered.view(-1).index_copy_(0, at, values)
    ordered, order = ordered.sort(dim=1, descending=True, stable=True)
    all_ids = ids.new_zeros(ordered.shape)
    all_ids.view(-1).index_copy_(0, at, ids)
    return ordered[:, :k], all_ids.gather(1, order[:, :k])


def nonzero_bytes(mask: Tensor) -> Tensor:
    """Return the flat indices of True in a mask [N, W], W a multiple of 8, ascending.

    Eight at a time, as few are True: torch.nonzero takes as long for a byte as for 8.
    """
    word = mask.view(torch.int64).view(-1).nonzero()[:, 0]
    at, bit = mask.view(-1, 8).index_select(0, word).nonzero().unbind(1)
    return word.index_select(0, at).mul_(8).add_(bit)


def read_groups(z: Tensor, row: Tensor, group: Tensor, width: int) -> Tensor:
    """Return [N, width] the logits of N groups of z [C, V]; -inf past the end of a row."""
    n_vocab, stride = z.shape[1], z.stride(0)
    whole = n_vocab // width
    short = z[:, whole * width :]
    if not whole:
        return torch.nn.functional.pad(short[row], (0, width - n_vocab), value=-torch.inf)
    # Windows on the memory of z: copies of them are faster than of single logits.
    last = (len(z) - 1) * stride + n_vocab - width
    windows = z.as_strided((last + 1, width), (1, 1))
    found = windows.index_select(0, (row * stride + group * width).clamp_(max=last))
    if n_vocab % width:
        at = (group == whole).nonzero()[:, 0]
        found[at, : short.shape[1]] = short[row[at]]
        found[at, short.shape[1] :] = -torch.inf
    return found


def topk_select(logits: Tensor, k: int, *, n_vocab: int | None = None) -> tuple[Tensor, Tensor]:
    """Select the k largest of the first n_vocab logits of each row, best first.

    Returns (values [P, k], ids [P, k] int64).

    Exact. Among equal logits the lowest id comes first, also where the k-th and the next are equal.
    values are the raw logits in float32 (float64 for float64 logits). A row with a NaN gets k
    distinct valid ids, in no defined choice. Not differentiable.

    Raises ValueError or TypeError for a shape, layout, dtype, k or n_vocab out of range: 1 <= k <=
    n_vocab.
    """
    n_vocab = check_logits(logits, n_vocab)
    check_k(k, n_vocab)
    with torch.no_grad():
        group = group_size(logits, k, n_vocab)
        group_max = group_maxima(logits, n_vocab, group) if group else None
        return select_rows(logits, group_max, k, n_vocab, group)
