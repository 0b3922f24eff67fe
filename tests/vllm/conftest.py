"""vLLM on a CPU, in an environment of its own (`make test-vllm`): models, engines, a server."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.shim import VLLM_ON_CPU, with_shim

# Before vllm is imported. The engine in this process starts in 2 s and not in 25.
os.environ |= {**VLLM_ON_CPU, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.vllm import VLLM
from logitcask.engine.identity import model_ref
from logitcask.engine.types import ModelRef
from tests.engine.tiny import make_model, save_folder

START = 180
"""Seconds that a server may take: 26 to 59 were seen."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Elsewhere a warning is an error; those of vLLM's own imports are not ours to mend."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session", autouse=True)
def process_groups() -> Iterator[None]:
    """Engines in one process share them, and the first that closes would take them from all."""
    from vllm.v1.engine import core

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "cleanup_dist_env_and_memory", lambda: None)
        yield


@pytest.fixture(scope="session")
def ref(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    """A tied model; heads of 32, which vLLM's CPU attention takes."""
    folder = save_folder(tmp_path_factory.mktemp("tied"), make_model(hidden=64))
    return model_ref(str(folder), chat_template=True)


@pytest.fixture(scope="session")
def hf(ref: ModelRef) -> HF:
    return HF(ref)


@pytest.fixture(scope="module")
def vllm(ref: ModelRef) -> Iterator[VLLM]:
    backend = VLLM(ref)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def exact(ref: ModelRef) -> Iterator[VLLM]:
    backend = VLLM(ref, exact=True)
    yield backend
    backend.close()


@pytest.fixture(scope="session")
def vllm_server(ref: ModelRef, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real server of `ref`, named teacher, which answers at ids of every row's own.
    Sequences of at most 64 tokens: its kernels are interpreted."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(ref.path), "--served-model-name", "teacher"),
        *("--dtype", "float32", "--max-model-len", "256", "--max-logprobs", "128"),
        *("--enforce-eager", "--enable-scale-out", "--generation-config", "vllm"),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    environment = with_shim(folder)
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    log = folder / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        end = time.monotonic() + START
        while not healthy(url):
            if server.poll() is not None or time.monotonic() > end:
                pytest.fail(log.read_text()[-4000:])
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            return bool(answer.status == 200)
    except urllib.error.URLError:
        return False
