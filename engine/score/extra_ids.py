"""One scoring, two segments: a teacher that is asked at the student's list and at more ids at once.

What is asked for every teacher, its own best ids and those of the student's list, makes the first
segment, as if nothing else had been asked; the other ids widen it. So one pass of the teacher gives
what two would, and whoever reads the first segment alone finds what it always held.
"""

from dataclasses import replace

import numpy as np

from logitcask.engine.store.extend import request_ids
from logitcask.engine.store.format import ragged
from logitcask.engine.types import CachedScores, IdLists, Scores


def without_more(scores: Scores, asked: IdLists, student: IdLists | None) -> Scores:
    """The scores as if they had been asked at `student` alone, which begins every row of `asked`.

    The tail takes what is left out: tail = logaddexp(tail, log-probs of those ids).
    """
    assert scores.at_lp is not None, "it was asked at some ids"
    count = np.zeros(len(asked.cnt), np.uint16) if student is None else student.cnt
    stays = ragged.within(asked.cnt) < np.repeat(count, asked.cnt)
    kept = ragged.find(scores.ids.astype(np.uint32), scores.cnt, asked.ids, asked.cnt) >= 0
    dropped = ~stays & ~kept
    tail = scores.log_tail.astype(np.float64)
    np.logaddexp.at(tail, ragged.rows(asked.cnt)[dropped], scores.at_lp[dropped])
    return replace(
        scores,
        log_tail=tail.astype(np.float32),
        at_lp=None if student is None else scores.at_lp[stays],
    )


def at_all_known(scores: Scores, asked: IdLists, known: CachedScores) -> tuple[Scores, IdLists]:
    """The same scores as asked at everything that is known, `known` being what `without_more` left,
    and then at the rest of `asked`: what a widening wants.
    """
    assert scores.at_lp is not None, "it was asked at some ids"
    at = request_ids(known, asked)
    in_asked = ragged.find(asked.ids, asked.cnt, at.ids, at.cnt)
    own = in_asked < 0
    in_kept = ragged.find(scores.ids.astype(np.uint32), scores.cnt, at.ids, at.cnt)
    lp = np.empty(len(at.ids), np.float32)
    first_asked = np.repeat(ragged.starts(asked.cnt)[:-1], at.cnt)
    first_kept = np.repeat(ragged.starts(scores.cnt)[:-1], at.cnt)
    lp[~own] = scores.at_lp[(first_asked + in_asked)[~own]]
    lp[own] = scores.entry_lp[(first_kept + in_kept)[own]]
    return replace(scores, at_lp=lp), at
