"""What a row of the kernel benchmark says of the machine, the versions and the code."""

import shutil
import subprocess
import time
from typing import Any

import results
import torch
import triton
from kernel_limits import Rates

Row = dict[str, Any]


def about(device: torch.device, rates: Rates | None = None) -> Row:
    """The same for all rows of a run; `started` (seconds since 1970) tells runs apart."""
    row: Row = {
        "device": device.type,
        "started": int(time.time()),
        "threads": torch.get_num_threads(),
        "kernels": results.kernels_digest(),
        **results.circumstances(),
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
    return str(row.get("gpu") or f"{row['machine']}, {row['threads']} threads")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def digits(value: float) -> float:
    """To four significant digits: nothing here is known better."""
    return float(f"{value:.4g}")


def short(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def failure(error: Exception) -> str:
    """The status of a row whose call has failed, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "out of memory"
    first = (str(error).splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {first[:200]}"


def _driver() -> dict[str, str]:
    """Version of the GPU's driver and its clocks now."""
    fields = ["driver_version", "clocks.sm", "clocks.mem", "power.limit"]
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
        done = subprocess.run([tool, *query], capture_output=True, text=True)
        told = [part.strip() for part in done.stdout.split(",")]
        if done.returncode == 0 and len(told) == len(fields):
            return dict(zip(fields, told, strict=True))
    return dict.fromkeys(fields, results.UNKNOWN)
