"""Mixtures: the parts of several teachers as one part, of a teacher that is their mean.

Teacher i has a log-prob at its scored ids; t_i is its mass at all others, and m_i the lesser of t_i
and its smallest kept prob: no other id has more. At a sampled token every teacher has a log-prob.

    arithmetic  q = sum_i w_i q_i, at every id that one of them scored. The value used is the sum
                over those that scored it, a lower bound: q is at most sum_missing w_i m_i above it.
                At most sum_i w_i min(t_i, n_i m_i) of the mass of these ids is missing, n_i the
                number of them that i has not scored; that bounds the total variation too. The
                entropy is between sum_i w_i H_i and that plus H(w).
    geometric   q = prod_i q_i^w_i / Z, at the ids that all of them scored. Z is between the sum
                over these ids and the same plus the bounds of the others; of ids that none scored
                they are at most prod_i t_i^w_i (Hölder). The values used have the upper end of Z.

An id that all teachers scored is exact in the arithmetic mean, and in the geometric one up to Z.
The top ids are those that no bound can move: `kept` counts them. Bounds hold up to the rounding of
the stored log-probs.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from logitcask.engine.store.format.ragged import index_in_row, matrix, row_of_entry
from logitcask.engine.types import Array

_IDS = 2.0**32
"""Ids of a vocabulary at most: they are stored as uint32."""
_MOST_RANK = np.iinfo(np.uint16).max


class Joined(NamedTuple):
    """The ids that at least one of T teachers scored at R rows, by row, [U] in all."""

    row: Array
    """[U] int64."""
    ids: Array
    """[U] uint32, ascending in a row."""
    q: Array
    """[T, U] float64, the probs; 0 where there is no score."""
    scored: Array
    """[T, U] bool."""
    tail: Array
    """[T, R] float64, t: the mass at ids without a score."""
    most: Array
    """[T, R] float64, m: no id without a score has more mass."""
    student_lp: Array
    """[U] float32, the student's log-prob of an id of its stored list; NaN elsewhere."""
    student_index: Array
    """[U] int64, the index in that list; -1 elsewhere."""


def join(parts: Sequence[Mapping[str, Array]]) -> Joined:
    """Join the scored ids of the same rows by several teachers.

    parts: of one sequence, as of `DecodedUnit.sequence`.
    """
    rows = len(parts[0]["token"])
    lists = [(_keys(part, "s"), _keys(part, "t")) for part in parts]
    keys, at = np.unique(
        np.concatenate([np.concatenate(each) for each in lists]), return_inverse=True
    )
    row = (keys >> np.uint64(32)).astype(np.int64)
    q = np.zeros((len(parts), len(keys)))
    scored = np.zeros(q.shape, bool)
    tail = np.stack([np.exp(part["q_log_tail"].astype(np.float64)) for part in parts])
    smallest = np.ones(tail.shape)
    student_lp = np.full(len(keys), np.nan, np.float32)
    student_index = np.full(len(keys), -1, np.int64)
    # The sampled token, where one of them scored it: every teacher has its log-prob.
    token = np.arange(rows, dtype=np.uint64) << np.uint64(32) | parts[0]["token"].astype(np.uint64)
    column = np.minimum(np.searchsorted(keys, token), max(0, len(keys) - 1))
    there = np.flatnonzero(keys[column] == token) if len(keys) else np.zeros(0, np.int64)
    column = column[there]
    first = 0
    for i, (part, (own, others)) in enumerate(zip(parts, lists, strict=True)):
        of_s = at[first : first + len(own)]
        of = at[first : first + len(own) + len(others)]
        first += len(of)
        values = np.exp(np.concatenate([part["s_q"], part["t_q"]]).astype(np.float64))
        q[i, of], scored[i, of] = values, True
        student_lp[of_s] = part["s_p"]
        index = index_in_row(part["s_cnt"].astype(np.int64))
        student_index[of_s] = np.maximum(student_index[of_s], index)
        kept = np.concatenate([part["s_rank"], part["t_rank"]]) < part["kept"][row[of]]
        np.minimum.at(smallest[i], row[of[kept]], values[kept])
        drawn = np.exp(part["q_token_lp"].astype(np.float64))[there]
        new = ~scored[i, column]
        tail[i, there[new]] = np.maximum(tail[i, there[new]] - drawn[new], 0.0)
        q[i, column], scored[i, column] = drawn, True
    return Joined(
        row=row,
        ids=(keys & np.uint64(0xFFFFFFFF)).astype(np.uint32),
        q=q,
        scored=scored,
        tail=tail,
        most=np.minimum(smallest, tail),
        student_lp=student_lp,
        student_index=student_index,
    )


