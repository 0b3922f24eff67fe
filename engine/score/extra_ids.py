"""Split one scoring pass, at the student's ids and at extra ids, into two segments.

The teacher's own top-k and the student's ids make the first segment, as if scored without extra
ids; the extra ids extend it. So one pass of the teacher gives the data of two, and a reader of the
first segment alone finds the usual data.
"""

from dataclasses import replace

import numpy as np

from logitcask.engine.store.extend import request_ids
from logitcask.engine.store.format import ragged
from logitcask.engine.types import CachedScores, IdLists, Scores


def without_extra(scores: Scores, ids: IdLists, student: IdLists | None) -> Scores:
    """Return the scores as if scored at `student` alone, whose ids begin every row of `ids`.

    The tail takes the ids left out: tail = logaddexp(tail, log-probs of those ids).
    """
    assert scores.at_lp is not None, "scored at chosen ids"
    count = np.zeros(len(ids.cnt), np.uint16) if student is None else student.cnt
    stays = ragged.index_in_row(ids.cnt) < np.repeat(count, ids.cnt)
    kept = ragged.find(scores.ids.astype(np.uint32), scores.cnt, ids.ids, ids.cnt) >= 0
    dropped = ~stays & ~kept
    tail = scores.log_tail.astype(np.float64)
    np.logaddexp.at(tail, ragged.row_of_entry(ids.cnt)[dropped], scores.at_lp[dropped])
    return replace(
        scores,
        log_tail=tail.astype(np.float32),
        at_lp=None if student is None else scores.at_lp[stays],
    )


def with_known(scores: Scores, ids: IdLists, known: CachedScores) -> tuple[Scores, IdLists]:
    """Return the scores at all ids of `known`, then at the rest of `ids`, and these ids.

    `known`: the scores that `without_extra` returned, as read. The result extends their segment.
    """
    assert scores.at_lp is not None, "scored at chosen ids"
    at = request_ids(known, ids)
    in_ids = ragged.find(ids.ids, ids.cnt, at.ids, at.cnt)
    own = in_ids < 0
    in_kept = ragged.find(scores.ids.astype(np.uint32), scores.cnt, at.ids, at.cnt)
    lp = np.empty(len(at.ids), np.float32)
    first_in_ids = np.repeat(ragged.starts(ids.cnt)[:-1], at.cnt)
    first_kept = np.repeat(ragged.starts(scores.cnt)[:-1], at.cnt)
    lp[~own] = scores.at_lp[(first_in_ids + in_ids)[~own]]
    lp[own] = scores.entry_lp[(first_kept + in_kept)[own]]
    return replace(scores, at_lp=lp), at
