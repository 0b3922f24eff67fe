"""A run's folder: what is in it, whose run it is, and where to go on.

OUT/  model, tokenizer, logitcask.json   the result; the card comes last and means: finished
      run.json        what this run is: another run is refused
      metrics.jsonl   one line per logged update, and per evaluation
      checkpoints/    written by Trainer, marked by us when whole
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
"""The last file of a checkpoint: one without it is not whole."""


def read_run(out: Path) -> dict[str, Any] | None:
    """Read run.json; None for a new folder. ConfigError if other files are in the way."""
    if (out / RUN).exists():
        found: dict[str, Any] = json.loads((out / RUN).read_text())
        return found
    strangers = [f.name for f in out.iterdir() if f.name[0] != "."] if out.is_dir() else []
    if strangers:
        raise ConfigError(
            f"{out} holds {sorted(strangers)[0]!r} and no {RUN}: it is not the folder of a run",
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
    """IdentityError that names the first key in which the run that `place` holds is another."""
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
            f"--out {out}: {error.strerror}", hint="give another --out, a folder of the run's own"
        ) from error


def clear(out: Path) -> None:
    """Remove an earlier run but its run.json, which the next one replaces; strange files stay."""
    (out / METADATA).unlink(missing_ok=True)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    for pattern in ("*.safetensors", "*.safetensors.index.json", METRICS):
        for file in out.glob(pattern):
            file.unlink()


def newest_checkpoint(out: Path, resume_metadata: Mapping[str, Any]) -> tuple[Path, int] | None:
    """Return (folder, updates done) of the newest whole checkpoint, or None.

    Raises IdentityError if it was made from other data than `resume_metadata` says.
    """
    whole = [
        (json.loads(file.read_text()), file.parent)
        for file in (out / CHECKPOINTS).glob(f"checkpoint-*/{RESUME_METADATA}")
    ]
    if not whole:
        return None
    found, folder = max(whole, key=lambda pair: int(pair[0]["step"]))
    step = int(found.pop("step"))
    check_same(folder, found, resume_metadata)
    return folder, step


def write_resume_metadata(folder: Path, content: Mapping[str, Any]) -> None:
    write_json(folder / RESUME_METADATA, content)


class MetricsFile:
    """metrics.jsonl: a line per logged update and evaluation, each by one call, none twice."""

    def __init__(self, path: Path, step: int, *, first: bool = True) -> None:
        """Keep the lines up to `step`: what came after the checkpoint will be written again.

        Only the `first` of several processes writes.
        """
        self._path = path
        self._start = time.monotonic()
        self.last: dict[str, Any] = {}
        """The newest line of an update."""
        self.evaluations: list[dict[str, Any]] = []
        self.skipped = 0.0
        """Positions that gave no gradient because the student had moved too far from the scores."""
        kept = []
        for text in path.read_text().splitlines() if path.exists() else []:
            # A torn line is always beyond the newest checkpoint.
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
        """Record a line of an evaluation; only one process writes it."""
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
    """Whole or not at all."""
    replace_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Whole or not at all, also when the machine stops in between."""
    aside = path.with_name(f".{path.name}.new")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
