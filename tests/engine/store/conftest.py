"""Fixtures of stores in memory: a folder in /dev/shm if there is one, and an object store.

Thousands of small files are flushed one by one, which is slow on a disk. No test cuts the power,
and a killed process loses no written page on a disk either.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from obstore.store import MemoryStore

from logitcask.engine.store import Store
from logitcask.engine.store.storage.base import Storage
from logitcask.engine.store.storage.local import LocalStorage
from logitcask.engine.store.storage.object_store import ObjectStorage
from logitcask.engine.store.store import open_on

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def disk_path() -> Iterator[Path]:
    """Yield a folder on a real disk, if the machine's temporary folder is on one."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Return each kind of storage; all have to keep the same guarantees."""
    if request.param == "folder":
        return LocalStorage(str(tmp_path / "cask"))
    return ObjectStorage("memory://cask", MemoryStore())


@pytest.fixture
def store(storage: Storage) -> Store:
    return open_on(storage, create=True)
