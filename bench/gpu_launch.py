"""The Triton kernels called with other constants than the package calls them with.

The only place of the benchmark that knows the kernels' arguments.
"""

import importlib.util
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from results import ROOT
from torch import Tensor

from logitcask.kernels import fused_rows
from logitcask.kernels.launch import next_power_of_2, on_device
from logitcask.kernels.logit_transform import PLAIN
from logitcask.kernels.row_grad import grad_kernel
from logitcask.kernels.row_stats import scan_kernel
from logitcask.kernels.topk_select import select_kernel

KERNELS = {"row_stats": scan_kernel, "row_grad": grad_kernel}
ZERO_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


def scan(
    kernel: Any,
    z: Tensor,
    lse: Tensor,
    entropy: Tensor,
    group_max: Tensor,
    *,
    group: int,
    tile: int,
    warps: int,
) -> None:
    """Statistics of z [P, V] into lse and entropy [P], maxima of groups into [P, n_slots]."""
    with on_device(z):
        kernel[(z.shape[0],)](
            z,
            lse,
            entropy,
            group_max,
            z.stride(0),
            z.shape[1],
            group_max.shape[1],
            *PLAIN.factors(),
            ROWS=tile // group,
            GROUP=group,
            GROUPS=True,
            SOFTCAP=False,
            num_warps=warps,
            enable_fp_fusion=True,
        )


def grad(
    kernel: Any,
    z: Tensor,
    out: Tensor,
    lse: Tensor,
    dense: Tensor,
    ids: Tensor,
    at_ids: Tensor,
    *,
    tile: int,
    warps: int,
) -> None:
    """As row_grad, all floats but z and out float32."""
    with on_device(z):
        kernel[(z.shape[0],)](
            z,
            out,
            lse,
            dense,
            dense,  # read for an entropy alone
            ids,
            at_ids,
            z.stride(0),
            out.stride(0),
            z.shape[1],
            z.shape[1],
            ids.shape[1],
            *PLAIN.factors(),
            PLAIN.slope_at_0,
            TILE=tile,
            IDS=next_power_of_2(ids.shape[1]),
            SOFTCAP=False,
            DENSE_LOG=False,
            num_warps=warps,
            enable_fp_fusion=True,
        )


def select(z: Tensor, group_max: Tensor, *, k: int, group: int, warps: int) -> Tensor:
    """ids [P, k] of the top-k, from the maxima that scan has left; k a power of two."""
    n_rows, n_slots = group_max.shape
    n_groups = -(-z.shape[1] // group)
    values, ids = group_max.new_empty(n_rows, k), group_max.new_empty(n_rows, k, dtype=torch.int64)
    kept_value = torch.empty_like(values)
    kept_group, kept_id = kept_value.to(torch.int32), kept_value.to(torch.int32)
    with on_device(z):
        select_kernel[(n_rows,)](
            z,
            group_max,
            values,
            ids,
            kept_group,
            kept_value,
            kept_id,
            z.stride(0),
            z.shape[1],
            n_groups,
            n_slots,
            k,
            K=k,
            GROUPS=max(next_power_of_2(n_groups), k),
            GROUP=group,
            ZERO_BITS=ZERO_BITS[z.dtype],
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return ids


def whole_row(call: Callable[[], Any], warps: int) -> Any:
    """What the call returns with so many warps for the program that does a whole row."""
    shipped = fused_rows.WHOLE_WARPS
    fused_rows.WHOLE_WARPS = warps
    try:
        return call()
    finally:
        fused_rows.WHOLE_WARPS = shipped


@cache
def staged(module: str, stages: int) -> Any:
    """The kernel of KERNELS with its main loop in so many stages.

    Triton's launch option does not reach a loop without a product (the compiled code is the same),
    so it is said in the source, of which a copy is made.
    """
    kernel = KERNELS[module]
    if stages == 1:
        return kernel
    text = (ROOT / "kernels" / f"{module}.py").read_text()
    loop = r"in range\((0, n_whole, \w+)\):"
    changed, n = re.subn(loop, rf"in tl.range(\1, num_stages={stages}):", text)
    if n != 1:
        raise RuntimeError(f"kernels/{module}.py has {n} main loops of the known form, not 1")
    file = Path(tempfile.mkdtemp()) / f"{module}_{stages}.py"
    file.write_text(changed)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return getattr(copy, kernel.__name__)
