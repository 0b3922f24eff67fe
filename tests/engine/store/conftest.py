"""Stores in memory: thousands of small files and folders, flushed one by one, where the system
offers that, and an object store that is a dictionary. Nothing here cuts the power, and a killed
process loses no written page on a disk either.
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
    """On a real disk, if the machine's temporary folder is on one."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Every medium that a store can lie on; what is promised, each has to keep."""
    if request.param == "folder":
        return LocalStorage(str(tmp_path / "cask"))
    return ObjectStorage("memory://cask", MemoryStore())


@pytest.fixture
def store(storage: Storage) -> Store:
    return open_on(storage, create=True)
