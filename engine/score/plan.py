"""Score rollout segments: at least one score segment for each.

A score unit is one rollout segment under one teacher and one request. A teacher with the student's
tokenizer reads ids as sampled, and its log-probs are read by id. One with another tokenizer reads
the same bytes in its own ids, and its log-probs are of spans, see score/spans.py.

A segment that the teacher scored with a smaller request is scored again, and the new entries extend
the stored ones. A segment that it scored with the same or a larger request is skipped.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from logitcask.engine.events import peak_memory
from logitcask.engine.score.planner import plan_scores
from logitcask.engine.score.unit import ScoreRequest, run_score_unit
from logitcask.engine.types import NO_DETAIL, Detail, Progress, no_progress, unit_report


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreReport:
    units_total: int
    units_done_before: int
    units_new: int
    positions: int
    """Rows of the new units; the seconds count new units too."""
    seconds: float
    positions_per_second: float
    """Of the whole command, loading of the teacher excluded."""
    peak_memory_bytes: Mapping[str, int]
    """As of `events.peak_memory`."""
    notes: tuple[str, ...]
    """Warnings for the user."""


def score(request: ScoreRequest, *, progress: Progress = no_progress) -> ScoreReport:
    """Score every rollout segment of the name that has no scores for this request yet.

    Raises IdentityError for a teacher with another tokenizer without an alignment, vocabulary or
    stop ids, UnitError for a response that such a teacher cannot read,
    IncompleteError where there are no rollouts, no draws or no scores of the model in `extra_ids`,
    and PromptError for a context that lacks a prompt.
    """
    start_s = time.monotonic()
    planned = plan_scores(request, request.store.head())
    done_before = planned.total - len(planned.missing)
    positions = 0
    for done, (key, unit) in enumerate(planned.missing.items(), done_before):
        report = unit_report(progress, "score", done, planned.total, positions)
        report(NO_DETAIL)
        positions += run_score_unit(request, key, unit, planned.provenance, report)
    progress("score", planned.total, planned.total, Detail(positions))
    took_s = time.monotonic() - start_s
    return ScoreReport(
        units_total=planned.total,
        units_done_before=done_before,
        units_new=len(planned.missing),
        positions=positions,
        seconds=took_s,
        positions_per_second=positions / took_s,
        peak_memory_bytes=peak_memory(),
        notes=planned.notes,
    )
