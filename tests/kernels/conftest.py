"""Kernel tests run twice: `path` = torch (CPU tensors) and triton (a GPU if there is one, else
Triton's interpreter)."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when a kernel is decorated, so before the imports below

sys.path.insert(0, str(Path(__file__).parent))  # for kernel_cases and kernel_objectives

import triton

from logitcask.kernels import launch
from logitcask.kernels.row_stats import scan_kernel


@contextmanager
def on_triton() -> Iterator[str]:
    """Yield the device of tensors that run the Triton kernels inside."""
    if torch.cuda.is_available():
        yield "cuda"
        return
    if isinstance(scan_kernel, triton.JITFunction):
        pytest.fail(
            "logitcask.kernels was imported before TRITON_INTERPRET=1: "
            "set it in the shell or run tests/kernels alone"
        )
    with launch.triton_on_cpu():
        yield "cpu"


@pytest.fixture(params=["torch", "triton"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the device of a test's tensors, for the path named by the parameter."""
    if request.param == "torch":
        yield "cpu"
        return
    with on_triton() as name:
        yield name


@pytest.fixture
def triton_device() -> Iterator[str]:
    """Yield `device` of the Triton path alone."""
    with on_triton() as name:
        yield name
