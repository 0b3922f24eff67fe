"""Some sequences of a teacher's rollouts as rollouts of a student, under a name of their own.

Nothing that is stored changes: the chosen sequences become new segments, with their ids as they
were sampled, and the others stay where they are, in no training on the new name. With them go the
scores that the teacher gave its own rollouts, so that no second pass of the teacher is needed:
every objective on its top-k serves, and cross-entropy. The student scores the sequences once, as
for `import`, because rollouts of a store have the top-k of their student.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from logitcask.engine.backends.base import Scorer
from logitcask.engine.exchange.adopt import committed_units, import_provenance, with_student
from logitcask.engine.exchange.adopt_recorded import rows_of
from logitcask.engine.models.identity import digest
from logitcask.engine.rollout.unit import LOGPROB
from logitcask.engine.score.sequences import cut
from logitcask.engine.store import Segment, Store
from logitcask.engine.store.format.provenance import SAMPLER
from logitcask.engine.types import (
    Array,
    Detail,
    ModelRef,
    Progress,
    Rollouts,
    ScoreParams,
    no_progress,
    unit_report,
)

FORMAT = "recipe"
"""Format of such rollouts in their provenance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """Sequences of a rollout segment, one at least."""

    segment: Segment
    sequences: tuple[int, ...]
    """Their places in the segment, ascending."""
    prompts: int
    """Number of their prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptReport:
    sequences: int
    positions: int
    """Response tokens."""
    units_new: int


def keep(
    store: Store,
    chosen: Sequence[Chosen],
    scorer: Scorer,
    model: ModelRef,
    *,
    name: str,
    teacher: str,
    student_k: int,
    rule: Mapping[str, Any],
    profile: str,
    extra: Mapping[str, Any],
    progress: Progress = no_progress,
) -> KeptReport:
    """Commit chosen sequences as the rollouts `name` of a student, and their scores as `teacher`.

    scorer, model: of the student. rule: how they were chosen, recorded. extra: more provenance, as
    of Rendering.record. What the store holds already is not scored again. Raises IdentityError
    where a name holds others.
    """
    of = chosen[0].segment.provenance
    sources = [[each.segment.key_id, list(each.sequences)] for each in chosen]
    provenance = import_provenance(
        scorer,
        model,
        student_k,
        set_digest=digest({"kept": sources, "student_topk": student_k}),
        prompts=sum(each.prompts for each in chosen),
        units=len(chosen),
        longest=int(of["set"]["max_new_tokens"]),
        imported={
            "format": FORMAT,
            "file": chosen[0].segment.name,
            "text": False,
            "behavior": True,
            SAMPLER: dict(of["student"]),
            **rule,
        },
        extra=extra,
    )
    # Stop ids of the teacher that the student's folder does not name.
    provenance["set"]["stop_token_ids"] = list(model.stop_ids)
    scored = _score_provenance(of, name)
    store.check_name("rollout", name, provenance, drawn=False)
    store.check_name("score", teacher, scored, drawn=False)
    keys = [
        digest({"kept": source, "student": model.digest, "student_topk": student_k})
        for source in sources
    ]
    committed = committed_units(store, keys, name)
    first = sequences = positions = new = 0
    for number, (key, each) in enumerate(zip(keys, chosen, strict=True)):
        whole = store.read_rollouts(each.segment)
        assert whole.student is not None, "a committed rollout unit holds these"
        rollouts, marks = _of_teacher(whole, each.sequences)
        base = committed.get(key)
        if base is None:
            new += 1
            base = store.commit_rollouts(
                with_student(
                    rollouts, scorer, student_k, unit_report(progress, "keep", number, len(keys))
                ),
                name=name,
                unit_key=key,
                unit={"version": model.version, "first": first, "count": each.prompts},
                provenance=provenance,
                profile=profile,
            )
        if not store.log.score_segments(teacher, base.seg_id):
            store.commit_scores(
                rows_of(whole.student, marks),
                base=base,
                name=teacher,
                unit_key=digest({"kept": key, "teacher": teacher}),
                unit=dict(base.unit),
                provenance=scored,
                profile=profile,
            )
        first, sequences = first + each.prompts, sequences + len(each.sequences)
        positions += rollouts.positions
    progress("keep", len(keys), len(keys), Detail(positions))
    return KeptReport(sequences=sequences, positions=positions, units_new=new)


def _score_provenance(of: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the provenance of scores that a teacher gave its own rollouts, of provenance `of`."""
    k = int(of["set"]["student_topk"])
    request = ScoreParams(entry_kind="topk", top_p=1.0, k_min=k, k_max=k, at_student=False)
    return {
        "teacher": dict(of["student"]),
        "teacher_kind": "teacher",
        "context": "",
        "request": request.record(),
        "rollouts": name,
        "backend": dict(of["scorer"]),
        "logprob": LOGPROB,
        "at": "",
    }


def _of_teacher(rollouts: Rollouts, sequences: Sequence[int]) -> tuple[Rollouts, Array]:
    """Return some sequences, and the marks [P] bool of their rows: no student has sampled them."""
    part, marks = cut(rollouts, sequences)
    none = np.zeros(len(sequences), np.int64)
    return replace(part, version_start=none, version_end=none), marks
