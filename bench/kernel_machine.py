"""Machine, versions and code of a row of the kernel benchmark."""

import shutil
import subprocess
import time
from contextlib import AbstractContextManager
from typing import Any

import results
import torch
import triton
from kernel_limits import Rates
from results import Row
from triton.runtime import interpreter

from logitcask.kernels.launch import triton_on_cpu


def about(device: torch.device, rates: Rates | None = None) -> Row:
    """Return the part of a row that all rows of a run share; `started` is in seconds since 1970."""
    row: Row = {
        "device": device.type,
        "started": int(time.time()),
        "threads": torch.get_num_threads(),
        "kernels": results.kernels_digest(),
        **results.environment(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if rates is not None:
        row["copy_gb_s"] = digits(rates.copy_bytes_per_s / 1e9)
        row["gemm_tflop_s"] = digits(rates.flop_per_s / 1e12)
    if device.type == "cuda":
        row |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, **_driver()}
    return row


def machine(row: Row) -> str:
    """Return the name of the row's GPU or CPU."""
    return str(row.get("gpu") or f"{row['machine']}, {row['threads']} threads")


def interpreted() -> AbstractContextManager[None]:
    """Run the kernels on CPU tensors in Triton's interpreter inside the block.

    That of Triton 3.6 calls int() of arrays of one element, which numpy 2.4 no longer allows.
    """
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    if triton.__version__.startswith("3.6."):
        interpreter._patch_lang_tensor = patch_with_index
    return triton_on_cpu()


def name_of(dtype: torch.dtype) -> str:
    """Return the dtype's name, float32 for example."""
    return str(dtype).removeprefix("torch.")


def digits(value: float) -> float:
    """Round to four significant digits, the precision of these measurements."""
    return float(f"{value:.4g}")


def short(ms: float) -> str:
    """Return milliseconds with about three digits."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def failure(error: Exception) -> str:
    """Return the status of a row with a failed call, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "out of memory"
    first = (str(error).splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {first[:200]}"


def _driver() -> dict[str, str]:
    """Return the version of the GPU's driver, its clocks and its power limit."""
    fields = ["driver_version", "clocks.sm", "clocks.mem", "power.limit"]
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
        done = subprocess.run([tool, *query], capture_output=True, text=True)
        values = [part.strip() for part in done.stdout.split(",")]
        if done.returncode == 0 and len(values) == len(fields):
            return dict(zip(fields, values, strict=True))
    return dict.fromkeys(fields, results.UNKNOWN)
