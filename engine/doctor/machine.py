"""Cores, memory, limits, and the cache of models."""

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import psutil
from huggingface_hub import constants

from logitcask.engine.findings import Finding
from logitcask.engine.quantities import memory_size

GIB = 1 << 30
SHM_BYTES = GIB
"""Shared memory that vLLM, Ray and NCCL fill with two GPUs; Docker gives 1/16 of it."""
OPEN_FILES = 1024
CGROUP = Path("/sys/fs/cgroup/memory.max")


def check_machine() -> Iterator[Finding]:
    """Check cores, memory, shared memory, open files, and the cache of models."""
    yield _cores()
    total, free = memory()
    few = free < GIB
    yield Finding(
        check="memory",
        state="note" if few else "ok",
        message=f"{memory_size(free)} free of {memory_size(total)}",
        hint="end other programs, or take a machine with more" if few else "",
    )
    if (shared := Path("/dev/shm")).is_dir():
        size = shutil.disk_usage(shared).total
        small = size < SHM_BYTES
        yield Finding(
            check="shared memory",
            state="note" if small else "ok",
            message=f"{memory_size(size)} in {shared}",
            hint="vLLM, Ray and several GPUs need more: docker run --shm-size=8g" if small else "",
        )
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = files != resource.RLIM_INFINITY and files < OPEN_FILES
    yield Finding(
        check="open files",
        state="note" if low else "ok",
        message="no limit" if files == resource.RLIM_INFINITY else f"{files} at once",
        hint=f"allow more: ulimit -n {OPEN_FILES}" if low else "",
    )
    yield _model_cache()


def memory() -> tuple[int, int]:
    """Return the bytes of (all memory, free memory) of this process: those of its container."""
    found = psutil.virtual_memory()
    total, free = int(found.total), int(found.available)
    try:
        limit = int(CGROUP.read_text())
    except (OSError, ValueError):  # no container, or "max"
        return total, free
    return min(total, limit), min(free, limit)


def _cores() -> Finding:
    count = os.cpu_count() or 1
    # macOS has no affinity.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    load = os.getloadavg()[0]
    busy = load > usable
    return Finding(
        check="cores",
        state="note" if busy else "ok",
        message=f"{usable} of {count} usable, {load:.1f} busy in the last minute",
        hint="others use this machine: times will be longer" if busy else "",
    )


def cache_room() -> tuple[Path, int]:
    """Return (the folder of downloaded models, the free bytes of its disk)."""
    folder = Path(constants.HF_HUB_CACHE)
    place = folder if folder.is_dir() else next(p for p in folder.parents if p.is_dir())
    return folder, shutil.disk_usage(place).free


def _model_cache() -> Finding:
    """Describe the cache of models; of a token only that there is one."""
    folder, free = cache_room()
    token = "a token" if huggingface_hub.get_token() else "no token, which gated models need"
    offline = constants.HF_HUB_OFFLINE
    count = len([*folder.glob("models--*")])
    return Finding(
        check="model cache",
        state="note" if offline else "ok",
        message=f"{count} models in {folder}, {memory_size(free)} free; {token}",
        hint="HF_HUB_OFFLINE is set: unset it to download models" if offline else "",
    )
