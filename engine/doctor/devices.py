"""torch, GPUs, bfloat16 and Triton. torch is imported only where it may find a GPU."""

import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from logitcask.engine.findings import Finding
from logitcask.engine.quantities import memory_size

DRIVER = Path("/proc/driver/nvidia/version")
CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16 = {"amx_bf16", "avx512_bf16"}
"""Flags of CPUs that multiply bfloat16."""


def check_devices() -> Iterator[Finding]:
    """Check that torch sees the GPUs of this machine, and that Triton compiles for them."""
    try:
        torch_version = version("torch")
    except PackageNotFoundError:  # check_packages reports it
        return
    driver = DRIVER.exists()
    if torch_version.endswith("+cpu"):
        yield Finding(
            check="devices",
            state="note" if driver else "ok",
            message=f"torch {torch_version} is a build for CPUs"
            + (", and this machine has an NVIDIA GPU" if driver else ""),
            hint="pip install --force-reinstall torch, without -c constraints.txt"
            if driver
            else "",
        )
        yield _bfloat16()
        return
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding(
            check="devices",
            state="fault",
            message=f"torch {torch_version} cannot be imported: {error}",
            hint="pip install --force-reinstall torch",
        )
        return
    if not torch.cuda.is_available():
        yield Finding(
            check="devices",
            state="fault" if driver else "ok",
            message=f"torch {torch_version} sees no GPU"
            + (", and this machine has an NVIDIA driver" if driver else ""),
            hint="compare nvidia-smi with the CUDA of that torch, and look at CUDA_VISIBLE_DEVICES"
            if driver
            else "",
        )
        yield _bfloat16()
        return
    for index in range(torch.cuda.device_count()):
        yield _gpu(torch, index)
    yield _triton(torch)


def _bfloat16() -> Finding:
    """Return whether the CPU multiplies bfloat16, by the flags that Linux lists."""
    words = set(CPU_INFO.read_text().split()) if CPU_INFO.exists() else set()
    found = sorted(words & BFLOAT16)
    return Finding(
        check="bfloat16",
        state="ok",
        message=f"this CPU has {', '.join(found)}: dtype = auto follows config.json"
        if found
        else "this CPU has no instructions for it: dtype = auto is float32",
    )


def _gpu(torch: Any, index: int) -> Finding:
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    half = major >= 8
    return Finding(
        check=f"cuda:{index}",
        state="ok" if half else "note",
        message=f"{torch.cuda.get_device_name(index)}, {memory_size(free)} free of "
        f"{memory_size(total)}, "
        f"compute capability {major}.{minor}, {'bfloat16' if half else 'no bfloat16'}",
        hint="" if half else "give --dtype float32",
    )


def _triton(torch: Any) -> Finding:
    """Compile a kernel of this package, and compare it with its reference."""
    try:
        installed = version("triton")
    except PackageNotFoundError:  # check_packages reports it; torch for AMD brings its own
        installed = "of another package"
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    try:
        same = kernel_agrees(torch.device("cuda"))
    # The compiler, the driver and the C compiler raise anything from OSError to RuntimeError.
    except Exception as error:
        cause = " ".join(str(error).split())[:200]
        return Finding(
            check="triton",
            state="fault",
            message=f"triton {installed} compiles no kernel: {type(error).__name__}: {cause}",
            hint="compare the versions of torch and triton, and of the driver"
            if compiler
            else "install a C compiler and the headers of Python: apt install gcc python3-dev",
        )
    return Finding(
        check="triton",
        state="ok" if same else "fault",
        message=f"triton {installed} compiles kernels; their results are "
        + ("right" if same else "wrong"),
        hint="" if same else "report it with the output of this command, and use another Triton",
    )


def kernel_agrees(device: Any) -> bool:
    """Return whether the kernel that selects a top-k gives the ids of its reference."""
    import torch

    from logitcask.kernels.topk_select import topk_select, topk_select_reference

    logits = torch.arange(128.0, device=device).mul(37).remainder(128).view(2, 64)
    return torch.equal(topk_select(logits, 4)[1], topk_select_reference(logits, 4)[1])
