"""Launches of the Triton kernels with other launch parameters than the package's."""

import importlib.util
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from results import ROOT
from torch import Tensor

from logitcask.kernels.launch import compile_options, next_power_of_2, on_device
from logitcask.kernels.logit_transform import PLAIN
from logitcask.kernels.row_grad import grad_kernel
from logitcask.kernels.row_stats import scan_kernel
from logitcask.kernels.topk_select import select_arguments, select_kernel

KERNELS = {"row_stats": scan_kernel, "row_grad": grad_kernel}


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
    """Write statistics of z [P, V] to lse and entropy [P], maxima of groups to [P, n_slots]."""
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
            VECTOR=16 // z.element_size(),
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
    """Write row_grad to `out`; all floats but z and out are float32."""
    with on_device(z):
        kernel[(z.shape[0],)](
            z,
            out,
            lse,
            dense,
            dense,  # unused without an entropy
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
    """Return ids [P, k] of the top-k from the maxima of scan; k a power of two."""
    n_rows = len(z)
    values, ids = group_max.new_empty(n_rows, k), group_max.new_empty(n_rows, k, dtype=torch.int64)
    arguments = select_arguments(z, group_max, k, z.shape[1], group) | {"num_warps": warps}
    with on_device(z):
        options = compile_options("select_kernel", z, arguments["K"])
        select_kernel[(n_rows,)](z, values=values, ids=ids, **arguments, **options)
    return ids


@cache
def staged(module: str, stages: int) -> Any:
    """Return the kernel of KERNELS with its main loop in so many stages.

    Triton's launch option has no effect on a loop without a product: the compiled code is the same.
    So a copy of the source sets the number in the loop.
    """
    kernel = KERNELS[module]
    if stages == 1:
        return kernel
    text = (ROOT / "kernels" / f"{module}.py").read_text()
    loop = r"in range\((0, n_whole, \w+)\):"
    changed, n = re.subn(loop, rf"in tl.range(\1, num_stages={stages}):", text)
    if n != 1:
        raise RuntimeError(f"kernels/{module}.py has {n} main loops, must have 1")
    file = Path(tempfile.mkdtemp()) / f"{module}_{stages}.py"
    file.write_text(changed)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return getattr(copy, kernel.__name__)
