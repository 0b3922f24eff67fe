"""Temporary names in the folders of their targets, outside of a store."""

import os
import re
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

OLD_S = 3600.0
"""A writer that has written nothing for so long is dead."""
_NAME = re.compile(r"\.[0-9a-f]{32}")


def temporary_in(folder: Path) -> Path:
    """Make the folder, remove what dead writers left in it, and return an unused hidden path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in os.listdir(folder):
        path = folder / name
        # Another process may remove it first, or it may belong to another user.
        with suppress(OSError):
            if _NAME.fullmatch(name) and time.time() - path.lstat().st_mtime > OLD_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder / f".{uuid.uuid4().hex}"
