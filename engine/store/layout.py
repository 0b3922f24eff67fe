"""Scores <-> the arrays of a score segment, so that no entry is stored twice and no order is lost.

Where the teacher answered at the student's stored ids, most of its own top entries are among them
already. Layout `once` stores the teacher's log-prob at every student id, and of its own kept
entries only the extras: those that are not in the student's list.

The order needs care, because float16 makes ties. In each row let U be the extras and the student's
ids together, in the teacher's exact order: its kept entries as given, then the rest by float32
log-prob, the lower id first. Then

  implied rank of a student id = members of U whose *stored* value is strictly greater,
  t_rank_fix                   = its true position in U - its implied rank   (modulo 2^16).

The reader computes the implied rank from the same stored values, adds the correction, and lets the
extras, which are stored in rank order, fill what remains. The first `kept` of U are the teacher's
list. The correction is never negative when the kept entries descend, and mostly 0; it is
taken modulo 2^16 so that the order survives even where a scorer's values do not descend.

Rows are ragged and flat throughout: E entries, P rows, S entries of the student's lists.
"""

import numpy as np

import logitcask.engine.store.codecs as codecs
import logitcask.engine.store.schema as schema
from logitcask.engine.errors import StoreError
from logitcask.engine.types import Array, Scores

_RESCORE = "this is a fault of the scorer: correct it and score the unit again"


def starts(cnt: Array) -> Array:
    """[P] counts -> [P + 1] int64 offsets."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(cnt, dtype=np.int64)])


def _rows(cnt: Array) -> Array:
    """[P] counts -> the row of each entry, int64."""
    return np.repeat(np.arange(len(cnt), dtype=np.int64), cnt)


def _within(cnt: Array) -> Array:
    """[P] counts -> the position of each entry within its row."""
    offset = starts(cnt)
    within: Array = np.arange(offset[-1], dtype=np.int64) - np.repeat(offset[:-1], cnt)
    return within


def _keys(rows: Array, low: Array) -> Array:
    """One uint64 that sorts by row, then by a uint32."""
    return (rows.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)


def _descending(values: Array) -> Array:
    """Floats -> uint32 that ascend as the floats descend."""
    # + 0.0 makes -0.0 and 0.0 one value, as they are to every comparison.
    bits = (values.astype(np.float32) + np.float32(0.0)).view(np.uint32)
    sign = np.uint32(0x80000000)
    ordered: Array = np.where(bits & sign, bits, ~bits & ~sign)
    return ordered


def _implied(cnt_x: Array, lp_x: Array, cnt_s: Array, lp_s: Array) -> Array:
    """[S] int64: members of the row's union whose stored value is strictly greater."""
    key_s = _keys(_rows(cnt_s), _descending(lp_s))
    key_u = np.sort(np.concatenate([_keys(_rows(cnt_x), _descending(lp_x)), key_s]))
    row_start = starts(cnt_x.astype(np.int64) + cnt_s)[:-1]
    # The left search finds the first of equal keys, so ties share a rank.
    implied: Array = np.searchsorted(key_u, key_s) - np.repeat(row_start, cnt_s)
    return implied


def check_ids(ids: Array, name: str, remedy: str) -> None:
    """Refuses ids that uint32 cannot hold, which a cast would silently change: StoreError."""
    fits = len(ids) == 0 or 0 <= int(ids.min()) <= int(ids.max()) < 2**32
    if ids.dtype.kind not in "iu" or not fits:
        raise StoreError(f"{name} ({ids.dtype}) holds what is no token id", remedy=remedy)


def check(scores: Scores, positions: int, student_entries: int | None) -> None:
    """Refuses scores whose arrays do not fit together. Raises StoreError."""
    entries = int(scores.cnt.sum(dtype=np.int64)) if scores.cnt.ndim == 1 else -1
    lengths = {
        "lp": positions,
        "entropy": positions,
        "log_tail": positions,
        "cnt": positions,
        "ids": entries,
        "entry_lp": entries,
    }
    if scores.at_student is not None:
        if student_entries is None:
            raise StoreError(
                "scores at the student's ids, but the rollouts hold no student's list",
                remedy="score with at_student = False, or roll out with a student's top-k",
            )
        lengths["at_student"] = student_entries
    for name, length in lengths.items():
        array = getattr(scores, name)
        if array.shape != (length,):
            raise StoreError(
                f"scores.{name} has shape {array.shape}, the rollouts ask for ({length},)",
                remedy=_RESCORE,
            )
        if array.dtype.kind == "f" and (np.isnan(array).any() or np.isposinf(array).any()):
            raise StoreError(f"scores.{name} holds NaN or +inf", remedy=_RESCORE)
    if positions and int(scores.cnt.max()) > schema.MAX_K:
        raise StoreError(
            f"a row of {int(scores.cnt.max())} entries, at most {schema.MAX_K} are stored",
            remedy="lower k_max",
        )
    check_ids(scores.ids, "scores.ids", _RESCORE)
    keys = np.sort(_keys(_rows(scores.cnt), scores.ids))
    if len(keys) > 1 and not (np.diff(keys) > 0).all():
        raise StoreError("a row of the scores names an id twice", remedy=_RESCORE)


