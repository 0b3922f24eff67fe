"""Versions of a student in training: one folder each, below the folder of the run.

OUT/versions/v<number>/       a model folder, logitcask.json last; number: its version
OUT/versions/ema-v<number>/   with teacher.follow = ema: the average at a refresh of the teacher

The trainer writes them, and samplers load the newest. A version has the digest that `live_digest`
gave to the trainer, which is recorded and never computed from the files again: only a folder that a
trainer of this run has published is taken for a version.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from logitcask.engine.backends.base import close_backend, reload_backend
from logitcask.engine.commands.load_teacher import backend
from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Lora
from logitcask.engine.errors import IdentityError, ModelError
from logitcask.engine.events import EventHandler
from logitcask.engine.models.identity import METADATA_FILE, read_metadata
from logitcask.engine.models.load import live_digest
from logitcask.engine.models.save import save_student
from logitcask.engine.training.evaluation.versions import is_due
from logitcask.engine.training.run_dir.files import VERSIONS, writing
from logitcask.engine.training.sharding.student import whole_student
from logitcask.engine.types import ModelRef

STUDENT, AVERAGE = "v", "ema-v"
"""Beginnings of the names of folders, before the number."""
DIGEST = {STUDENT: "live_weights", AVERAGE: "weights"}
"""Key of the metadata that holds the digest of a version: an average was never in training."""
KEPT = 2
"""Versions that stay: a sampler may be loading the one before the newest."""


def newest_version(out: Path, first: ModelRef) -> ModelRef | None:
    """Return the newest whole version below the folder of a run, None before the first.

    first: the student before update 0. Raises IdentityError for a version of another student.
    """
    for number in sorted(_numbers(out, STUDENT), reverse=True):
        if (found := read_version(out, first, number)) is not None:
            return found
    return None


def read_version(out: Path, first: ModelRef, number: int, kind: str = STUDENT) -> ModelRef | None:
    """Return a whole version, None where there is none; raises as `newest_version`.

    kind: STUDENT or AVERAGE.
    """
    folder = version_folder(out, number, kind)
    try:
        metadata = read_metadata(folder)
    except ModelError:
        if (folder / METADATA_FILE).exists():
            raise
        metadata = None  # removed in between
    if metadata is None:
        return None
    ours, key = (first.base_weights, number), DIGEST[kind]
    if (metadata["root"], metadata["version"]) != ours or key not in metadata:
        raise IdentityError(
            f"{folder} holds version {metadata['version']} of {metadata['root']}, and the loop "
            f"publishes version {number} of {first.base_weights}",
            hint=f"set run.out to a new folder, or remove {folder}",
        )
    digest = str(metadata[key])
    return replace(first, path=folder, digest=digest, version=number)


def loaded(
    opened: Any,
    version: ModelRef,
    run: Run,
    on_event: EventHandler,
    *,
    still: Callable[[], bool],
    exact: bool = True,
) -> Any:
    """Return a backend with a version, or None where the version was removed meanwhile.

    opened: that of an earlier version, which takes the new one where it can, and closes otherwise;
    still: True while the version is published.
    """
    try:
        if opened is None or not reload_backend(opened, version, on_event):
            # Two models need not fit side by side.
            close_backend(opened)
            opened = None
            opened = backend(version, run, exact=exact)
    except Exception:
        close_backend(opened)
        if still():
            raise
        return None
    if still():
        return opened
    close_backend(opened)
    return None


def whole_copy(student: nn.Module, first: ModelRef, lora: Lora, seed: int) -> nn.Module | None:
    """Return the student whole, on the CPU of the first process, and None in the others.

    Every process calls this. A save may merge the adapters of the copy.
    """
    whole = whole_student(student, first, lora, seed)
    if whole is not None and lora.r:
        for parameter in whole.parameters():
            parameter.data = parameter.data.clone()
    return whole


def publish(
    out: Path,
    whole: nn.Module,
    first: ModelRef,
    number: int,
    metadata: Any,
    *,
    check: bool = True,
) -> str:
    """Save a student as a version, unless the folder has it already, and return its digest.

    whole: as of `whole_copy`; changed. metadata: plan and objective of the loop. check: as of
    `save_student`.
    """
    digest = live_digest(whole)
    found = read_version(out, first, number)
    if found is not None and found.digest == digest:
        return digest
    remove_version(out, number)
    with writing(version_folder(out, number)):
        save_student(
            whole,
            version_folder(out, number),
            parent=first,
            updates=number - first.version,
            metadata={"pin": None, **metadata, "live_weights": digest},
            check=check,
        )
    return digest


def remove_others(
    out: Path,
    newest: int,
    kind: str = STUDENT,
    *,
    needed: Callable[[int], bool] = lambda number: False,
) -> None:
    """Remove the versions that no sampler and no evaluator needs: old ones, and those after the
    newest.

    The latter are of a trainer that went further before it was killed, and are made again. needed:
    True for old ones that a scorer or a resumed trainer needs.
    """
    numbers = _numbers(out, kind)
    kept = sorted(number for number in numbers if number <= newest)[-KEPT:]
    for number in numbers - {*kept}:
        due = needed(number) or (kind == STUDENT and is_due(out, number))
        if number > newest or not due:
            remove_version(out, number, kind)


def remove_version(out: Path, number: int, kind: str = STUDENT) -> None:
    folder = version_folder(out, number, kind)
    with writing(folder):
        # First, so that it is not taken for a whole version.
        (folder / METADATA_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def version_folder(out: Path, number: int, kind: str = STUDENT) -> Path:
    return out / VERSIONS / f"{kind}{number}"


def _numbers(out: Path, kind: str) -> set[int]:
    """Return the numbers of the folders of versions, whole or not."""
    names = {folder.name.removeprefix(kind) for folder in (out / VERSIONS).glob(f"{kind}*")}
    return {int(name) for name in names if name.isascii() and name.isdecimal()}
