"""Reads everything that the log names, and tells what it does not name."""

from dataclasses import dataclass

import logitcask.engine.store.files as files
import logitcask.engine.store.record as record
import logitcask.engine.store.schema as schema
from logitcask.engine.store.log import Pin
from logitcask.engine.store.store import Store
from logitcask.engine.types import Progress, silent


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a verified store holds."""

    segments: int
    positions: int
    """Response positions of the rollout segments."""
    files: int
    bytes: int
    """Of all files that a commit made: segments and log records."""
    strays: tuple[str, ...]
    """Paths relative to the store that no record names: left by a writer that died, or strange."""


def verify(store: Store, progress: Progress = silent) -> Report:
    """Reads and decodes every file of every segment. Raises IntegrityError at the first bad one."""
    pin = store.head()
    positions = count = size = 0
    for done, each in enumerate(pin.segments):
        progress("verify", done, len(pin.segments))
        if each.kind == schema.ROLLOUT:
            positions += len(store.read_rollouts(each).tokens)
        else:
            store.read_scores(each)
    progress("verify", len(pin.segments), len(pin.segments))
    unique = {each.folder: each for each in pin.segments}
    for each in unique.values():
        count += len(each.files)
        size += sum(length for length, _ in each.files.values())
    for number in range(pin.number + 1):
        count += 1
        size += files.size(store.path / "log" / record.file_name(number)) or 0
    return Report(
        segments=len(unique),
        positions=positions,
        files=count,
        bytes=size,
        strays=_strays(store, pin),
    )


def _strays(store: Store, pin: Pin) -> tuple[str, ...]:
    known = {each.folder: each for each in pin.segments}
    found = [f"staging/{name}" for name in files.list_dir(store.path / "staging")]
    for name in files.list_dir(store.path / "log"):
        number = record.number_of(name)
        if number is None:
            found.append(f"log/{name}")
    for kind in schema.KINDS:
        for name in files.list_dir(store.path / "seg" / kind):
            folder = f"seg/{kind}/{name}"
            if folder not in known:
                found.append(folder)
                continue
            there = files.walk(store.path / folder)
            found += [f"{folder}/{file}" for file in there if file not in known[folder].files]
    return tuple(found)
