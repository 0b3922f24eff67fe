"""Sequences of a unit, laid end to end -> Targets: which ids a row has as columns.

The student's stored ids come first, as far as the teacher's log-prob is known at them, in the order
of its list; then the teacher's other known ids, best first; then the sampled token if it is in
neither.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from logitcask.engine.store.ragged import rows, within
from logitcask.engine.store.unit import LISTED, OTHERS, ROW
from logitcask.engine.targets import BEYOND, Targets
from logitcask.engine.types import Array

NOTHING: dict[str, Array] = {
    **{name: np.zeros(0, dtype) for name, dtype in (ROW | LISTED | OTHERS).items()},
    "version": np.zeros(0, np.int64),
    "predict_at": np.zeros(0, np.int64),
    "input_ids": np.zeros(1, np.int64),
}
"""A sequence without rows: one token that is not looked at."""


def targets_of(flat: Mapping[str, Array]) -> Targets:
    """From the arrays of `Unit.sequence`, concatenated over sequences."""
    token = flat["token"].astype(np.int64)
    s_cnt, t_cnt = flat["s_cnt"].astype(np.int64), flat["t_cnt"].astype(np.int64)
    known = s_cnt + t_cnt
    width = int(known.max(initial=-1)) + 1
    s_at = rows(s_cnt), within(s_cnt)
    t_row = rows(t_cnt)
    t_at = t_row, s_cnt[t_row] + within(t_cnt)

    def place(listed: Array, others: Array, pad: Any, dtype: Any) -> Array:
        out = np.full((len(token), width), pad, dtype)
        out[s_at], out[t_at] = listed, others
        return out

    ids = place(flat["s_ids"], flat["t_ids"], -1, np.int64)
    q_log_p = place(flat["s_q"], flat["t_q"], -np.inf, np.float32)
    rank = place(flat["s_rank"], flat["t_rank"], BEYOND, np.int64)
    hit = ids == token[:, None]
    # One column is never taken by a known id: there the token goes that is none.
    token_col = np.where(hit.any(1), hit.argmax(1) if width else 0, known)
    every = np.arange(len(token))
    ids[every, token_col] = token
    # The sampled token's own value is stored in full precision; entries may be rounded.
    q_log_p[every, token_col] = flat["q_token_lp"]
    width = max(int(known.max(initial=0)), int(token_col.max(initial=-1)) + 1)
    column = np.arange(width)
    kept = flat["kept"].astype(np.int64)
    floats = ("weight", "q_log_tail", "q_entropy", "s_entropy", "s_lp", "b_lp", "q_token_lp")
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
        **{name: tensor(flat[name], np.float32) for name in floats},
    )


def tensor(array: Array, dtype: Any = np.int64) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype))