class Mixture(NamedTuple):
    """A mixture at the joined ids, before it is divided by its normaliser."""

    used: Array
    """[U] bool, the ids that get a score."""
    lower: Array
    """[U] their masses, or lower bounds of them; 0 elsewhere."""
    upper: Array
    """[U] upper bounds of all ids."""
    others: Array
    """[R], no id that gets no score has more mass."""
    log_z: Array
    """[R] nats, of the normaliser, at most; 0 for an arithmetic mean."""
    tail: Array
    """[R], the mass outside the scored ids: 1 - the sum of the values used."""
    width: Array
    """[R] nats, the mean of log upper - log lower of the scored ids, by their mass."""
    missing: Array
    """[R], the mass that the values used lack, at most."""
    entropy: tuple[Array, Array]
    """[R] nats, its lower and its upper end."""


def mix(parts: Sequence[Mapping[str, Array]], weights: Array, mixture: str) -> dict[str, Array]:
    """Return one part in place of several: that of their mixture.

    parts: of one sequence, as of `DecodedUnit.sequence`, of teachers that kept their best ids.
    weights: [T, R] above 0, their sum is 1. mixture: a key of MIXTURES.
    """
    x = join(parts)
    rows, token_lp = len(x.tail[0]), np.stack([part["q_token_lp"] for part in parts]).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = MIXTURES[mixture](x, parts, weights)
        log_q = np.log(found.lower) - found.log_z[x.row]
        if mixture == "arithmetic":
            token = np.logaddexp.reduce(np.log(weights) + token_lp, 0)
        else:
            token = (weights * token_lp).sum(0) - found.log_z
        log_tail = np.log(found.tail)
    rank, kept = certain_ranks(x.row, found, rows)
    own = np.flatnonzero(found.used & (x.student_index >= 0))
    own = own[np.lexsort((x.student_index[own], -x.student_lp[own], x.row[own]))]
    others = np.flatnonzero(found.used & (x.student_index < 0))
    others = others[np.lexsort((rank[others], x.row[others]))]
    made = {
        "q_token_lp": np.minimum(token, 0.0),
        "q_entropy": found.entropy[0],
        "q_entropy_hi": found.entropy[1],
        "q_log_tail": log_tail,
        "kept": kept,
        "mixture_width": found.width,
        "mixture_missing": found.missing,
        "s_p": x.student_lp[own],
    }
    for letter, which in (("s", own), ("t", others)):
        made |= {
            f"{letter}_cnt": np.bincount(x.row[which], minlength=rows),
            f"{letter}_ids": x.ids[which],
            f"{letter}_q": log_q[which],
            f"{letter}_rank": np.minimum(rank[which], _MOST_RANK),
        }
    typed = {name: value.astype(_DTYPES.get(name, "float32")) for name, value in made.items()}
    return {**{name: parts[0][name] for name in parts[0] if name not in typed}, **typed}


def arithmetic(x: Joined, parts: Sequence[Mapping[str, Array]], weights: Array) -> Mixture:
    """Return sum_i w_i q_i; weights: [T, R]."""
    w, rows = weights[:, x.row], weights.shape[1]
    lower = (w * x.q).sum(0)
    upper = lower + np.where(x.scored, 0.0, w * x.most[:, x.row]).sum(0)
    ratio = np.where(lower > 0, lower * np.log(upper / lower), 0.0)
    absent = np.stack([_sums(x.row, ~each, rows) for each in x.scored])
    low = (weights * np.stack([part["q_entropy"] for part in parts])).sum(0)
    high = np.stack([part.get("q_entropy_hi", part["q_entropy"]) for part in parts])
    of_weights = -(weights * np.log(weights)).sum(0)
    return Mixture(
        used=np.ones(len(x.row), bool),
        lower=lower,
        upper=upper,
        others=(weights * x.most).sum(0),
        log_z=np.zeros(rows),
        tail=(weights * x.tail).sum(0),
        width=_sums(x.row, ratio, rows) / np.maximum(_sums(x.row, lower, rows), 1e-300),
        missing=(weights * np.minimum(x.tail, absent * x.most)).sum(0),
        entropy=(low, (weights * high).sum(0) + of_weights),
    )


