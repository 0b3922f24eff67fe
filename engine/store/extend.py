"""Extension segments: further entries of the same teacher on the same rollouts.

For a larger k_max or for other ids (such as a later student's top-k), layout `extension` stores the
entries that the earlier segments lack, and their ranks. In each row let U be the stored entries in
their order, and X the new ones in the new order. X is stored in that order; the reader needs for
each of X the number of U that come before it:

  implied  = members of U whose *stored* value orders before its own,
  rank_fix = the true number - the implied one   (modulo 2^16),

so that the rank of the j-th of X in U and X together is j + implied + rank_fix, and U takes the
remaining ranks in its own order.

The new list of a teacher is its old list followed by the additional ids of the new one. Where
log-probs changed in their last bits, the old order stays. Larger changes are refused: they come
from another teacher or another dtype.
"""

from dataclasses import replace

import numpy as np

import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.ragged as ragged
import logitcask.engine.store.format.schema as schema
from logitcask.engine.errors import IdentityError, StoreError
from logitcask.engine.store.format.checks import check_lists
from logitcask.engine.store.format.layouts import RESCORE, Ranked, exact_order, ranked, stored_order
from logitcask.engine.types import Array, CachedScores, IdLists, Scores

NOISE = {"float32": 1e-3}
"""dtype of a scorer -> nats by which its log-probs may differ between two runs."""
COARSE_NOISE = 0.25
"""The same for any other dtype."""
UNLIKELY = -30.0
"""Lower log-probs are compared as this."""


def request_ids(cached: CachedScores, more: IdLists | None = None) -> IdLists:
    """Return the ids at which an extension is scored: the stored ids of each row, then `more`.

    The tail of an extended row is the mass outside all of them, so the scorer needs them all.
    """
    u = ranked(cached)
    every = IdLists(cnt=u.cnt.astype(np.uint16), ids=u.ids)
    return every if more is None else union(every, more)


def union(first: IdLists, more: IdLists) -> IdLists:
    """Return in each row the ids of `first`, then those of `more` that `first` lacks."""
    new = ragged.find(first.ids.astype(np.uint32), first.cnt, more.ids.astype(np.uint32), more.cnt)
    added = ragged.count_marked(new < 0, more.cnt)
    return IdLists(
        cnt=(first.cnt.astype(np.int64) + added).astype(np.uint16),
        ids=_interleaved(first.cnt, first.ids, added, more.ids[new < 0]),
    )


def encode(
    cached: CachedScores,
    scores: Scores,
    at: IdLists,
    profile: codecs.Profile,
    *,
    noise: float,
    rounding: float,
) -> dict[str, Array]:
    """Encode an extension of `cached` by scores at the ids `at`, made by `request_ids`.

    noise: nats by which a log-prob may have changed; rounding: of the profile of the stored ones.
    Raises IdentityError for larger changes, StoreError where `at` lacks a stored id or a row
    becomes too long.
    """
    assert scores.at_lp is not None, "an extension has scores at the stored ids"
    check_lists(at, len(cached.cnt), schema.MAX_ROW, "the requested ids", RESCORE)
    u = ranked(cached)
    at_cnt, at_ids = at.cnt, at.ids.astype(np.uint32)
    l_cnt, l_ids = scores.cnt.astype(np.uint16), scores.ids.astype(np.uint32)
    place = ragged.find(at_ids, at_cnt, u.ids, u.cnt)
    if (place < 0).any():
        raise StoreError("an extension lacks scores at some stored ids", hint=RESCORE)
    u_lp = scores.at_lp[np.repeat(ragged.starts(at_cnt)[:-1], u.cnt) + place]
    _check_agrees(u, u_lp, noise, rounding)

    # In the new order a row has the old list, then the additional ids of the new list, then the
    # rest.
    in_list = ragged.find(l_ids, l_cnt, u.ids, u.cnt)
    old = ragged.index_in_row(u.cnt) < np.repeat(cached.kept, u.cnt)
    u_added, u_rest = ~old & (in_list >= 0), ~old & (in_list < 0)
    u_added_cnt, u_rest_cnt = (
        ragged.count_marked(u_added, u.cnt),
        ragged.count_marked(u_rest, u.cnt),
    )
    x_added = ragged.find(u.ids, u.cnt, l_ids, l_cnt) < 0
    x_rest = ragged.find(u.ids, u.cnt, at_ids, at_cnt) < 0
    x_rest &= ragged.find(l_ids, l_cnt, at_ids, at_cnt) < 0
    added_cnt, rest_cnt = ragged.count_marked(x_added, l_cnt), ragged.count_marked(x_rest, at_cnt)

    u_place, x_place = in_list[u_added], ragged.index_in_row(l_cnt)[x_added]
    added_before = ragged.count_less(u_place, u_added_cnt, x_place, added_cnt)
    added_before += np.repeat(cached.kept, added_cnt)
    order = exact_order(scores.at_lp[x_rest], at_ids[x_rest])
    best_first = np.lexsort((order, ragged.row_of_entry(rest_cnt)))
    u_order = exact_order(u_lp[u_rest], u.ids[u_rest])
    rest_before = ragged.count_less(u_order, u_rest_cnt, order[best_first], rest_cnt)
    rest_before += np.repeat(cached.kept + u_added_cnt, rest_cnt)

    def together(added: Array, rest: Array) -> Array:
        return _interleaved(added_cnt, added, rest_cnt, rest)

    exact = together(scores.entry_lp[x_added], scores.at_lp[x_rest][best_first])
    cnt, lp = added_cnt + rest_cnt, codecs.to_entry(exact, profile)
    longest = int((u.cnt + cnt).max(initial=0))
    if longest > schema.MAX_ROW or int(cnt.max(initial=0)) > schema.MAX_K:
        raise StoreError(
            f"a row of {longest} ids, at most {schema.MAX_ROW}, and {schema.MAX_K} in one segment",
            hint="request fewer ids, or give these scores another name",
        )
    return {
        "log_tail": scores.log_tail.astype(np.float32),
        "n_kept": cached.kept + u_added_cnt + added_cnt,
        "topk_counts": cnt,
        "topk_ids": together(l_ids[x_added], at_ids[x_rest][best_first]),
        "topk_logprobs": lp,
        "rank_fix": together(added_before, rest_before) - _implied(u, lp, cnt, profile),
    }


