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
    """True where the run, or the store of no run, has other such pairs."""
    segments: int
    segments_scored: int
    """Those that were chosen, and those to choose from."""

    @property
    def note(self) -> str:
        """Return sentences on the rows that were chosen, after a space; '' for none."""
        found = ""
        if self.several:
            found = f" Rollouts {self.rollouts!r} with scores of {self.teacher!r}, of several."
        if self.segments < self.segments_scored:
            found += (
                f" Measured on {self.segments} of {self.segments_scored} scored segments, evenly "
                "chosen."
            )
        return found


def stored_rows(facts: RunFacts, *, most: int = MOST_ROWS) -> StoredRows:
    """Choose evenly, by student version, as many scored segments as have about `most` positions.

    Raises as `stored_names`.
    """
    pairs = _pairs(facts)
    name, teacher = pairs[0]
    store, snapshot = facts.store, facts.snapshot
    assert store is not None, "a store with scores"
    assert snapshot is not None, "of that store"
    scores: dict[str, list[Segment]] = {}
    for each in snapshot.segments:
        if same_teacher(each, teacher):
            scores.setdefault(each.base, []).append(each)
    scored = [each for each in snapshot.rollouts(name) if each.seg_id in scores]
    total = sum(each.counts["P"] for each in scored)
    count = max(1, min(len(scored), round(len(scored) * most / max(1, total))))
    places = np.linspace(0, len(scored) - 1, count).round().astype(int)
    chosen = [scored[place] for place in places]
    kept = tuple(
        segment for base in chosen for segment in (base, *_newest(scores[base.seg_id], teacher))
    )
    return StoredRows(
        store=store,
        snapshot=Snapshot(number=snapshot.number, sha256=snapshot.sha256, state=Listed(kept)),
        rollouts=name,
        teacher=teacher,
        several=len(pairs) > 1,
        segments=len(chosen),
        segments_scored=len(scored),
    )


def stored_names(facts: RunFacts) -> tuple[str, str]:
    """Return the names of the rollouts and of the teacher that a report measures.

    They are those of the run; of a store alone the rollouts and the teacher with the most scores.
    Raises IncompleteError without a store or without scores of these names.
    """
    return _pairs(facts)[0]


def _pairs(facts: RunFacts) -> list[tuple[str, str]]:
    """Return (rollouts, teacher) that fit the run, those with the most scores first."""
    store, snapshot = facts.store, facts.snapshot
    if store is None or snapshot is None:
        raise IncompleteError(
            facts.store_missing or "there is no store", hint="make the report where the store is"
        )
    rollouts, teachers = names_of(facts.record)
    sizes, roles = Counter[tuple[str, str]](), dict[str, object]()
    for each in snapshot.segments:
        of = store.log.base(each.base) if each.kind == "score" else None
        if of is None:
            continue
        if each.name not in roles:
            roles[each.name] = each.provenance.get("teacher_kind")
        if roles[each.name] != "base":
            sizes[of.name, _REFRESH.sub("", each.name)] += each.rows
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
    return fitting


def same_teacher(segment: Segment, teacher: str) -> bool:
    """Return whether a segment has scores of a teacher, or of one of its refreshes."""
    return segment.kind == "score" and _REFRESH.sub("", segment.name) == teacher


def names_of(record: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return the name of the rollouts and those of the teachers in run.json; '' and () without."""
    # A loop has the digest of its teacher under `teacher`.
    teacher = record.get("teacher_name") or record.get("teacher")
    names = Teachers.parse(teacher, record.get("teacher_field")).names if teacher else ()
    return str(record.get("rollouts") or ""), names


def _newest(scores: list[Segment], teacher: str) -> list[Segment]:
    """Return the scores of the newest refresh of a teacher, under its own name."""
    return [replace(each, name=teacher) for each in scores if each.name == scores[-1].name]
