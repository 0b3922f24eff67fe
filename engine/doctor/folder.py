"""The disk below a folder: space, inodes, hard links and the clock of its files."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from logitcask.engine.doctor.machine import GIB
from logitcask.engine.findings import Finding
from logitcask.engine.quantities import memory_size
from logitcask.engine.store.storage.local import DISK_HINTS

FEW_BYTES = 5 * GIB
FEW_INODES = 10_000
CLOCK_S = 60.0
"""`store gc` compares the times of files with the clock, in hours."""


def check_folder(folder: Path, what: str = "disk") -> Iterator[Finding]:
    """Check the disk of a folder, or where it would be made. what: name of the check.

    A file is written there, linked and removed again.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        yield Finding(
            check=what, state="fault", message=f"{place} is no folder", hint="give another path"
        )
        return
    try:
        skew = _write_and_link(place)
    except OSError as error:
        yield Finding(
            check=what,
            state="fault",
            message=f"cannot write files and links in {place}: {error.strerror or error}",
            hint=DISK_HINTS.get(error.errno or 0, "check the disk"),
        )
        return
    free, inodes = shutil.disk_usage(place).free, os.statvfs(place)
    # File systems without a fixed number of inodes have 0.
    full = inodes.f_files and inodes.f_favail < FEW_INODES
    hints = {
        "see the bytes of a distillation with `logitcask store estimate`": free < FEW_BYTES,
        f"remove files: {inodes.f_favail} more fit on this disk": full,
        f"set the clocks: files here get a time {skew:+.0f} s from it": abs(skew) > CLOCK_S,
    }
    hint = "; ".join(text for text, shown in hints.items() if shown)
    yield Finding(
        check=what,
        state="note" if hint else "ok",
        message=f"{memory_size(free)} free in {place}, which takes hard links",
        hint=hint,
    )


def _write_and_link(place: Path) -> float:
    """Write a file and a hard link to it; return the seconds of its time before the clock's."""
    with tempfile.TemporaryDirectory(prefix=".logitcask-doctor-", dir=place) as made:
        first = Path(made) / "first"
        first.write_bytes(b"doctor")
        os.link(first, Path(made) / "second")
        return first.stat().st_mtime - time.time()
