"""Prompt log-probs of vLLM, a JSON object a position, as arrays."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NoReturn

import numpy as np

from logitcask.engine.backends.returned import ReturnedTopK, reject_answer
from logitcask.engine.types import Array

MINUS_INFINITY = -9999.0
"""vLLM writes it for -inf in JSON."""


def read_topk(
    best: Sequence[Any], tokens: Sequence[int], k: int, first: int, *, server_order: bool
) -> ReturnedTopK:
    """Return the k best ids of each position, best first, and the log-prob of its own token.

    tokens: of these positions, the first of which is number `first`. server_order: ids in the
    order of the server's ranks, if they are complete; else ties are in the order of the ids.
    Raises AnswerError that names the first wrong position.
    """
    try:
        return _read_all(best, np.array(tokens, np.int64), k, server_order)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        for place, (entries, token) in enumerate(zip(best, tokens, strict=True), first):
            _check(entries, token, k, place)
        raise AssertionError("one position is wrong") from error


def _read_all(best: Sequence[Any], tokens: Array, k: int, server_order: bool) -> ReturnedTopK:
    """Raise one of several errors where any position is wrong."""
    rows = len(best)
    widths = np.fromiter(map(len, best), np.int64, rows)
    entries = [each for row in best for each in row.values()]
    ids = np.fromiter(map(int, chain.from_iterable(best)), np.int64, len(entries))
    lp = np.fromiter((each["logprob"] for each in entries), np.float64, len(entries))
    lp = np.where(lp <= MINUS_INFINITY, -np.inf, lp)
    row = np.repeat(np.arange(rows), widths)
    is_own = ids == tokens[row]
    inside = widths == k
    if not (inside | (widths == k + 1)).all() or (np.bincount(row[is_own], None, rows) != 1).any():
        raise ValueError("another number of ids, or no token")
    # A token that is not among the best was added to them.
    top = ~is_own | inside[row]
    top_ids, top_lp = ids[top].reshape(rows, k), lp[top].reshape(rows, k)
    order, own_rank = np.lexsort((top_ids, -top_lp), axis=1), np.zeros(rows, np.int64)
    if server_order:
        ranks = np.fromiter((each.get("rank") or 0 for each in entries), np.int64, len(entries))
        listed = ranks[top].reshape(rows, k)
        by_rank = np.argsort(listed, 1, kind="stable")
        if (np.take_along_axis(listed, by_rank, 1) == np.arange(1, k + 1)).all():
            order, own_rank = by_rank, np.maximum(ranks[is_own], k + 1)
    top_ids = np.take_along_axis(top_ids, order, 1)
    place = top_ids == tokens[:, None]
    return ReturnedTopK(
        lp=lp[is_own].astype(np.float32),
        ids=top_ids,
        top_lp=np.take_along_axis(top_lp, order, 1).astype(np.float32),
        rank=np.where(place.any(1), place.argmax(1) + 1 if k else 0, own_rank),
    )


def _check(entries: Any, token: int, k: int, place: int) -> None:
    """Raise AnswerError for the entries of a wrong position."""
    if not isinstance(entries, dict) or not k <= len(entries) <= k + 1:
        count = len(entries) if isinstance(entries, dict) else "no"
        reject_answer(f"{count} log-probs at position {place}, and {k} or one more were requested")
    try:
        ids = np.fromiter(map(int, entries), np.int64, len(entries))
        np.fromiter((each["logprob"] for each in entries.values()), np.float64, len(ids))
        np.fromiter((each.get("rank") or 0 for each in entries.values()), np.int64, len(ids))
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        reject_answer(f"invalid ids or log-probs at position {place}")
    if int((ids == token).sum()) != 1:
        reject_without_token(place, token)


def reject_without_token(place: int, token: int) -> NoReturn:
    """Raise AnswerError for a position that lacks its own token."""
    reject_answer(f"position {place} without the token {token} that was sent")
