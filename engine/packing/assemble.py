"""Sequences of a unit, laid end to end -> Targets: which ids a row has as columns.

The student's stored ids come first, as far as the teacher's log-prob is known at them, in the order
of its list; then the teacher's other known ids, best first; then ids that the student drew and the
teacher was not asked at; then the sampled token if it is none of these.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from logitcask.engine.packing.targets import BEYOND, Targets
from logitcask.engine.store.format.ragged import marked, rows, within
from logitcask.engine.store.unit import DRAWN, LISTED, OTHERS, ROW, SEQUENCE
from logitcask.engine.types import Array


def nothing(names: Collection[str]) -> dict[str, Array]:
    """A sequence without rows, of units that have these arrays: one token that is not looked at."""
    groups = ROW | LISTED | OTHERS | DRAWN | {"reward": SEQUENCE["reward"]}
    return {
        **{name: np.zeros(0, dtype) for name, dtype in groups.items() if name in names},
        **{name: np.zeros(0, np.int64) for name in ("version", "position", "predict_at")},
        "input_ids": np.zeros(1, np.int64),
    }


def targets_of(flat: Mapping[str, Array]) -> Targets:
    """From the arrays of `Unit.sequence`, concatenated over sequences, and `sequence` [P]."""
    token = flat["token"].astype(np.int64)
    s_cnt, t_cnt = flat["s_cnt"].astype(np.int64), flat["t_cnt"].astype(np.int64)
    known = s_cnt + t_cnt
    s_at = rows(s_cnt), within(s_cnt)
    t_row = rows(t_cnt)
    t_at = t_row, s_cnt[t_row] + within(t_cnt)
    mc_at, filled = None, known
    if "mc_cnt" in flat:
        mc_at, filled = _drawn_at(flat, s_at, t_at)
    width = int(filled.max(initial=-1)) + 1

    def place(listed: Any, others: Any, pad: Any, dtype: Any) -> Array:
        out = np.full((len(token), width), pad, dtype)
        out[s_at], out[t_at] = listed, others
        return out

    ids = place(flat["s_ids"], flat["t_ids"], -1, np.int64)
    if mc_at is not None:
        ids[mc_at] = flat["mc_ids"]
    q_log_p = place(flat["s_q"], flat["t_q"], -np.inf, np.float32)
    rank = place(flat["s_rank"], flat["t_rank"], BEYOND, np.int64)
    hit = ids == token[:, None]
    # One column is never taken by another id: there the token goes that is none.
    token_col = np.where(hit.any(1), hit.argmax(1) if width else 0, filled)
    every = np.arange(len(token))
    ids[every, token_col] = token
    # The sampled token's own value is stored in full precision; entries may be rounded.
    q_log_p[every, token_col] = flat["q_token_lp"]
    optional = {"s_log_p": place(flat["s_p"], -np.inf, -np.inf, np.float32)}
    if mc_at is not None:
        optional["mc_count"] = place(0, 0, 0, np.int64)
        optional["mc_log_p"] = place(-np.inf, -np.inf, -np.inf, np.float32)
        optional["mc_count"][mc_at] = flat["mc_mult"]
        optional["mc_log_p"][mc_at] = flat["mc_lp"]
    if "t_mult" in flat:
        optional["q_draws"] = place(0, flat["t_mult"], 0, np.int64)
    if "base_token_lp" in flat:
        optional["base_log_p"] = place(flat["s_base"], flat["t_base"], np.nan, np.float32)
        optional["base_log_p"][every, token_col] = flat["base_token_lp"]
    width = max(int(filled.max(initial=0)), int(token_col.max(initial=-1)) + 1)
    column = np.arange(width)
    kept = flat["kept"].astype(np.int64)
    floats = ["weight", "q_log_tail", "q_entropy", "s_entropy", "s_lp", "b_lp", "q_token_lp"]
    floats += [name for name in ("base_token_lp", "reward", "q_entropy_hi") if name in flat]
    return Targets(
        token=tensor(token),
        ids=tensor(ids[:, :width]),
        q_log_p=tensor(q_log_p[:, :width], np.float32),
        q_rank=tensor(np.where(rank < kept[:, None], rank, BEYOND)[:, :width]),
        in_student=tensor(column < s_cnt[:, None], bool),
        cached=tensor(column < known[:, None], bool),
        token_col=tensor(token_col),
        kept=tensor(kept),
        version=tensor(flat["version"]),
        sequence=tensor(flat["sequence"]),
        position=tensor(flat["position"]),
        **{name: tensor(flat[name], np.float32) for name in floats},
        **{name: tensor(array[:, :width], array.dtype) for name, array in optional.items()},
    )


def _drawn_at(flat: Mapping[str, Array], s_at: Any, t_at: Any) -> tuple[Any, Array]:
    """((row, column) of every id that the student drew, [P] columns that are taken): ids that the
    teacher is known at have theirs, others get the next ones.
    """
    mc_cnt = flat["mc_cnt"].astype(np.int64)
    mc_row = rows(mc_cnt)
    known_key = _keys(np.concatenate([s_at[0], t_at[0]]), [flat["s_ids"], flat["t_ids"]])
    column = np.concatenate([s_at[1], t_at[1]])
    ascending = np.argsort(known_key)
    mc_key = _keys(mc_row, [flat["mc_ids"]])
    # One more, so that there is a place to look at behind the last.
    sorted_key = np.append(known_key[ascending], np.uint64(2**64 - 1))
    at = np.searchsorted(sorted_key, mc_key)
    new = sorted_key[at] != mc_key
    known = (flat["s_cnt"].astype(np.int64)) + flat["t_cnt"]
    new_cnt = marked(new, mc_cnt).astype(np.int64)
    mc_col = np.empty(len(mc_row), np.int64)
    mc_col[~new] = column[ascending[at[~new]]]
    mc_col[new] = known[mc_row[new]] + within(new_cnt)
    return (mc_row, mc_col), known + new_cnt


def _keys(row: Array, ids: list[Array]) -> Array:
    """uint64, one for each (row, id)."""
    flat: Array = row.astype(np.uint64) << np.uint64(32) | np.concatenate(ids).astype(np.uint64)
    return flat


def tensor(array: Array, dtype: Any = np.int64) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype))
