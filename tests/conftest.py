"""One thread a test process, what a test needs from the machine, and how often tests repeat."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

torch.set_num_threads(1)

# Triton decides at its import whether kernels are interpreted, so this comes before any test file.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Digests of weights are cached in the user's folder; tests keep out of it.
os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), "logitcask-tests-cache")

# vLLM pins torch and transformers and lives in an environment of its own: `make test-vllm`.
collect_ignore = [] if find_spec("vllm") else ["vllm"]

NEEDS = {
    "gpu": torch.cuda.is_available,
    "make": lambda: shutil.which("make") is not None,
    "peft": lambda: find_spec("peft") is not None,
    "soak": lambda: bool(os.environ.get("LOGITCASK_SOAK")),
}
"""What `@pytest.mark.needs(name)` may ask for."""
OPTIONAL = ("gpu", "soak")
"""Needs that CI need not have: a GPU, and the hours and the root of `make soak`."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A missing need skips a test at home; under CI it fails it, but for those of OPTIONAL."""
    for mark in item.iter_markers("needs"):
        for need in mark.args:
            if NEEDS[need]():
                continue
            if os.environ.get("CI") and need not in OPTIONAL:
                pytest.fail(f"CI lacks {need}")
            pytest.skip(f"no {need} here")


@pytest.fixture
def counts(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """How often a test is repeated: in CI, and in `make soak`, which wants to know what it did."""

    def count(ci: int, soak: int) -> int:
        told = os.environ.get("LOGITCASK_SOAK")
        if not told:
            return ci
        with open(told, "a") as file:
            file.write(json.dumps({"test": request.node.nodeid, "count": soak}) + "\n")
        return soak

    return count
