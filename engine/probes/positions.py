"""Teacher and sampling student by position in the response, from stored scores alone.

In the paper (Sec. 6.1, Fig. 12 and 13) long responses fail from their end: teacher and student part
there first, and over the updates the border moves towards the beginning. Each value is a mean over
the rows of a range of positions that count in a loss; p is the student that sampled, as stored.

    entropy/teacher, entropy/student   nats, over the vocabulary
    entropy/gap                        |H(q) - H(p)|, nats (Eq. 8)
    kl/reverse_bound, _forward_bound   nats, see engine/exchange/README.md
    overlap/ratio                      |TopK(p) and TopK(q)| / k (Eq. 6)
    overlap/mass_student, _teacher     mass of the common ids under p and under q (Eq. 9 and 10)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from logitcask.engine.errors import IncompleteError
from logitcask.engine.events import counted
from logitcask.engine.exchange.positions import Block, Selection, blocks, select
from logitcask.engine.probes.columns import (
    column_of,
    counted_rows,
    lists_of,
    numbers_of,
    teacher_entropy,
)
from logitcask.engine.store import Snapshot, Store
from logitcask.engine.types import Array

MOST_K = 16
"""k of the paper; less where a store has fewer ids."""
MEASURES = (
    *("entropy/teacher", "entropy/student", "entropy/gap", "kl/reverse_bound", "kl/forward_bound"),
    *("overlap/ratio", "overlap/mass_student", "overlap/mass_teacher"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Rows at positions [start, end) of their responses."""

    start: int
    end: int
    rows: int
    means: Mapping[str, float | None]
    """Name of MEASURES -> mean; None where no row has the value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionReport:
    """Means by position, of all versions of the student together and of each."""

    k: int
    ranges: tuple[Range, ...]
    versions: Mapping[int, tuple[Range, ...]]
    """Version that began the response -> its ranges, the same positions."""
    reading: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionRows:
    """The P rows that are scored and count in a loss."""

    k: int
    position: Array
    """[P] int64, in their responses, from 0."""
    version: Array
    """[P] int64, of the student that began the response."""
    values: Array
    """[P, M] float64, MEASURES; NaN = none."""


def position_report(
    store: Store,
    snapshot: Snapshot,
    *,
    rollouts: str | None = None,
    teacher: str | None = None,
    bins: int,
) -> PositionReport:
    """Measure each of `bins` equally wide ranges of positions; raises as `position_rows`."""
    rows = position_rows(store, snapshot, rollouts=rollouts, teacher=teacher)
    whole = ranges(rows, bins)
    return PositionReport(
        k=rows.k,
        ranges=whole,
        versions=ranges_of_versions(rows, bins),
        reading=reading(whole),
    )


def position_rows(
    store: Store,
    snapshot: Snapshot,
    *,
    rollouts: str | None = None,
    teacher: str | None = None,
    most: int | None = None,
) -> PositionRows:
    """Read the rows of the probe.

    most: rows after which no further block of a segment is read. Raises as `select`, and
    IncompleteError without scores, the student's lists or a row that counts.
    """
    selection = select(snapshot, rollouts=rollouts, teacher=teacher)
    k = common_k(selection)
    found: list[tuple[Array, Array, Array]] = []
    count = len(selection.segments)
    for index in counted("read segments", range(count), count, "segments"):
        read = 0
        for block in blocks(store, selection, index):
            counts, values = row_values(block, k)
            position, version = (
                column_of(block, name)[counts] for name in ("position", "policy_version_start")
            )
            found.append((position, version, values[counts]))
            read += len(counts)
            if most is not None and read >= most:
                break
    position, version, values = (np.concatenate(each) for each in zip(*found, strict=True))
    if not len(position):
        raise IncompleteError(
            "no row of these rollouts is scored and counts in a loss",
            hint="probe rollouts that hold sampled tokens, with scores",
        )
    return PositionRows(k=k, position=position, version=version, values=values)


def ranges(rows: PositionRows, bins: int) -> tuple[Range, ...]:
    """Return the means of `bins` equally wide ranges of positions."""
    return _ranges(_cuts(rows, bins), rows.position, rows.values)


def ranges_of_versions(rows: PositionRows, bins: int) -> dict[int, tuple[Range, ...]]:
    """Return version -> its means in the ranges of `ranges`."""
    cuts, found = _cuts(rows, bins), dict[int, tuple[Range, ...]]()
    for each in np.unique(rows.version):
        of = rows.version == each
        found[int(each)] = _ranges(cuts, rows.position[of], rows.values[of])
    return found


def _cuts(rows: PositionRows, bins: int) -> Array:
    end = int(rows.position.max()) + 1
    return np.linspace(0, end, min(bins, end) + 1).round().astype(np.int64)


def common_k(selection: Selection) -> int:
    """Return the k at which the top-k of both models is stored for every row.

    Raises IncompleteError without scores, without the student's lists, and for a teacher's draws.
    """
    known = [MOST_K]
    for segment, scores in selection.segments:
        sampled = segment.provenance.get("set", {}).get("student_topk", 0)
        if not scores or not sampled:
            what = "the student's top-k" if scores else f"scores of {selection.teacher!r}"
            raise IncompleteError(
                f"rollouts {segment.seg_id} have no {what}",
                hint="run `logitcask score` first"
                if not scores
                else "sample with --student-topk 16",
            )
        request = scores[0].provenance["request"]
        if request.get("selection") == "sampled":
            raise IncompleteError(
                f"the scores of {selection.teacher!r} are the teacher's draws, not its top-k",
                hint="probe scores that were made without --draws",
            )
        known += [int(sampled), int(request["teacher_topk_min"])]
    return min(known)


def row_values(block: Block, k: int) -> tuple[Array, Array]:
    """Return [P] bool, the scored rows that count in a loss, and [P, M] MEASURES; NaN = none."""
    q, p = teacher_entropy(block), numbers_of(block, "student_entropy")
    (student, student_lp), (teacher, teacher_lp) = (
        [each[:, :k] for each in lists_of(block, f"{of}_ids", f"{of}_logprobs")]
        for of in ("student_topk", "teacher")
    )
    common = student[:, :, None] == teacher[:, None, :]  # [P, k, k]
    values = np.stack(
        [
            *(q, p, np.abs(q - p)),
            *(numbers_of(block, "reverse_kl"), numbers_of(block, "forward_kl")),
            common.any(2).sum(1) / k,
            (np.exp(student_lp) * common.any(2)).sum(1),
            (np.exp(teacher_lp) * common.any(1)).sum(1),
        ],
        axis=1,
    )
    return counted_rows(block), values


def _ranges(cuts: Array, position: Array, values: Array) -> tuple[Range, ...]:
    found = []
    for start, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        rows = values[(start <= position) & (position < end)]
        known = ~np.isnan(rows)
        sums, counts = np.where(known, rows, 0.0).sum(0), known.sum(0)
        means = {
            name: float(total / count) if count else None
            for name, total, count in zip(MEASURES, sums, counts, strict=True)
        }
        found.append(Range(start=start, end=end, rows=len(rows), means=means))
    return tuple(found)


def reading(ranges: tuple[Range, ...]) -> str:
    """Say where the models part, by the first and the last range."""
    known = [each.means["kl/reverse_bound"] for each in ranges]
    first, last = (known[0], known[-1]) if len(known) > 1 else (None, None)
    if first is None or last is None:
        return "too few positions to compare the beginning with the end"
    where = f"{first:.3g} nats at the beginning, {last:.3g} at the end"
    if last > 1.5 * first:
        return (
            f"the models part towards the end ({where}): in the paper long responses fail from "
            "their end, and shorter ones train better"
        )
    if first > 1.5 * last:
        return f"the models part at the beginning ({where}) and agree later"
    return f"the models differ about as much at each position ({where})"
