"""Checkpoints of a run: believed only where every file is as it was written.

OUT/checkpoints/checkpoint-N/
    model, optimizer, scheduler, random state, trainer_state.json   written by Trainer
    shard-RANK.safetensors    of a sharded run, in place of model and optimizer: see shards.py
    metrics.jsonl, ledger.jsonl   the run's, up to update N
    logitcask_checkpoint.json   plan, step and the digest of every other file; written last

A damaged checkpoint is renamed, an incomplete one removed, and training resumes from the one before
it. The result of a finished run is checked in the same way, and repaired from a checkpoint if the
run kept them.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logitcask.engine.errors import IntegrityError
from logitcask.engine.events import EventHandler
from logitcask.engine.models.digests import (
    difference,
    file_digests,
    file_names,
    flush,
    read_json,
    sha256_of,
    write_json,
)
from logitcask.engine.training.run_dir.files import (
    CHECKPOINTS,
    LEDGER,
    METADATA,
    METRICS,
    RESTORE,
    check_same,
    writing,
)

RESUME_METADATA, STATE = "logitcask_checkpoint.json", "trainer_state.json"
METRICS_SHA256, LEDGER_SHA256 = "metrics_sha256", "ledger_sha256"
"""Keys of a finished run's run.json: the digests of metrics.jsonl and ledger.jsonl."""


def complete_checkpoint(
    folder: Path, out: Path, resume_metadata: Mapping[str, Any], step: int
) -> None:
    """Write the last file of a checkpoint of the run in `out` after all others are on the disk."""
    for name in (METRICS, LEDGER):
        shutil.copyfile(out / name, folder / name)
    files = file_digests(folder, RESUME_METADATA)
    flush(folder)
    flush(folder.parent)
    write_json(folder / RESUME_METADATA, {**resume_metadata, "step": step, "files": files})


def checkpoint_steps(out: Path) -> list[int]:
    """Return the updates after which the run in `out` may resume, whole checkpoints or not."""
    steps = map(_step_of, (out / CHECKPOINTS).glob("checkpoint-*"))
    return sorted(step for step in steps if step >= 0)


def remove_checkpoints(out: Path) -> None:
    """Remove the checkpoints of a finished run."""
    if (out / CHECKPOINTS).is_dir():
        with writing(out / CHECKPOINTS):
            shutil.rmtree(out / CHECKPOINTS)


def resume_point(
    out: Path,
    updates: int,
    resume_metadata: Mapping[str, Any],
    earlier: Mapping[str, Any] | None,
    on_event: EventHandler,
) -> tuple[Path | None, int]:
    """Return (checkpoint to resume from, updates done); (None, `updates`) for a finished run.

    earlier: run.json of an earlier call. Every damaged file goes to `on_event`. Raises
    IdentityError for a checkpoint of another run, IntegrityError for a damaged result without a
    sound checkpoint.
    """
    damage = ""
    finished = (out / METADATA).exists()
    if finished and not (damage := _damage_of_result(out, earlier or {})):
        return None, updates
    folder = _newest(out, resume_metadata, on_event)
    if finished and folder is None:
        raise IntegrityError(
            f"{out}: {damage}, and there is no checkpoint to repair the finished run from",
            hint="restore the file from a copy, or train again with --overwrite",
        )
    if finished:
        on_event(f"{out}: {damage}; repairing the finished run from {folder}")
        (out / METADATA).unlink()
    if folder is None:
        return None, 0
    for name in (METRICS, LEDGER):
        # A checkpoint of an earlier version has no ledger.
        if (folder / name).is_file() and not _begins_with(out / name, folder / name):
            on_event(f"{out / name} is missing or damaged; restoring it from {folder}")
    return folder, _step_of(folder)


def _damage_of_result(out: Path, earlier: Mapping[str, Any]) -> str:
    """Describe the damage of a finished run; '' for a sound one."""
    try:
        files = read_json(out / METADATA, hint=RESTORE).get("files")
    except IntegrityError as error:
        return error.cause
    if damage := difference(out, files or {}):
        return damage
    if not any(out.glob("*.safetensors")):
        return "its weights are missing"
    for name, key in ((METRICS, METRICS_SHA256), (LEDGER, LEDGER_SHA256)):
        # A run of an earlier version has no ledger.
        if not (out / name).is_file():
            if key in earlier or name == METRICS:
                return f"{name} is missing"
        elif earlier.get(key, found := sha256_of(out / name)) != found:
            return f"{name} holds other lines than were written"
    return ""


def _newest(out: Path, resume_metadata: Mapping[str, Any], on_event: EventHandler) -> Path | None:
    folders = [each for each in (out / CHECKPOINTS).glob("checkpoint-*") if _step_of(each) >= 0]
    for folder in sorted(folders, key=_step_of, reverse=True):
        if not (folder / RESUME_METADATA).exists():
            on_event(f"{folder} is incomplete, without {RESUME_METADATA}; removing it")
            shutil.rmtree(folder)
            continue
        try:
            _check(folder, resume_metadata)
        except IntegrityError as error:
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            on_event(f"{error.cause}; keeping it as {aside.name}, and not resuming from it")
            continue
        return folder
    if folders:
        on_event(f"{out} has no sound checkpoint; training starts from the beginning")
    return None


def _check(folder: Path, resume_metadata: Mapping[str, Any]) -> None:
    """Raise IntegrityError for a damaged checkpoint, IdentityError for one of another run."""

    def damaged(cause: str) -> IntegrityError:
        return IntegrityError(f"{folder} is damaged: {cause}", hint=RESTORE)

    found = read_json(folder / RESUME_METADATA, hint=RESTORE)
    step, files = found.pop("step", None), found.pop("files", None)
    if not isinstance(files, dict) or not {METRICS, STATE} <= files.keys():
        raise damaged(f"{RESUME_METADATA} lacks digests of its files")
    if change := difference(folder, files):
        raise damaged(change)
    if others := sorted({*file_names(folder)} - {RESUME_METADATA, *files}):
        raise damaged(f"{others[0]} is not one of its files")
    try:
        of_state = json.loads((folder / STATE).read_bytes())["global_step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(f"{STATE}: {error}") from error
    if not step == of_state == _step_of(folder):
        raise damaged(f"it is of update {step}, and its {STATE} of update {of_state}")
    check_same(folder, found, resume_metadata)


def _step_of(folder: Path) -> int:
    """Return N of checkpoint-N; -1 for another name."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isascii() and number.isdecimal() else -1


def _begins_with(file: Path, start: Path) -> bool:
    text = start.read_bytes()
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(text)) == text
