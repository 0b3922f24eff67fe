"""Digests of files: JSON that carries its own, and all files of a folder.

A JSON file holds the sha256 of its other keys, so that neither an edit nor a damaged disk passes
for the values that were written. A file without this key is of an earlier version.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from logitcask.engine.errors import IntegrityError
from logitcask.engine.events import running_step

SELF = "self_sha256"
"""Key of a JSON file: the sha256 of its other keys."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file by `content` as JSON with its digest, atomically and durably."""
    body = json.loads(json.dumps(content))
    text = json.dumps({**body, SELF: _sha256_of(body)}, indent=1, sort_keys=True)
    replace_text(path, text + "\n")


def read_json(path: Path, *, hint: str) -> dict[str, Any]:
    """Return the content of a file of `write_json`, without its digest.

    Raises IntegrityError, with `hint`, where it is not what was written.
    """
    try:
        body = json.loads(path.read_bytes())
        if not isinstance(body, dict):
            raise ValueError("not a JSON object")
        recorded = body.pop(SELF, None)
        if recorded is not None and recorded != _sha256_of(body):
            raise ValueError("other values than its own sha256 has")
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is damaged: {error}", hint=hint) from error
    return body


def _sha256_of(body: Mapping[str, Any]) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Replace a file by `text` atomically and durably."""
    staged = path.with_name(f".{path.name}.new")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Write a file, or the names in a folder, through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Return the digest of the bytes of a file."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def file_digests(folder: Path, last: str) -> dict[str, str]:
    """Flush all files below a folder, return name -> digest; not of hidden ones and of `last`."""
    names = [name for name in file_names(folder) if name != last]
    for name in names:
        flush(folder / name)
    return dict(zip(names, _hashed(folder, names), strict=True))


def difference(folder: Path, digests: Mapping[str, str]) -> str:
    """Describe the first file that is not as in `digests`; '' where all of them are."""
    for name in digests:
        if not (folder / name).is_file():
            return f"{name} is missing"
    for (name, recorded), found in zip(digests.items(), _hashed(folder, digests), strict=True):
        if found != recorded:
            return f"{name} holds other bytes than were written"
    return ""


def file_names(folder: Path) -> list[str]:
    """Return the sorted names of all files below a folder, without hidden ones."""
    files = (path for path in folder.rglob("[!.]*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _hashed(folder: Path, names: Mapping[str, str] | list[str]) -> list[str]:
    sizes = {name: (folder / name).stat().st_size for name in names}
    with running_step(f"hash {folder.name}", sum(sizes.values()), "bytes") as hashing:

        def hashed(name: str) -> str:
            found = sha256_of(folder / name)
            hashing.add(sizes[name])
            return found

        # hashlib releases the interpreter lock, so threads hash in parallel.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(hashed, names))
