"""Models and stores that are made once per module."""

import shutil
from pathlib import Path

import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.types import ModelRef
from tests.engine.score.scored import ref, sampled_store
from tests.engine.tiny import make_model, save_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_folder(root / "student")
    save_folder(root / "teacher", make_model(seed=1))
    return root


@pytest.fixture(scope="module")
def student(folders: Path) -> ModelRef:
    return ref(folders / "student")


@pytest.fixture(scope="module")
def teacher(folders: Path) -> ModelRef:
    return ref(folders / "teacher")


@pytest.fixture(scope="module")
def scorer(teacher: ModelRef) -> HF:
    return HF(teacher)


@pytest.fixture(scope="module")
def stored_rollouts(tmp_path_factory: pytest.TempPathFactory, student: ModelRef) -> Path:
    return sampled_store(tmp_path_factory.mktemp("stores") / "made", student)


@pytest.fixture
def store(tmp_path: Path, stored_rollouts: Path) -> Path:
    """Copy a store with two rollout segments, which is faster than making it."""
    return shutil.copytree(stored_rollouts, tmp_path / "s")


@pytest.fixture
def drawn(tmp_path: Path, student: ModelRef) -> Path:
    """Make the same rollouts with 7 draws of the student at every position."""
    return sampled_store(tmp_path / "drawn", student, mc_draws=7)
