"""Folder of a run: its files, its identity, and the newest checkpoint.

OUT/  model, tokenizer, logitcask.json   the result; logitcask.json is written last
      run.json        identity of the run; another run is refused
      metrics.jsonl   one line per logged update, and per evaluation
      checkpoints/    written by Trainer; complete with logitcask_checkpoint.json
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from logitcask.engine.errors import ConfigError, IdentityError

RUN, METRICS, CHECKPOINTS, METADATA = "run.json", "metrics.jsonl", "checkpoints", "logitcask.json"
RESUME_METADATA = "logitcask_checkpoint.json"
"""The last file of a checkpoint: without it the checkpoint is incomplete."""


def read_run(out: Path) -> dict[str, Any] | None:
    """Read run.json; None for a new folder. Raises ConfigError for a folder of other files."""
    if (out / RUN).exists():
        found: dict[str, Any] = json.loads((out / RUN).read_text())
        return found
    others = [f.name for f in out.iterdir() if f.name[0] != "."] if out.is_dir() else []
    if others:
        raise ConfigError(
            f"{out} holds {min(others)!r} and no {RUN}: it is not the folder of a run",
            hint="give a new or an empty folder with --out",
        )
    return None


def check_same(
    place: Path | str,
    earlier: Mapping[str, Any],
    ours: Mapping[str, Any],
    *,
    hint: str = "give another --out (run.out), or --overwrite (run.overwrite) to lose that run",
) -> None:
    """Raise IdentityError with the first key in which the run in `place` differs from ours."""
    theirs = dict(_leaves(earlier))
    mine = dict(_leaves(json.loads(json.dumps(ours))))
    for key in [*mine, *theirs]:
        if mine.get(key) != theirs.get(key):
            raise IdentityError(
                f"{place} holds a run with {key} = {theirs.get(key)!r}, not {mine.get(key)!r}",
                hint=hint,
            )


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def make_folder(out: Path) -> None:
    """Make the folder of a run; raises ConfigError if that is not possible."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out {out}: {error.strerror}", hint="give another --out, for this run alone"
        ) from error


def clear(out: Path) -> None:
    """Remove an earlier run except run.json, which the next run replaces; other files stay."""
    (out / METADATA).unlink(missing_ok=True)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    for pattern in ("*.safetensors", "*.safetensors.index.json", METRICS):
        for file in out.glob(pattern):
            file.unlink()


def newest_checkpoint(out: Path, resume_metadata: Mapping[str, Any]) -> tuple[Path, int] | None:
    """Return (folder, updates done) of the newest complete checkpoint, or None.

    Raises IdentityError if it differs in `resume_metadata`.
    """
    complete = [
        (json.loads(file.read_text()), file.parent)
        for file in (out / CHECKPOINTS).glob(f"checkpoint-*/{RESUME_METADATA}")
    ]
    if not complete:
        return None
    found, folder = max(complete, key=lambda pair: int(pair[0]["step"]))
    step = int(found.pop("step"))
    check_same(folder, found, resume_metadata)
    return folder, step


def write_resume_metadata(folder: Path, content: Mapping[str, Any]) -> None:
    write_json(folder / RESUME_METADATA, content)


class MetricsFile:
    """metrics.jsonl: one line per logged update and per evaluation, each appended once."""

    def __init__(self, path: Path, step: int, *, first: bool = True) -> None:
        """Keep the lines up to `step`: later ones are written again after the checkpoint.

        first: True in the process that writes.
        """
        self._path = path
        self._start = time.monotonic()
        self.last: dict[str, Any] = {}
        """Newest line of an update."""
        self.evaluations: list[dict[str, Any]] = []
        self.skipped = 0.0
        """Positions without a gradient, because the student was too far from the scores."""
        kept = []
        for text in path.read_text().splitlines() if path.exists() else []:
            # An incomplete line is always later than the newest checkpoint.
            if text.endswith("}") and json.loads(text)["progress/step"] <= step:
                kept.append(text)
        for line in map(json.loads, kept):
            if "loss" in line:
                self._count(line)
            else:
                self.evaluations.append(line)
        self.positions = int(self.last.get("progress/positions", 0))
        self._earlier_s = float(self.last.get("progress/seconds", 0.0))
        if first:
            replace_text(path, "".join(f"{text}\n" for text in kept))

    def seconds(self) -> float:
        """Return the seconds of training, those before an interruption included."""
        return self._earlier_s + time.monotonic() - self._start

    def append(self, line: dict[str, float | None]) -> None:
        self._count(line)
        self._write(line)

    def _count(self, line: dict[str, Any]) -> None:
        before = self.last.get("progress/positions", 0)
        share = line.get("cache/skipped_share") or 0.0
        self.skipped += share * (line["progress/positions"] - before)
        self.last = line

    def evaluated(self, line: dict[str, float | None], *, write: bool) -> None:
        """Record a line of an evaluation; write: True in the process that writes."""
        self.evaluations.append(line)
        if write:
            self._write(line)

    def _write(self, line: dict[str, float | None]) -> None:
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(handle, data)
        finally:
            os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Replace a file by `content` as JSON, atomically."""
    replace_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Replace a file by `text` atomically and durably."""
    staged = path.with_name(f".{path.name}.new")
    with staged.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
