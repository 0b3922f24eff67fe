"""Adopt what a tap recorded: a student scores the sequences, and the teacher's scores go with them.

Every recorded segment becomes one rollout segment of the student, with the scores of each teacher
that it has; the teacher itself is not needed.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from logitcask.engine.backends.base import Scorer
from logitcask.engine.exchange.adopt import (
    ImportReport,
    committed_units,
    import_provenance,
    with_student,
)
from logitcask.engine.exchange.recorded import TAP, Recorded, RecordedUnit, cut
from logitcask.engine.models.identity import digest
from logitcask.engine.store import Segment, Store
from logitcask.engine.types import (
    Array,
    CachedScores,
    Detail,
    ModelRef,
    Progress,
    Scores,
    no_progress,
    unit_report,
)


def rows_of(scores: Scores | CachedScores, marks: Array) -> Scores:
    """Return the scores of the rows in `marks` [P] bool, without those at chosen ids."""
    entries = np.repeat(marks, scores.cnt)
    return Scores(
        lp=scores.lp[marks],
        entropy=scores.entropy[marks],
        entropy_hi=None if scores.entropy_hi is None else scores.entropy_hi[marks],
        log_tail=scores.log_tail[marks],
        cnt=scores.cnt[marks],
        ids=scores.ids[entries],
        entry_lp=scores.entry_lp[entries],
    )


def adopt_recorded(
    source: Store,
    recorded: Recorded,
    store: Store,
    scorer: Scorer,
    model: ModelRef,
    *,
    name: str,
    student_k: int,
    profile: str,
    extra: Mapping[str, Any],
    progress: Progress = no_progress,
) -> ImportReport:
    """Score the sequences with the student, and commit what the store does not hold yet.

    source, recorded: the tap's store, and its `survey_recorded`; extra: more provenance. The scores
    keep the profile of the source. Raises IdentityError where a name holds others.
    """
    begun_s = time.monotonic()
    units = recorded.units
    # Equal sequences of two teachers are one unit of the rollouts.
    distinct = {each.digest: len(each.sequences) for each in units}
    origin = {"tap": source.uuid, "rollouts": recorded.name, "after": list(recorded.after)}

    def provenance(unit: RecordedUnit) -> dict[str, Any]:
        imported = {"format": TAP, "file": recorded.name, "text": False, "behavior": False}
        return import_provenance(
            scorer,
            model,
            student_k,
            set_digest=digest({"imported": origin, "student_topk": student_k}),
            prompts=sum(distinct.values()),
            units=len(distinct),
            longest=max(each.longest for each in units),
            imported={
                **imported,
                "boundaries": "recorded" if unit.all_recorded else "after",
                "after": list(recorded.after),
            },
            extra=extra,
        )

    store.check_name("rollout", name, provenance(units[0]), drawn=False)
    for teacher, each in {n: s for unit in units for n, s in unit.scores.items()}.items():
        store.check_name("score", teacher, each.provenance, drawn=False)
    keys = [
        digest({"imported": each.digest, "student": model.digest, "student_topk": student_k})
        for each in units
    ]
    committed = committed_units(store, keys, name)
    done_before = done = sum(
        key in committed and all(_has(store, committed[key], each) for each in unit.scores.values())
        for key, unit in zip(keys, units, strict=True)
    )
    first = new_positions = 0
    for key, unit in zip(keys, units, strict=True):
        base, before = committed.get(key), first
        first += len(unit.sequences)
        if base is not None and all(_has(store, base, each) for each in unit.scores.values()):
            continue
        whole = source.read_rollouts(unit.segment)
        rollouts, marks = cut(whole, unit, model)
        if base is None:
            report = unit_report(progress, "import", done, len(units), new_positions)
            base = store.commit_rollouts(
                with_student(rollouts, scorer, student_k, report),
                name=name,
                unit_key=key,
                unit={"version": model.version, "first": before, "count": len(unit.sequences)},
                provenance=provenance(unit),
                profile=profile,
            )
            committed[key], new_positions = base, new_positions + unit.positions
        for each in unit.scores.values():
            if not _has(store, base, each):
                store.commit_scores(
                    rows_of(source.read_scores((each,), base=whole), marks),
                    base=base,
                    name=each.name,
                    unit_key=_score_key(base, each),
                    unit=dict(base.unit),
                    provenance={**each.provenance, "rollouts": name},
                    profile=each.profile,
                )
        done += 1
    progress("import", len(units), len(units), Detail(new_positions))
    took_s = time.monotonic() - begun_s
    positions = sum(unit.positions for unit in units)
    return ImportReport(
        units_total=len(units),
        units_done_before=done_before,
        units_new=len(units) - done_before,
        sequences=recorded.sequences,
        positions=positions,
        counted=positions,
        left_out=recorded.unknown + recorded.repeated,
        seconds=took_s,
        positions_per_second=new_positions / max(took_s, 1e-9),
    )


def _score_key(base: Segment, scores: Segment) -> str:
    return digest({"adopted": scores.key_id, "teacher": scores.name, "rollouts": base.key_id})


def _has(store: Store, base: Segment, scores: Segment) -> bool:
    """Return whether a store holds the scores of adopted rollouts; another scoring counts too."""
    return bool(store.log.score_segments(scores.name, base.seg_id))