def encode(
    scores: Scores, profile: codecs.Profile, s_cnt: Array | None, s_ids: Array | None
) -> dict[str, Array]:
    """Arrays of a score segment; s_cnt [P] and s_ids [S] are the base's lists (None: it has none).

    `check` has passed. Raises StoreError where the two values of one id contradict each other.
    """
    arrays: dict[str, Array] = {
        "t_lp": scores.lp.astype(np.float32),
        "ent": scores.entropy.astype(np.float32),
        "log_tail": scores.log_tail.astype(np.float32),
        "kept": scores.cnt.astype(np.uint16),
    }
    if scores.at_student is None or s_cnt is None or s_ids is None:
        lp = codecs.to_entry(scores.entry_lp, profile.entry)
        return arrays | {"cnt": arrays["kept"], "ids": scores.ids.astype(np.uint32), "lp": lp}

    rows_s, row_k = _rows(s_cnt), _rows(scores.cnt)
    key_s, key_k = _keys(rows_s, s_ids), _keys(row_k, scores.ids)
    order_s = np.argsort(key_s)
    sorted_s = key_s[order_s]
    at = np.searchsorted(sorted_s, key_k)
    shared = at < len(sorted_s)
    shared[shared] = sorted_s[at[shared]] == key_k[shared]
    twin = order_s[at[shared]]
    """For each shared entry, where the student's list names the same id."""
    own, other = scores.entry_lp[shared], scores.at_student[twin]
    if not np.allclose(own, other, rtol=2e-3, atol=1e-4):
        raise StoreError(
            "the teacher gives one id two log-probs, in its own list and at the student's ids",
            remedy=_RESCORE,
        )

    extra = ~shared
    cnt_x = np.bincount(row_k[extra], minlength=len(s_cnt)).astype(np.int64)
    true = np.empty(len(s_ids), np.int64)
    true[twin] = _within(scores.cnt)[shared]
    # Student ids that the teacher did not keep stand behind its list, by exact value, then by id.
    rest = np.ones(len(s_ids), bool)
    rest[twin] = False
    rest_at = np.flatnonzero(rest)
    by_rank = np.lexsort((s_ids[rest], _keys(rows_s[rest], _descending(scores.at_student[rest]))))
    rest_cnt = np.bincount(rows_s[rest], minlength=len(s_cnt))
    true[rest_at[by_rank]] = _within(rest_cnt) + np.repeat(scores.cnt.astype(np.int64), rest_cnt)

    lp_x = codecs.to_entry(scores.entry_lp[extra], profile.entry)
    lp_s = codecs.to_entry(scores.at_student, profile.entry)
    fix = true - _implied(cnt_x, lp_x, s_cnt, lp_s)
    return arrays | {
        "cnt": cnt_x.astype(np.uint16),
        "ids": scores.ids[extra].astype(np.uint32),
        "lp": lp_x,
        "t_at_s": lp_s,
        "t_rank_fix": (fix & 0xFFFF).astype(np.uint16),
    }


def decode(arrays: dict[str, Array], s_cnt: Array | None, s_ids: Array | None) -> Scores:
    """The inverse of `encode`: full kept lists in exact rank order, values widened to float32.

    Raises ValueError where the arrays contradict each other (the caller names the segment).
    """
    kept, cnt = arrays["kept"].astype(np.int64), arrays["cnt"].astype(np.int64)
    if int(cnt.sum()) != len(arrays["ids"]):
        raise ValueError("cnt does not add up to the number of entries")
    scalars = {"lp": arrays["t_lp"], "entropy": arrays["ent"], "log_tail": arrays["log_tail"]}
    if "t_at_s" not in arrays or s_cnt is None or s_ids is None:
        if not np.array_equal(kept, cnt):
            raise ValueError("kept and cnt differ in a segment that stores whole lists")
        lp = arrays["lp"].astype(np.float32)
        return Scores(**scalars, cnt=arrays["kept"], ids=arrays["ids"], entry_lp=lp)

    at_s = arrays["t_at_s"]
    if len(s_cnt) != len(cnt) or len(at_s) != len(s_ids):
        raise ValueError("the base's student lists have another length")
    union = cnt + s_cnt
    offset = starts(union)
    implied = _implied(cnt, arrays["lp"], s_cnt, at_s)
    true = (implied + arrays["t_rank_fix"]) & 0xFFFF
    if (true >= np.repeat(union, s_cnt)).any() or (kept > union).any():
        raise ValueError("a rank lies outside its row")
    slot = np.repeat(offset[:-1], s_cnt) + true
    free = np.ones(int(offset[-1]), bool)
    free[slot] = False
    if int(free.sum()) != len(arrays["ids"]):
        raise ValueError("two student ids claim one rank")
    ids = np.empty(int(offset[-1]), np.uint32)
    lp = np.empty(int(offset[-1]), np.float32)
    ids[slot], lp[slot] = s_ids, at_s
    ids[free], lp[free] = arrays["ids"], arrays["lp"]
    listed = _within(union) < np.repeat(kept, union)
    return Scores(
        **scalars,
        cnt=arrays["kept"],
        ids=ids[listed],
        entry_lp=lp[listed],
        at_student=at_s.astype(np.float32),
    )
