"""Dispatch, input checks, chunk and tile sizes of all kernel files.

The tensor decides which path runs; there is no global switch:
- CUDA tensors run the Triton kernels, without autotuning: the functions here choose the sizes.
- CPU tensors run chunked torch, which computes the same closed forms.
- CPU tensors inside `with triton_on_cpu():` run the Triton kernels in Triton's interpreter, for
  tests. The process needs TRITON_INTERPRET=1 before the first import of a kernel file, because
  Triton reads it when a kernel is decorated.

LOGITCASK_DEBUG=1 adds checks that make the host wait for a GPU (ids in range, ids distinct). CPU
tensors always get them.

Letters: P rows, V columns of the logits, n_vocab columns that count (the rest pads the head), S
listed ids, K live top-k, D hidden size. Natural logarithms and nats everywhere outside the Triton
kernels.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

if TYPE_CHECKING:
    from logitcask.kernels.logit_transform import LogitTransform

TILE = 4096
"""Logits that one Triton program handles per step."""

NUMBERS_A_THREAD = 16
"""Numbers of a tile that a thread holds: two 128-bit loads of bf16. With them, and MAX_REGISTERS,
no kernel spills for any Triton from 3.6 to 3.9 and any architecture of `tests/kernels/aot.py`."""

MAX_REGISTERS: dict[tuple[str, int, str, torch.dtype, tuple[int, ...]], int] = {
    ("3.6", 120, "objective_kernel", torch.bfloat16, (64, 64)): 80,
    ("3.6", 100, "objective_kernel", torch.bfloat16, (128, 128)): 72,
    ("3.6", 120, "objective_kernel", torch.bfloat16, (128, 128)): 64,
    ("3.7", 90, "dot_kernel", torch.float32, ()): 64,
    ("3.7", 100, "scan_kernel", torch.bfloat16, (False,)): 64,
    ("3.7", 120, "scan_kernel", torch.bfloat16, (True,)): 96,
    ("3.7", 120, "select_kernel", torch.float32, (16,)): 104,
    ("3.8", 80, "objective_kernel", torch.float32, (128, 128)): 64,
    ("3.8", 80, "select_kernel", torch.float32, (128,)): 64,
    ("3.8", 90, "dot_kernel", torch.float32, ()): 64,
    ("3.9", 80, "objective_kernel", torch.bfloat16, (128, 128)): 64,
    ("3.9", 90, "select_kernel", torch.float32, (64,)): 96,
    ("3.9", 100, "select_kernel", torch.float32, (64,)): 96,
}
"""(Triton, compute capability, kernel, dtype, constants) -> registers a thread may have (maxnreg)
where ptxas would else choose too few and spill. It is the number that it chooses there, which as a
limit it keeps without a spill, or the next that is enough. Results do not change. dtype: of the
logits, hidden states or head. constants: of a scan SOFTCAP, of a selection K and S, padded."""

CPU_CHUNK = 1 << 18
"""Logits per torch chunk on a CPU: small enough to stay in cache between passes, large enough to
hide Python."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_TRITON_ON_CPU: ContextVar[bool] = ContextVar("triton_on_cpu", default=False)


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Run the Triton kernels on CPU tensors in Triton's interpreter inside the block; for tests.

    Raises RuntimeError unless TRITON_INTERPRET is 1.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "triton_on_cpu() needs Triton's interpreter: set TRITON_INTERPRET=1 before the first "
            f"import of logitcask.kernels (it is {os.environ.get('TRITON_INTERPRET')!r} now)"
        )
    token = _TRITON_ON_CPU.set(True)
    try:
        with warnings.catch_warnings():
            # numpy warns of overflow and NaN, a GPU does not.
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        _TRITON_ON_CPU.reset(token)


def runs_triton(tensor: Tensor) -> bool:
    """Return whether operations on this tensor launch Triton kernels."""
    return tensor.is_cuda or (tensor.device.type == "cpu" and _TRITON_ON_CPU.get())


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current, because Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics: float64 for float64 logits, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two >= max(n, 1)."""
    return 1 << max(n - 1, 0).bit_length()


def num_warps(n_numbers: int) -> int:
    """Return the warps of a program that holds tiles of n_numbers: 4 to 16."""
    return min(16, max(4, n_numbers // (32 * NUMBERS_A_THREAD)))


def compile_options(kernel: str, x: Tensor, *constants: int) -> dict[str, Any]:
    """Return the options of a launch of a kernel on x; constants as in MAX_REGISTERS."""
    capability = None
    if x.is_cuda and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(x.device)
        capability = 10 * major + minor
    return options_of(kernel, x.dtype, constants, capability)


def options_of(
    kernel: str, dtype: torch.dtype, constants: tuple[int, ...], capability: int | None
) -> dict[str, Any]:
    """Return compile_options for a compute capability, 90 of an H200; None if not of NVIDIA."""
    options: dict[str, Any] = {"enable_fp_fusion": True}  # the default of Triton 3.9 is another
    version = ".".join(triton.__version__.split(".")[:2])
    if capability is not None:
        limit = MAX_REGISTERS.get((version, capability, kernel, dtype, constants))
        options |= {} if limit is None else {"maxnreg": limit}
    return options


def reads_values(tensor: Tensor) -> bool:
    """Return whether checks may read the values; on a GPU that makes the host wait."""
    return tensor.device.type == "cpu" or os.environ.get("LOGITCASK_DEBUG") == "1"


def row_chunks(n_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Yield slices of at most chunk_rows rows that cover [0, n_rows) in order."""
    for start in range(0, n_rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, n_rows))


