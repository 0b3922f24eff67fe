"""Positions of a scoring: all, first:N, every:N, entropy-top:SHARE, or those of a file.

A score of a position costs a product with the head, and bytes. The forward pass covers the prompt
and the response up to the last position that is scored, so that first:N shortens it too.
"""

from dataclasses import replace
from typing import cast

import numpy as np

from logitcask.engine.backends.base import RowScorer, Scorer
from logitcask.engine.errors import IncompleteError
from logitcask.engine.store.format import ragged
from logitcask.engine.store.format.rows import last_marked, lists_at, scores_at
from logitcask.engine.types import (
    ALL_POSITIONS,
    Array,
    IdLists,
    Progress,
    Rollouts,
    ScoreParams,
    Scores,
)


def chosen_rows(rollouts: Rollouts, positions: str) -> Array:
    """Return [P] bool, the rows of a request such as first:30.

    entropy-top takes the rows with the largest entropy of the student, of all rows of the unit that
    count in a loss; the earlier one among equals. Raises IncompleteError without these entropies.
    """
    rows = np.ones(rollouts.positions, bool)
    if positions == ALL_POSITIONS:
        return rows
    kind, _, value = positions.partition(":")
    index = ragged.index_in_row(rollouts.lengths())
    if kind in ("first", "every"):
        rows[:] = index < int(value) if kind == "first" else index % int(value) == 0
        return rows
    if rollouts.student is None:
        raise IncompleteError(
            f"positions = {positions}: rollout segment {rollouts.segment} has no entropies of the "
            "student",
            hint="sample again with `logitcask rollout`, which always stores them",
        )
    counted = np.flatnonzero(rollouts.loss_mask)
    best = np.argsort(-rollouts.student.entropy[counted], kind="stable")
    rows[:] = False
    rows[counted[best[: int(np.ceil(float(value) * len(counted)))]]] = True
    return rows


def score_positions(
    scorer: Scorer, rollouts: Rollouts, params: ScoreParams, rows: Array, progress: Progress
) -> Scores:
    """Return the scores of the rows [P] bool alone.

    A scorer without the capability "rows" scores all positions up to the last of these in each
    response.
    """
    reach = last_marked(rows, rollouts.lengths())
    cut, kept = shortened(rollouts, reach)
    marks, own = rows[kept], cut.student
    at = IdLists(cnt=own.cnt, ids=own.ids) if params.at_student and own is not None else None
    if "rows" in scorer.capabilities:
        found = cast(RowScorer, scorer).score(cut, params, at, rows=marks, progress=progress)
    else:
        found = scorer.score(cut, params, at, progress=progress)
    return scores_at(found, marks, at)


def shortened(rollouts: Rollouts, lengths: Array) -> tuple[Rollouts, Array]:
    """Return the first `lengths` [N] tokens of each response, and the marks [P] bool of their rows.

    The student's lists are those of these rows; its other scores, and draws, are left out.
    """
    kept = ragged.index_in_row(rollouts.lengths()) < np.repeat(lengths, rollouts.lengths())
    student = rollouts.student
    if student is not None:
        lists = lists_at(IdLists(cnt=student.cnt, ids=student.ids), kept)
        student = replace(student, cnt=lists.cnt, ids=lists.ids)
    return (
        replace(
            rollouts,
            seq_off=ragged.starts(lengths),
            tokens=rollouts.tokens[kept],
            loss_mask=rollouts.loss_mask[kept],
            b_lp=rollouts.b_lp[kept],
            student=student,
            draws=None,
        ),
        kept,
    )
