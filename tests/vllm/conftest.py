"""vLLM on a CPU, in a separate environment (`make test-vllm`): models, engines, a server."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.shim import VLLM_ON_CPU

# Set before vllm is imported. The engine in this process starts in 2 s instead of 25 s.
os.environ |= {**VLLM_ON_CPU, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.vllm.backend import VLLM
from logitcask.engine.models.identity import model_ref
from logitcask.engine.types import ModelRef
from tests.engine.tiny import make_model, save_folder
from tests.vllm.real_server import RealServer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Do not turn warnings into errors here, because imports of vLLM warn."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session", autouse=True)
def process_groups() -> Iterator[None]:
    """Keep the process groups, which all engines of this process share, when one engine closes."""
    from vllm.v1.engine import core

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "cleanup_dist_env_and_memory", lambda: None)
        yield


@pytest.fixture(scope="session")
def ref(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    """Return a tied model with heads of 32, which the CPU attention of vLLM supports."""
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
def real_server(ref: ModelRef, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """Start a server of `ref` as `teacher`; a test that kills it must start it again."""
    server = RealServer(ref.path, tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def vllm_server(real_server: RealServer) -> str:
    """Return the URL of the server."""
    return real_server.url