def decode(cached: CachedScores, arrays: dict[str, Array], profile: codecs.Profile) -> CachedScores:
    """Return `cached` with the arrays of an extension. Raises ValueError where they do not fit."""
    cnt, ids = arrays["topk_counts"], arrays["topk_ids"]
    if len(cnt) != len(cached.cnt):
        raise ValueError(f"{len(cnt)} rows extend {len(cached.cnt)}")
    ragged.check_counts(cnt, len(ids), schema.MAX_K)
    u = ranked(cached)
    if int((u.cnt + cnt).max(initial=0)) > schema.MAX_ROW:
        raise ValueError(f"a row of more than {schema.MAX_ROW} ids")
    if (arrays["n_kept"] > u.cnt + cnt).any():
        raise ValueError("more entries are kept than there are")
    implied = _implied(u, arrays["topk_logprobs"], cnt, profile)
    x_rank = ragged.index_in_row(cnt).astype(np.uint16) + implied + arrays["rank_fix"]
    u_rank = ragged.remaining(x_rank, cnt, u.cnt)
    first = ragged.starts(u.cnt)[:-1]
    s_rank = u_rank[np.repeat(first, cached.s_cnt) + cached.s_rank]
    others = u_rank[np.repeat(first, cached.cnt) + cached.rank]
    rank = _interleaved(cached.cnt, others, cnt, x_rank)
    both = (cached.cnt + cnt).astype(np.uint16)
    best_first = np.lexsort((rank, ragged.row_of_entry(both)))
    lp = codecs.from_entry(arrays["topk_logprobs"], profile)
    return replace(
        cached,
        log_tail=arrays["log_tail"],
        kept=arrays["n_kept"],
        s_rank=s_rank,
        cnt=both,
        ids=_interleaved(cached.cnt, cached.ids, cnt, ids)[best_first],
        entry_lp=_interleaved(cached.cnt, cached.entry_lp, cnt, lp)[best_first],
        rank=rank[best_first],
    )


def _check_agrees(u: Ranked, again: Array, noise: float, rounding: float) -> None:
    difference = np.abs(again.clip(UNLIKELY) - u.lp.clip(UNLIKELY))
    allowed = noise + 2 * rounding * np.abs(u.lp.clip(UNLIKELY))
    if (difference > allowed).any():
        worst = int(np.argmax(difference - allowed))
        raise IdentityError(
            f"id {u.ids[worst]} has log-prob {again[worst]:.4f} now, {u.lp[worst]:.4f} is stored",
            hint="score with the weights, dtype and engine of the first scores, or give these "
            "another name",
        )


def _implied(u: Ranked, lp: Array, cnt: Array, profile: codecs.Profile) -> Array:
    """Return for each new entry the number [X] uint16 of U whose stored value orders before it."""
    stored = codecs.from_entry(lp, profile)
    return ragged.count_less(stored_order(u.lp), u.cnt, stored_order(stored), cnt)


def _interleaved(a_cnt: Array, a: Array, b_cnt: Array, b: Array) -> Array:
    """Return in each row the entries of A, then those of B."""
    row = np.concatenate([ragged.row_of_entry(a_cnt), ragged.row_of_entry(b_cnt)])
    flat: Array = np.concatenate([a, b.astype(a.dtype)])[np.argsort(row, kind="stable")]
    return flat
