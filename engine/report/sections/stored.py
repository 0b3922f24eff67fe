"""The stored rows that a report measures: some evenly chosen segments with scores.

A report is made whenever someone looks, so it reads as many rows as take about a second.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from logitcask.engine.errors import IncompleteError
from logitcask.engine.packing.teachers import Teachers
from logitcask.engine.report.runs import RunFacts
from logitcask.engine.store import Segment, Snapshot, Store
from logitcask.engine.store.log.snapshot import Listed

MOST_ROWS = 60_000
"""Positions that are read for a report of one run, unless one segment has more."""
_REFRESH = re.compile(r"\.v[0-9]+-[0-9a-f]{8}$")
"""End of the name of the scores of a teacher that follows the student."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRows:
    """Rollouts of one name with the scores of one teacher."""

    store: Store
    snapshot: Snapshot
    """It has the chosen segments alone, and `teacher` names all refreshes of a teacher."""
    rollouts: str
    teacher: str
    several: bool
    """True where other teachers scored these rollouts too."""
    segments: int
    segments_scored: int
    """Those that were chosen, and those to choose from."""

    @property
    def note(self) -> str:
        """Return a sentence on the rows that were left out, after a space; '' for none."""
        found = f" These are scores of {self.teacher!r}, one of several." if self.several else ""
        if self.segments < self.segments_scored:
            found += (
                f" Measured on {self.segments} of {self.segments_scored} scored segments, evenly "
                "chosen."
            )
        return found


def stored_rows(facts: RunFacts, *, most: int = MOST_ROWS) -> StoredRows:
    """Choose evenly, by student version, as many scored segments as have about `most` positions.

    The names are those of the run; of a store alone the rollouts and the teacher with the most
    scores. Raises IncompleteError without a store or without scores of these names.
    """
    store, snapshot = facts.store, facts.snapshot
    if store is None or snapshot is None:
        raise IncompleteError(
            facts.store_missing or "there is no store", hint="make the report where the store is"
        )
    rollouts, teachers = names_of(facts.record)
    scores: dict[tuple[str, str], list[Segment]] = {}
    for each in snapshot.segments:
        if each.kind == "score":
            scores.setdefault((_REFRESH.sub("", each.name), each.base), []).append(each)
    sizes = Counter[tuple[str, str]]()
    for (name, base), found in scores.items():
        of = store.log.base(base)
        if of is not None and snapshot.role(found[0].name) != "base":
            sizes[of.name, name] += sum(each.rows for each in found)
    fitting = [
        (name, teacher)
        for (name, teacher), _ in sizes.most_common()
        if rollouts in ("", name) and (teacher in teachers or not teachers)
    ]
    if not fitting:
        what = f" of rollouts {rollouts!r}" if rollouts else ""
        by = f" by {' or '.join(teachers)}" if teachers else ""
        raise IncompleteError(
            f"the store has no scores{what}{by}", hint="run `logitcask score` first"
        )
    name, teacher = fitting[0]
    scored = [s for s in snapshot.rollouts(name) if (teacher, s.seg_id) in scores]
    total = sum(each.counts["P"] for each in scored)
    count = max(1, min(len(scored), round(len(scored) * most / max(1, total))))
    places = np.linspace(0, len(scored) - 1, count).round().astype(int)
    chosen = [scored[place] for place in places]
    kept = tuple(
        segment
        for base in chosen
        for segment in (base, *_newest(scores[teacher, base.seg_id], teacher))
    )
    return StoredRows(
        store=store,
        snapshot=Snapshot(number=snapshot.number, sha256=snapshot.sha256, state=Listed(kept)),
        rollouts=name,
        teacher=teacher,
        several=sum(rolled == name for rolled, _ in fitting) > 1,
        segments=len(chosen),
        segments_scored=len(scored),
    )


def names_of(record: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return the name of the rollouts and those of the teachers in run.json; '' and () without."""
    # A loop has the digest of its teacher under `teacher`.
    teacher = record.get("teacher_name") or record.get("teacher")
    names = Teachers.parse(teacher, record.get("teacher_field")).names if teacher else ()
    return str(record.get("rollouts") or ""), names


def _newest(scores: list[Segment], teacher: str) -> list[Segment]:
    """Return the scores of the newest refresh of a teacher, under its own name."""
    return [replace(each, name=teacher) for each in scores if each.name == scores[-1].name]
