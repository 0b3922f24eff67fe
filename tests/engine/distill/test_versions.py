"""Versions of a student: whole folders of one run, found without reading the weights."""

from pathlib import Path

import pytest
import torch

from logitcask.engine.config.training import Lora
from logitcask.engine.distill import versions
from logitcask.engine.distill.versions import newest_version, publish, remove_others, whole_copy
from logitcask.engine.errors import IdentityError
from logitcask.engine.models.identity import METADATA_FILE, model_ref, weights_digest
from logitcask.engine.models.load import live_digest, load_student
from logitcask.engine.types import ModelRef
from tests.engine.tiny import make_model, save_folder

METADATA = {"plan": "sha256:" + "0" * 64, "objective": {}}


@pytest.fixture
def first(tmp_path: Path) -> ModelRef:
    """Return a student before update 0."""
    folder = save_folder(tmp_path / "student", make_model(hidden=16, layers=1))
    return model_ref(str(folder), chat_template=False)


def written(out: Path, number: int) -> int:
    return (out / "versions" / f"v{number}" / METADATA_FILE).stat().st_ino


def test_a_version_is_published_once_and_never_hashed_again(
    first: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = load_student(first)
    assert newest_version(tmp_path, first) is None
    digest = publish(tmp_path, student, first, 2, METADATA)
    assert digest == live_digest(student)
    before = written(tmp_path, 2)
    publish(tmp_path, student, first, 2, METADATA)
    assert written(tmp_path, 2) == before
    with monkeypatch.context() as patch:
        for name in ("models.identity.weights_digest", "models.digests.sha256_of"):
            patch.setattr(f"logitcask.engine.{name}", None)
        found = newest_version(tmp_path, first)
    assert found is not None
    assert (found.version, found.digest) == (2, digest)
    assert (found.name, found.base_weights) == (first.name, first.digest)
    saved = model_ref(str(found.path), chat_template=False)
    assert (saved.version, saved.base_weights) == (2, first.digest)
    with torch.no_grad():
        next(student.parameters()).add_(1.0)
    assert publish(tmp_path, student, first, 2, METADATA) != digest
    assert weights_digest(found.path) != saved.digest


def test_only_whole_versions_up_to_the_newest_stay(first: ModelRef, tmp_path: Path) -> None:
    student = load_student(first)
    for number in (0, 2, 4, 6):
        publish(tmp_path, student, first, number, METADATA)
    # As a kill between two files of a removal leaves it.
    (tmp_path / "versions" / "v6" / METADATA_FILE).unlink()
    newest = newest_version(tmp_path, first)
    assert newest is not None
    assert newest.version == 4
    remove_others(tmp_path, 4)
    assert {path.name for path in (tmp_path / "versions").iterdir()} == {"v2", "v4"}
    # A trainer that resumes at update 2.
    remove_others(tmp_path, 2)
    assert {path.name for path in (tmp_path / "versions").iterdir()} == {"v2"}


def test_a_version_that_is_removed_while_it_is_read_is_none(
    first: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, load_student(first), first, 0, METADATA)
    read = versions.read_metadata

    def removed(folder: Path) -> object:
        (folder / METADATA_FILE).write_text("")
        try:
            return read(folder)
        finally:
            (folder / METADATA_FILE).unlink()

    monkeypatch.setattr(versions, "read_metadata", removed)
    assert newest_version(tmp_path, first) is None


def test_a_version_of_another_student_is_refused(first: ModelRef, tmp_path: Path) -> None:
    publish(tmp_path, load_student(first), first, 0, METADATA)
    other = save_folder(tmp_path / "other", make_model(hidden=16, layers=1, seed=1))
    with pytest.raises(IdentityError, match="holds version 0 of .*, and the loop publishes"):
        newest_version(tmp_path, model_ref(str(other), chat_template=False))


def test_publishing_leaves_adapters_in_training_as_they_are(
    first: ModelRef, tmp_path: Path
) -> None:
    lora = Lora(r=2)
    student = load_student(first, lora=lora)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    whole = whole_copy(student, first, lora, 0)
    assert whole is not None
    digest = publish(tmp_path, whole, first, 1, METADATA)
    assert digest == live_digest(student)
    after = student.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert weights_digest(tmp_path / "versions" / "v1") != first.digest
