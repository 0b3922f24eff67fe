"""Scores of some positions: layouts with the suffix +rows.

Such a segment has one mark for each of the P positions of its base, and scores of the R marked ones
alone. Later segments of the same teacher on the same rollouts add other positions; none is scored
twice. In memory the scores have P rows, of which those without a mark are empty.
"""

from dataclasses import fields, replace
from typing import Any

import numpy as np

import logitcask.engine.store.format.ragged as ragged
from logitcask.engine.types import Array, CachedScores, IdLists, Scores

_ROWS = ("lp", "entropy", "entropy_hi", "log_tail", "kept", "s_cnt", "cnt")
_LISTS = {"s_cnt": ("s_ids", "s_lp", "s_rank"), "cnt": ("ids", "entry_lp", "rank", "mult")}
"""Counts of CachedScores -> the ragged arrays that they divide into rows."""


def lists_at(lists: IdLists, rows: Array) -> IdLists:
    """Return the lists at the marked rows [P] bool."""
    return IdLists(cnt=lists.cnt[rows], ids=lists.ids[np.repeat(rows, lists.cnt)])


def scores_at(scores: Scores, rows: Array, at: IdLists | None) -> Scores:
    """Return the scores at the marked rows [P] bool; at: the requested ids of all rows."""
    of_entry = np.repeat(rows, scores.cnt)
    cut = {name: getattr(scores, name)[rows] for name in ("lp", "entropy", "log_tail", "cnt")} | {
        name: getattr(scores, name)[of_entry] for name in ("ids", "entry_lp")
    }
    at_lp = scores.at_lp
    if at_lp is not None:
        assert at is not None, "scores at requested ids"
        at_lp = at_lp[np.repeat(rows, at.cnt)]
    return Scores(
        **cut,
        at_lp=at_lp,
        mult=None if scores.mult is None else scores.mult[of_entry],
        entropy_hi=None if scores.entropy_hi is None else scores.entropy_hi[rows],
    )


def marks_of(scored: Array, count: int) -> Array:
    """Return the marks [P] bool of an array `scored`; raises ValueError unless `count` are 1."""
    if int(scored.max(initial=0)) > 1 or int(scored.sum(dtype=np.int64)) != count:
        raise ValueError(f"marks other than 0 and 1, or not {count} of them")
    marks: Array = scored == 1
    return marks


def last_marked(marks: Array, lengths: Array) -> Array:
    """Return [N] the positions of each sequence up to its last marked one; lengths: [N]."""
    off = ragged.starts(lengths)
    at = np.concatenate([np.zeros(1, np.int64), np.where(marks, np.arange(1, len(marks) + 1), 0)])
    latest = np.maximum.accumulate(at)[off[1:]]
    last: Array = np.maximum(latest - off[:-1], 0)
    return last


def expanded(cached: CachedScores, rows: Array) -> CachedScores:
    """Return scores of R rows as those of P rows, empty where there is no mark [P] bool."""
    found: dict[str, Any] = {}
    for name in _ROWS:
        if (value := getattr(cached, name)) is not None:
            found[name] = np.zeros(len(rows), value.dtype)
            found[name][rows] = value
    return replace(cached, **found, scored=rows)


def merged(first: CachedScores, more: CachedScores) -> CachedScores:
    """Return the scores of the marked rows of both; raises ValueError where one row is in both."""
    a, b = first.scored, more.scored
    if a is None or b is None or (a & b).any():
        raise ValueError("a position is scored twice")
    absent = [{f.name for f in fields(s) if getattr(s, f.name) is None} for s in (first, more)]
    if absent[0] != absent[1]:
        raise ValueError("scores of two kinds")
    found: dict[str, Any] = {}
    for name in _ROWS:
        if (ours := getattr(first, name)) is not None:
            found[name] = np.where(b, getattr(more, name), ours)
    for cnt, names in _LISTS.items():
        counts = getattr(first, cnt), getattr(more, cnt)
        order = np.argsort(
            np.concatenate([ragged.row_of_entry(each) for each in counts]), kind="stable"
        )
        for name in names:
            if (ours := getattr(first, name)) is not None:
                found[name] = np.concatenate([ours, getattr(more, name)])[order]
    both = a | b
    return replace(first, **found, scored=None if both.all() else both)