def geometric(x: Joined, parts: Sequence[Mapping[str, Array]], weights: Array) -> Mixture:
    """Return prod_i q_i^w_i, and the bounds of Z; weights: [T, R]."""
    w, rows = weights[:, x.row], weights.shape[1]
    upper = np.exp((w * np.log(np.where(x.scored, x.q, x.most[:, x.row]))).sum(0))
    used: Array = np.logical_and.reduce(x.scored)
    lower = np.where(used, upper, 0.0)
    least = _sums(x.row, lower, rows)
    rest = np.exp((weights * np.log(x.tail)).sum(0))
    # Z is at most 1; a rounded sum may be above it.
    most = np.maximum(np.minimum(_sums(x.row, upper, rows) + rest, 1.0), least)
    outside = np.where(most > 0, 1 - least / most, 1.0)
    others = np.exp((weights * np.log(x.most)).sum(0))
    np.maximum.at(others, x.row[~used], upper[~used])
    # Of the ids that all scored the distribution is known; at most `outside` of the mass is not
    # theirs, of which the entropy is known to be in [0, log _IDS]. Both ends are concave in it.
    share = lower / least[x.row]
    inside = _sums(x.row, np.where(lower > 0, -share * np.log(share), 0.0), rows)
    best = np.minimum(outside, 1 / (1 + np.exp(inside) / _IDS))
    low = np.minimum(inside, _binary(outside) + (1 - outside) * inside)
    return Mixture(
        used=used,
        lower=lower,
        upper=upper,
        others=others,
        log_z=np.where(most > 0, np.log(most), 0.0),
        tail=outside,
        width=np.where(least > 0, np.log(most / least), 0.0),
        missing=outside,
        entropy=(low, _binary(best) + (1 - best) * inside + best * np.log(_IDS)),
    )


MIXTURES = {"arithmetic": arithmetic, "geometric": geometric}


def certain_ranks(row: Array, found: Mixture, rows: int) -> tuple[Array, Array]:
    """Return ([U] rank of each scored id by its value, [R] how many of the first are certain).

    The first k ids of a row are certain where the value of the last of them is at least the upper
    bound of every other id. Ids without a score get the rank behind all others.
    """
    used = np.flatnonzero(found.used)
    used = used[np.lexsort((-found.lower[used], row[used]))]
    counts = np.bincount(row[used], minlength=rows)
    rank = np.full(len(row), _MOST_RANK, np.int64)
    rank[used] = index_in_row(counts)
    lower, valid = matrix(found.lower[used], counts, -1.0)
    upper, _ = matrix(found.upper[used], counts, -1.0)
    bound = np.concatenate([upper[:, 1:], found.others[:, None]], 1)[:, : lower.shape[1]]
    bound = np.maximum(bound, found.others[:, None])
    bound = np.maximum.accumulate(bound[:, ::-1], 1)[:, ::-1]
    kept = np.logical_and.accumulate(valid & (lower >= bound), 1).sum(1)
    return rank, np.minimum(kept, _MOST_RANK)


_DTYPES = {
    **dict.fromkeys(("s_cnt", "t_cnt", "kept", "s_rank", "t_rank"), "uint16"),
    **dict.fromkeys(("s_ids", "t_ids"), "uint32"),
}


def _keys(part: Mapping[str, Array], letter: str) -> Array:
    """Return uint64 keys of the ids of one list, by row, then id."""
    row = row_of_entry(part[f"{letter}_cnt"].astype(np.int64)).astype(np.uint64)
    keys: Array = row << np.uint64(32) | part[f"{letter}_ids"].astype(np.uint64)
    return keys


def _sums(row: Array, values: Array, rows: int) -> Array:
    """Return [R] sums of the values of each row."""
    return np.bincount(row, values, minlength=rows)


def _binary(p: Array) -> Array:
    """Return the entropy of (p, 1 - p), nats."""
    q = 1 - p
    logs = np.where(p > 0, p * np.log(p), 0.0) + np.where(q > 0, q * np.log(q), 0.0)
    return -logs
