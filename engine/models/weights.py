"""Tensors of a model folder: the sha256 of each, cached by weight file."""

import contextlib
import hashlib
import json
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from logitcask.engine.config.parse.strict_json import count_values
from logitcask.engine.errors import ModelError
from logitcask.engine.events import running_step
from logitcask.engine.models.weight_files import weight_files

MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format itself."""
MAX_HEADER_VALUES = 1 << 20
"""Those of a hundred thousand tensors."""
RACY_NS = 2_000_000_000
"""Files younger than this are not cached: they may change again within one tick of the clock."""


def folder_tensors(path: Path) -> dict[str, list[Any]]:
    """Return name -> [dtype, shape, sha256 of the bytes] of every tensor of a folder.

    Files that did not change since they were last read are not read again.
    """
    cache = _read_cache()
    tensors: dict[str, list[Any]] = {}
    changed = False
    for file in weight_files(path):
        stat = file.stat()
        # A copy may keep the time of modification, but no program sets the time of change.
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        entry = cache.get(str(file))
        if entry is None or entry["stamp"] != stamp:
            with running_step(f"hash {file.name}", stat.st_size, "bytes") as hashing:
                entry = {"stamp": stamp, "tensors": tensor_digests(file, hashing.add)}
            if time.time_ns() - stat.st_mtime_ns > RACY_NS:
                cache[str(file)] = entry
                changed = True
        for name, *rest in entry["tensors"]:
            if name in tensors:
                raise ModelError(
                    f"{path} holds the tensor {name} twice, again in {file.name}",
                    hint="save it with save_pretrained(folder), each tensor in one file",
                )
            tensors[name] = rest
    if changed:
        _write_cache(cache)
    return tensors


def tensor_digests(
    file: Path, on_bytes: Callable[[int], None] = lambda count: None
) -> list[list[Any]]:
    """Return [name, dtype, shape, sha256 of the bytes] of every tensor in a safetensors file.

    on_bytes: called with the bytes of each tensor that was read, from any thread.
    Format: header length (8 bytes, little-endian), a JSON header
    {name: {dtype, shape, data_offsets}}, data.
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(file, f"its header claims {length} bytes of {size}")
        text = stream.read(length)
        if (values := count_values(text)) > MAX_HEADER_VALUES:
            raise _damaged(file, f"its header holds {values} JSON values")
        try:
            header = json.loads(text)
            header.pop("__metadata__", None)
            spans = [
                (name, str(t["dtype"]), [int(n) for n in t["shape"]], *map(int, t["data_offsets"]))
                for name, t in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(file, f"its header is not readable: {error}") from error
        start = 8 + length
        for name, _, _, begin, end in spans:
            if not 0 <= begin <= end <= size - start:
                raise _damaged(file, f"tensor {name} lies at bytes {begin}:{end} of {size - start}")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:

            def sha(span: tuple[str, str, list[int], int, int]) -> str:
                with memoryview(data) as whole, whole[start + span[3] : start + span[4]] as part:
                    found = hashlib.sha256(part).hexdigest()
                on_bytes(span[4] - span[3])
                return found

            # hashlib releases the interpreter lock, so threads hash in parallel.
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                hashes = list(pool.map(sha, spans))
    return [[*span[:3], sha256] for span, sha256 in zip(spans, hashes, strict=True)]


def _damaged(file: Path, cause: str) -> ModelError:
    return ModelError(
        f"{file} is not a whole safetensors file: {cause}", hint="copy or download it again"
    )


def cache_folder() -> Path:
    """Return the folder of what is derived from models: digests, results of checks."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "logitcask"


def _cache_file() -> Path:
    return cache_folder() / "weights.json"


def _read_cache() -> dict[str, dict[str, Any]]:
    """Return {file: {"stamp": [size, times, inode], "tensors": [...]}}; {} for a damaged cache."""
    try:
        entries = json.loads(_cache_file().read_bytes())
        return {
            str(file): {
                "stamp": [int(n) for n in entry["stamp"]],
                "tensors": [
                    [str(name), str(dtype), [int(n) for n in shape], str(sha)]
                    for name, dtype, shape, sha in entry["tensors"]
                ],
            }
            for file, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _write_cache(entries: Mapping[str, Any]) -> None:
    """Replace the cache, without deleted files; of two concurrent writers the later one wins."""
    present = {file: entry for file, entry in entries.items() if Path(file).exists()}
    # A home folder without write access costs time and nothing else.
    with contextlib.suppress(OSError):
        target = _cache_file()
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, staged = tempfile.mkstemp(dir=target.parent)
        with os.fdopen(handle, "w") as stream:
            json.dump(present, stream, sort_keys=True, separators=(",", ":"))
        os.replace(staged, target)
