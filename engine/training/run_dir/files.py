"""Folder of a run: its files, its identity, and its lock.

OUT/  model, tokenizer, logitcask.json   the result; logitcask.json is written last
      run.json        identity of the run; another run is refused
      metrics.jsonl   one line per logged update, and per evaluation
      ledger.jsonl    one line per update: the segments that made it
      checkpoints/    see checkpoints.py
      tensorboard/    event files, with report_to = tensorboard
      trackers.json   the run of a tracker that got the metrics: `logitcask report --to` adds to it
      versions/       of a loop: versions of the student and its averages, see distill/versions.py
      teacher.json    of such a loop: the facts of its teacher
      logs/           of such a loop: output of its processes
      evaluations.jsonl   one line per version that `logitcask evaluate --worker` measured
      .lock           held by the process that writes, while it runs
"""

import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from logitcask.engine.config.runner import LOGS, TIMELINE
from logitcask.engine.errors import (
    ConfigError,
    IdentityError,
    IncompleteError,
    IntegrityError,
    LogitcaskError,
    ModelError,
    StoreError,
)
from logitcask.engine.events import EventHandler
from logitcask.engine.models.digests import read_json, replace_text
from logitcask.engine.training.processes import command_line

RUN, METRICS, CHECKPOINTS, METADATA = "run.json", "metrics.jsonl", "checkpoints", "logitcask.json"
LEDGER, TENSORBOARD, TRACKERS = "ledger.jsonl", "tensorboard", "trackers.json"
VERSIONS, TEACHER = "versions", "teacher.json"
EVALUATIONS, EVALUATOR = "evaluations.jsonl", ".evaluator"
LOCK = ".lock"
RESTORE = "restore it from a copy, give another --out, or lose that run with --overwrite"


def read_run(out: Path) -> dict[str, Any] | None:
    """Read run.json; None for a new folder.

    Raises ConfigError for a folder of other files, IntegrityError for a damaged run.json.
    """
    if (out / RUN).exists():
        return read_json(out / RUN, hint=RESTORE)
    # The other roles of a loop may come first.
    ours = {VERSIONS, TEACHER, LOGS, TIMELINE}
    names = {f.name for f in out.iterdir() if f.name[0] != "."} if out.is_dir() else set()
    others = names - ours
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
    # The digest of a plan depends on settings, so a setting that differs is named before it.
    for key in sorted([*mine, *theirs], key=lambda name: name == "plan"):
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
        raise _unusable(out, error) from error


def _unusable(out: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"--out {out}: {error.strerror}", hint="give another --out, for this run alone"
    )


@contextmanager
def locked(out: Path, on_event: EventHandler) -> Iterator[None]:
    """Hold the folder `out`, made if it is new, for one process that writes.

    Raises ConfigError where another process holds it, or where it cannot be made. The lock ends
    with its process, however that ends. On NFS it is one of the server's byte-range locks; mounted
    with `nolock` or `local_lock` it holds among the processes of one machine only.
    """
    make_folder(out)
    handle = _lock(out, on_event)
    try:
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):
            out.rmdir()  # empty where the run was refused before its first file


def _lock(out: Path, on_event: EventHandler) -> int:
    while True:
        try:
            handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _unusable(out, error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(handle, 200, 0).decode("utf-8", "replace") or "another process"
            os.close(handle)
            raise ConfigError(
                f"--out {out} is in use by {owner}", hint="wait for its end, or give another --out"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                os.close(handle)
                raise
            on_event(f"{out}: {error.strerror}; start no second run with this --out")
        with suppress(FileNotFoundError):
            # An owner that has just ended may have removed the file that was opened here.
            if os.path.samestat(os.stat(out / LOCK), os.fstat(handle)):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
                return handle
        os.close(handle)


_OF_TORCH_SAVE = re.compile("PytorchStreamWriter|inline_container|iostream error")
"""Texts of the RuntimeErrors that torch.save raises where a disk refuses."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise a StoreError that names the file, or `path`, in place of a disk's error."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, LogitcaskError) or (
            isinstance(error, RuntimeError) and not _OF_TORCH_SAVE.search(str(error))
        ):
            raise
        file = getattr(error, "filename", None) or path
        cause = getattr(error, "strerror", None) or str(error).splitlines()[0]
        if isinstance(error, RuntimeError):
            cause = f"torch.save failed, as on a full disk: {cause}"
        raise StoreError(
            f"cannot write {file}: {cause}",
            hint="make room on that disk, or raise the quota or the limit of file sizes, then run "
            "the same command again: it resumes from the newest checkpoint",
        ) from error


@contextmanager
def finishing(out: Path, updates: int) -> Iterator[None]:
    """Raise a failure of the last save with the command that finishes the run."""
    try:
        yield
    except ModelError:
        raise  # the student itself is wrong
    except Exception as error:
        kind = StoreError if isinstance(error, StoreError) else IncompleteError
        cause = error.cause if isinstance(error, LogitcaskError) else f"{error!r:.300}"
        raise kind(
            f"the {updates} updates are done, and the student is not saved: {cause}",
            hint=f"remove the cause, then this saves it from the last checkpoint in "
            f"{out / CHECKPOINTS}, which resumes: {command_line()}",
        ) from error


def clear(out: Path) -> None:
    """Remove an earlier run except run.json, which the next run replaces; other files stay."""
    (out / METADATA).unlink(missing_ok=True)
    for folder in (CHECKPOINTS, TENSORBOARD, VERSIONS, TIMELINE):
        shutil.rmtree(out / folder, ignore_errors=True)
    texts = (METRICS, LEDGER, TEACHER, EVALUATIONS, TRACKERS)
    for pattern in ("*.safetensors", "*.safetensors.index.json", *texts):
        for file in out.glob(pattern):
            file.unlink()


class MetricsFile:
    """metrics.jsonl: one line per logged update and per evaluation, each appended once."""

    def __init__(self, path: Path, text: str = "", *, first: bool = True) -> None:
        """Replace the file by the lines of `text`: those up to the state that training begins at.

        first: True in the process that writes.
        """
        self.path = path
        self._start = time.monotonic()
        self.last: dict[str, Any] = {}
        """Newest line of an update."""
        self.evaluations: list[dict[str, Any]] = []
        self.skipped = 0.0
        """Positions without a gradient, because the student was too far from the scores."""
        try:
            for line in map(json.loads, text.splitlines()):
                if "loss" in line:
                    self._count(line)
                else:
                    self.evaluations.append(line)
            self.positions = int(self.last.get("progress/positions", 0))
            self._earlier_s = float(self.last.get("progress/seconds", 0.0))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            # Of an earlier version, whose lines have no digest.
            raise IntegrityError(f"{path} is damaged: {error}", hint=RESTORE) from error
        if first:
            with writing(path):
                replace_text(path, text)

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
        with writing(self.path), self.path.open("ab", buffering=0) as file:
            file.write(data)
