"""The ledger of a run: the stored segments that made each update.

OUT/ledger.jsonl has one line per update, here with line breaks:

    {"update": 3,
     "segments": [{"rollouts": ID, "version": 2, "teacher": "big", "scores": [ID]}],
     "rows": {"0": 120, "4": 33}, "age": [0, 0.22, 1], "drift": 0.004}

    segments   those that no earlier line has; the segments of the file are numbered from 0 in order
    rows       number of a segment -> its rows with a weight, once for each teacher
    age        [least, mean, largest] over these rows, in versions; left out for rollouts of other
               base weights
    teacher_age  likewise in updates since the refresh of a teacher that follows the student, whose
               segments have its "teacher_version"
    drift      cache/approx_kl of the line of metrics.jsonl of that update, if it has one
    skipped    cache/skipped_share of it, if rows were skipped
    resampled  rollouts that were deleted before the first update of their round, beyond the bounds
               of staleness: the round has others in their place

A segment with sequences of several versions has a number for each version. The lines are the same
for any number of processes, but for the rounding of the drift.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from logitcask.engine.errors import IntegrityError
from logitcask.engine.models.digests import replace_text
from logitcask.engine.objectives.bounds import DRIFT, SKIPPED
from logitcask.engine.packing.source import Pack
from logitcask.engine.packing.teachers import Source
from logitcask.engine.training.run_dir.files import RESTORE, writing

Update = tuple[int, Mapping[Source, int], Sequence[str]]
"""(update from 1, rows of each source, segments that were sampled again) of one process."""


class Ledger:
    """ledger.jsonl of a run: a line for each update, each appended once."""

    def __init__(
        self, path: Path, text: str = "", *, version: int | None = None, first: bool = True
    ) -> None:
        """Replace the file by the lines of `text`: those up to the state that training begins at.

        version: the student's before update 0; None = ages are not defined. first: True in the
        process that writes.
        """
        self.path = path
        self._version = version
        self._first = first
        self._numbers = {
            source: number for number, source in enumerate(sources_of(read_lines(path, text)))
        }
        self._pending: list[Update] = []
        if first:
            with writing(path):
                replace_text(path, text)

    def add(self, update: int, packs: Iterable[Pack], resampled: Sequence[str] = ()) -> None:
        """Add the packs that this process has of an update, counted from 1.

        resampled: seg_ids, the same in all processes.
        """
        rows: Counter[Source] = Counter()
        for pack in packs:
            rows.update(pack.sources)
        self._pending.append((update, rows, resampled))

    def take(self) -> list[Update]:
        """Return and forget the updates of this process without a line."""
        pending, self._pending = self._pending, []
        return pending

    def write(
        self, everyone: Sequence[Sequence[Update]], means: Mapping[str, float | None] | None = None
    ) -> None:
        """Append the lines of the updates of all processes; means: the metrics of the last one."""
        if not self._first:
            return
        lines = []
        for parts in zip(*everyone, strict=True):
            rows: Counter[Source] = Counter()
            for _, part, _ in parts:
                rows.update(part)
            update, _, resampled = parts[0]
            lines.append(self._line(update, rows))
            if resampled:
                lines[-1]["resampled"] = [*resampled]
        if lines:
            found = {"drift": (means or {}).get(DRIFT), "skipped": (means or {}).get(SKIPPED)}
            lines[-1] |= {name: _short(value) for name, value in found.items() if value}
        data = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        with writing(self.path), self.path.open("ab", buffering=0) as file:
            file.write(data.encode())

    def _line(self, update: int, rows: Mapping[Source, int]) -> dict[str, Any]:
        line: dict[str, Any] = {"update": update}
        # Not a difference of sets, which reads all segments of the run.
        if new := sorted(source for source in rows if source not in self._numbers):
            self._numbers |= {s: n for n, s in enumerate(new, len(self._numbers))}
            line["segments"] = [_entry(source) for source in new]
        counts = {self._numbers[source]: count for source, count in rows.items()}
        line["rows"] = {str(number): counts[number] for number in sorted(counts)}
        if self._version is not None and rows:
            now = self._version + update - 1
            line["age"] = _ages([(now - source.version, n) for source, n in rows.items()])
            teachers = [(source.teacher_version, n) for source, n in rows.items()]
            if moving := [(now - version, n) for version, n in teachers if version is not None]:
                line["teacher_age"] = _ages(moving)
        return line


def _ages(ages: Sequence[tuple[int, int]]) -> list[float]:
    """Return [least, mean, largest] of (age, rows), the mean over rows."""
    total = sum(age * rows for age, rows in ages)
    mean = _short(total / sum(rows for _, rows in ages))
    return [min(age for age, _ in ages), mean, max(age for age, _ in ages)]


def read_lines(path: Path, text: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of a ledger, or of its `text`. Raises IntegrityError where they are none."""
    if text is None:
        text = path.read_text(errors="replace")
    try:
        lines = [json.loads(line) for line in text.splitlines()]
        known = 0
        for line in lines:
            known += len(line.get("segments", ()))
            rows = {int(number): int(count) for number, count in line["rows"].items()}
            if type(line["update"]) is not int or not all(0 <= n < known for n in rows):
                raise ValueError(f"update {line['update']} names a segment that no line lists")
        list(sources_of(lines))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{path} is damaged: {error}", hint=RESTORE) from error
    return lines


def sources_of(lines: Iterable[Mapping[str, Any]]) -> Iterable[Source]:
    """Yield the segments of a ledger by their numbers."""
    for line in lines:
        for entry in line.get("segments", ()):
            yield Source(
                rollouts=str(entry["rollouts"]),
                version=int(entry["version"]),
                teacher=str(entry["teacher"]),
                scores=tuple(map(str, entry["scores"])),
                base=tuple(map(str, entry.get("base", ()))),
                teacher_version=_integer(entry.get("teacher_version")),
            )


def _entry(source: Source) -> dict[str, Any]:
    left_out = [key for key in ("base", "teacher_version") if getattr(source, key) in ((), None)]
    return {key: value for key, value in source._asdict().items() if key not in left_out}


def _integer(value: Any) -> int | None:
    return None if value is None else int(value)


def _short(value: float) -> float:
    """Return a number of four digits, for a file that stays small."""
    return float(f"{value:.4g}")