def cpu_chunk_rows(n_columns: int) -> int:
    """Return the rows of a torch chunk on a CPU with about CPU_CHUNK logits."""
    return max(1, CPU_CHUNK // n_columns)


def check_logits(logits: Tensor, n_vocab: int | None, name: str = "logits") -> int:
    """Raise unless logits are [P, V] in a supported dtype and layout; return n_vocab, default V."""
    if logits.dim() != 2:
        raise ValueError(
            f"{name} must be [rows, columns], got shape {tuple(logits.shape)}; "
            "flatten the leading dimensions"
        )
    check_float(logits, name)
    n_columns = logits.shape[1]
    if n_columns < 1:
        raise ValueError(
            f"{name} has no columns, got shape {tuple(logits.shape)}; pass at least one"
        )
    if n_columns > 1 and logits.stride(1) != 1:
        raise ValueError(
            f"{name} must be contiguous along the columns, got strides {logits.stride()}; "
            "call .contiguous()"
        )
    return check_n_vocab(n_vocab, n_columns, "the number of columns")


def check_n_vocab(n_vocab: int | None, n_columns: int, name: str) -> int:
    """Return n_vocab, by default n_columns. Raises ValueError unless it lies in 1..n_columns."""
    if n_vocab is None:
        return n_columns
    if not 1 <= n_vocab <= n_columns:
        raise ValueError(
            f"n_vocab={n_vocab} must lie in 1..{n_columns}, {name}; leave it out to use them all"
        )
    return n_vocab


def check_inputs(
    rows: Tensor,
    ids: Tensor,
    n_vocab: int,
    k: int | None,
    row_weight: Tensor | None,
    chunk_rows: int | None,
    logit_transform: "LogitTransform",
) -> None:
    """Raise unless the common arguments of a loss fit `rows` [P, ...]."""
    logit_transform.check()
    if k is not None:
        check_k(k, n_vocab)
    check_ids(ids, rows, n_vocab)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(
            f"chunk_rows={chunk_rows} must be at least 1; leave it out for the default"
        )
    if row_weight is not None:
        check_row_vector(row_weight, rows, "row_weight")


def check_float(tensor: Tensor, name: str) -> None:
    """Raise TypeError unless the tensor's path supports its dtype."""
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{name} is {tensor.dtype}; "
            "supported are bfloat16, float16, float32 and, on a CPU, float64"
        )
    if tensor.dtype == torch.float64 and runs_triton(tensor):
        raise TypeError(
            f"{name} is float64, which the Triton kernels do not support; "
            "cast it to float32 or move it to a CPU"
        )


def check_k(k: int, n_vocab: int) -> None:
    """Raise ValueError unless k lies in 1..n_vocab."""
    if not 1 <= k <= n_vocab:
        raise ValueError(f"k={k} must lie in 1..n_vocab={n_vocab}; pass a smaller k")


def check_ids(ids: Tensor, rows: Tensor, n_vocab: int) -> None:
    """Raise unless ids are [P, S] int64 for rows [P, ...], distinct in [0, n_vocab), or -1.

    The values are read on a CPU, or under LOGITCASK_DEBUG=1.
    """
    if ids.dtype != torch.int64:
        raise TypeError(f"ids is {ids.dtype}, must be int64; call ids.long()")
    if ids.dim() != 2 or ids.shape[0] != rows.shape[0]:
        raise ValueError(
            f"ids has shape {tuple(ids.shape)}, must be [{rows.shape[0]}, S]: one list per row"
        )
    check_device(ids, rows, "ids")
    if ids.numel() == 0 or not reads_values(ids):
        return
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= n_vocab:
        raise ValueError(
            f"ids span {low}..{high}, must be -1 (padding) or lie in 0..{n_vocab - 1}; "
            "replace an id that the student's head lacks by -1"
        )
    ordered = ids.sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(repeated.any()):
        row, slot = (int(i) for i in repeated.nonzero()[0])
        raise ValueError(
            f"ids of row {row} hold id {int(ordered[row, slot])} more than once; "
            "merge its entries, or set all but one to -1"
        )


def check_row_vector(vector: Tensor, rows: Tensor, name: str) -> None:
    """Raise unless vector is [P] of floating numbers for rows [P, ...]."""
    if vector.shape != (rows.shape[0],):
        raise ValueError(
            f"{name} has shape {tuple(vector.shape)}, must be [{rows.shape[0]}]: one number per row"
        )
    if not vector.is_floating_point():
        raise TypeError(f"{name} is {vector.dtype}, must be floating; call .float()")
    check_device(vector, rows, name)


def check_device(tensor: Tensor, other: Tensor, name: str) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device}, the rows are on {other.device}; move one of them"
        )
