"""Targets: the data of P rows from the store, padded to C columns, for any objective.

A column is one vocabulary id of one row. Columns come in this order: the student's stored ids as
they were stored (its top-k, best first), the teacher's other scored ids (best first), ids that the
student drew and the teacher did not score, and the sampled token if it is none of these. Ids are
distinct within a row; rows end in padding.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.store.decoded_unit import DRAWN, LISTED, OTHERS, REWARDS, ROW, UNMAPPED
from logitcask.engine.store.format.ragged import count_marked, index_in_row, row_of_entry
from logitcask.engine.types import Array

NOT_IN_TOPK = 1 << 30
"""The rank of an id that is not in a top-k: larger than any k."""

UNIT_NAMES = {
    "student_entropy": "s_entropy",
    "student_logprobs": "s_lp",
    "behavior_logprobs": "b_lp",
    "teacher_logprobs": "q_token_lp",
}
"""Fields of Targets whose array of a decoded unit has another name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """P rows, C columns; log-probs are natural, at temperature 1, over the full vocabulary."""

    token: Tensor
    """[P] int64, the sampled token."""
    weight: Tensor
    """[P] float32, the loss mask: 0 = not trained on, and not counted."""
    ids: Tensor
    """[P, C] int64; -1 where a row has no such column."""
    q_log_p: Tensor
    """[P, C] float32, the teacher's log-prob; -inf at padding and where there is no score."""
    q_rank: Tensor
    """[P, C] int64, 0-based rank in the teacher's kept list, or NOT_IN_TOPK."""
    in_student: Tensor
    """[P, C] bool, in the student's stored list; column c < k of it is in its top-k."""
    cached: Tensor
    """[P, C] bool, the teacher's log-prob is stored; False at padding and at a token in no list."""
    token_col: Tensor
    """[P] int64, column of the sampled token."""
    n_kept: Tensor
    """[P] int64, length of the teacher's kept list: its top-k is exact for every k up to it."""
    q_log_tail: Tensor
    """[P] float32, log of the teacher's mass outside all cached ids."""
    q_entropy: Tensor
    """[P] float32, the teacher's entropy, nats; of an interval the lower end."""
    student_entropy: Tensor
    """[P] float32, the entropy of the behaviour policy at temperature 1, nats."""
    student_logprobs: Tensor
    """[P] float32, its log-prob of the sampled token at temperature 1."""
    behavior_logprobs: Tensor
    """[P] float32, log-prob of the sampled token under the distribution it was drawn from."""
    teacher_logprobs: Tensor
    """[P] float32, the teacher's log-prob of the sampled token."""
    version: Tensor
    """[P] int64, version of the behaviour policy."""
    sequence: Tensor
    """[P] int64, which of the packed sequences a row belongs to, from 0 in their order."""
    position: Tensor
    """[P] int64, from 0: which response token of its sequence a row predicts."""
    student_topk_logprobs: Tensor
    """[P, C] float32, log-probs of the behaviour policy's stored top-k; -inf elsewhere."""
    mc_count: Tensor | None = None
    """[P, C] int64, draws of the id by the behaviour policy in addition to its token; None without
    such draws."""
    mc_log_p: Tensor | None = None
    """[P, C] float32, its log-prob at those ids; -inf elsewhere."""
    q_draws: Tensor | None = None
    """[P, C] int64, draws of the id from the teacher; None if its top ids were kept."""
    base_log_p: Tensor | None = None
    """[P, C] float32, the base model's log-prob; NaN where it has none."""
    base_token_lp: Tensor | None = None
    """[P] float32, the base model's log-prob of the sampled token."""
    reward: Tensor | None = None
    """[P] float32, the reward of the row's sequence, in [0, 1]. None where the store holds none."""
    share: Tensor | None = None
    """[P] float32, the weight of the row's teacher, which `weight` contains; None for one teacher.
    Of several a row comes once for each, as of another sequence."""
    reward_mean: Tensor | None = None
    """[P] float32, the mean reward of all responses to the prompt of the row's sequence."""
    reward_std: Tensor | None = None
    """[P] float32, their sample standard deviation; 0 for one response."""
    later_advantage: Tensor | None = None
    """[P], the advantage of later positions: see the modifier return_to_go, which makes it."""
    span: Tensor | None = None
    """[P] int64, number of the row's span in the pack, from 0 in order; -1 = in none. None for a
    teacher with the student's tokenizer: see `spanned`. The columns of a span are those of one of
    its rows; ids -1 with a log-prob are the teacher's ids without a twin."""
    span_log_q: Tensor | None = None
    """[P] float32, the teacher's log-prob of the whole span, at each of its rows; nats."""
    span_row_log_q: Tensor | None = None
    """[P] float32, its log-prob of its own token at the row of the span that has columns: the
    first token, or the last."""
    span_tokens: Tensor | None = None
    """[P] int64, the teacher's tokens in the span."""
    q_entropy_hi: Tensor | None = None
    """[P] float32, upper end of the teacher's entropy, nats; the entropy itself where it is exact.
    None if all are exact."""
    mixture_width: Tensor | None = None
    """[P] float32, mean width of the bounds of a mixture's log-probs, nats: see mixture.py."""
    mixture_missing: Tensor | None = None
    """[P] float32, the mass that a mixture's scored ids lack, at most."""

    def __len__(self) -> int:
        return len(self.token)

    def topk_index(self, top_ids: Tensor) -> Tensor:
        """Return [P, C] int64: the index of each column's id in top_ids [P, K].

        top_ids are distinct in a row. NOT_IN_TOPK for an id that is not there, and for padding.
        """
        # Sort and search: comparing all with all would need [P, C, K].
        ascending, order = top_ids.sort(1)
        at = torch.searchsorted(ascending, self.ids).clamp_(max=top_ids.shape[1] - 1)
        return torch.where(ascending.gather(1, at) == self.ids, order.gather(1, at), NOT_IN_TOPK)

    def require(self, name: str) -> Tensor:
        """Return an optional field. Raises ObjectiveError if the store has no such data."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ObjectiveError(f"these scores have no {name}", hint=_HINTS[name])
        return value

    def spanned(self) -> "Targets":
        """Return the targets with spans; those of one tokenizer are spans of one token each."""
        if self.span is not None:
            return self
        return replace(
            self,
            span=torch.arange(len(self), device=self.token.device),
            span_log_q=self.teacher_logprobs,
            span_row_log_q=self.teacher_logprobs,
            span_tokens=torch.ones_like(self.token),
        )

    def at(self, index: Tensor) -> "Targets":
        """Return the rows at `index` [n], all columns."""
        return self._map(lambda tensor: tensor[index])

    def columns(self, which: Tensor, mask: Tensor) -> "Targets":
        """Return the columns `which` [P, n], padding outside `mask` [P, C], no token column."""
        ids = torch.where(mask, self.ids, -1).gather(1, which)
        wide = {
            f.name: value.gather(1, which)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
            and value.shape == self.ids.shape
            and f.name != "ids"
        }
        return replace(self, ids=ids, token_col=torch.full_like(self.token_col, -1), **wide)

    def to(self, device: torch.device | str) -> "Targets":
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Targets":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: None if v is None else change(v) for k, v in values.items()}
        return Targets(**changed)


_MC_HINT = "sample with --mc-draws, and score those ids with --extra-ids mc"
_BASE_HINT = "score the rollouts with the base model (--teacher-kind base), and name it with --base"
_HINTS = {
    "mc_count": _MC_HINT,
    "mc_log_p": _MC_HINT,
    "q_draws": "score with --selection sampled and --draws",
    "base_log_p": _BASE_HINT,
    "base_token_lp": _BASE_HINT,
    "reward": "sample with --grader",
    "reward_mean": "sample with --grader",
    "reward_std": "sample with --grader",
    "share": "name several teachers with weights",
    "later_advantage": "evaluate the objective by row_objective, which makes it",
    "q_entropy_hi": "score with a teacher that returns only top-k log-probs",
    "mixture_width": "name several teachers with --mixture arithmetic or geometric",
    "mixture_missing": "name several teachers with --mixture arithmetic or geometric",
    **dict.fromkeys(
        ("span", "span_log_q", "span_row_log_q", "span_tokens"),
        "take the targets of `spanned`, which every teacher has",
    ),
}


def empty_sequence(names: Collection[str]) -> dict[str, Array]:
    """Return a sequence of one token without rows, with these arrays."""
    groups = ROW | LISTED | OTHERS | DRAWN
    rewards = REWARDS if "reward" in names else ()
    return {
        **{name: np.zeros(0, dtype) for name, dtype in groups.items() if name in names},
        **{name: np.zeros(0, np.float32) for name in rewards},
        **{name: np.zeros(0, np.int64) for name in ("version", "position", "predict_at")},
        "input_ids": np.zeros(1, np.int64),
    }


def make_targets(flat: Mapping[str, Array]) -> Targets:
    """Build the targets of concatenated sequences.

    flat: the arrays of `Unit.sequence`, concatenated, and `sequence` [P].
    """
    token = flat["token"].astype(np.int64)
    s_counts, t_counts = flat["s_cnt"].astype(np.int64), flat["t_cnt"].astype(np.int64)
    known = s_counts + t_counts
    s_at = row_of_entry(s_counts), index_in_row(s_counts)
    t_row = row_of_entry(t_counts)
    t_at = t_row, s_counts[t_row] + index_in_row(t_counts)
    mc_at, filled = None, known
    if "mc_cnt" in flat:
        mc_at, filled = _drawn_at(flat, s_at, t_at)
    width = int(filled.max(initial=-1)) + 1

    def place(listed: Any, others: Any, pad: Any, dtype: Any) -> Array:
        out = np.full((len(token), width), pad, dtype)
        out[s_at], out[t_at] = listed, others
        return out

    ids = place(flat["s_ids"], flat["t_ids"], -1, np.int64)
    if "span" in flat:
        ids[ids == UNMAPPED] = -1
    if mc_at is not None:
        ids[mc_at] = flat["mc_ids"]
    q_log_p = place(flat["s_q"], flat["t_q"], -np.inf, np.float32)
    rank = place(flat["s_rank"], flat["t_rank"], NOT_IN_TOPK, np.int64)
    hit = ids == token[:, None]
    # Column `filled` is always free: a token that is in no list goes there.
    token_col = np.where(hit.any(1), hit.argmax(1) if width else 0, filled)
    every = np.arange(len(token))
    ids[every, token_col] = token
    # The sampled token has a value in full precision; entries may be rounded. It is NaN in
    # a span of several tokens.
    known_lp = ~np.isnan(flat["q_token_lp"])
    q_log_p[every[known_lp], token_col[known_lp]] = flat["q_token_lp"][known_lp]
    optional = {"student_topk_logprobs": place(flat["s_p"], -np.inf, -np.inf, np.float32)}
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
    if "span" in flat:
        optional |= _spans(flat)
    width = max(int(filled.max(initial=0)), int(token_col.max(initial=-1)) + 1)
    column = np.arange(width)
    cached = column < known[:, None]
    if "span" in flat:  # an id without a twin, on either side, has no score
        cached &= (ids[:, :width] >= 0) & (q_log_p[:, :width] > -np.inf)
    n_kept = flat["kept"].astype(np.int64)
    floats = ["weight", "q_log_tail", "q_entropy", *UNIT_NAMES]
    if "share" in flat:
        flat = {**flat, "weight": flat["weight"] * flat["share"]}
    optional_floats = (
        *("base_token_lp", "share", *REWARDS, "q_entropy_hi"),
        *("mixture_width", "mixture_missing"),
    )
    floats += [name for name in optional_floats if name in flat]
    return Targets(
        token=tensor(token),
        ids=tensor(ids[:, :width]),
        q_log_p=tensor(q_log_p[:, :width], np.float32),
        q_rank=tensor(np.where(rank < n_kept[:, None], rank, NOT_IN_TOPK)[:, :width]),
        in_student=tensor(column < s_counts[:, None], bool),
        cached=tensor(cached, bool),
        token_col=tensor(token_col),
        n_kept=tensor(n_kept),
        version=tensor(flat["version"]),
        sequence=tensor(flat["sequence"]),
        position=tensor(flat["position"]),
        **{name: tensor(flat[UNIT_NAMES.get(name, name)], np.float32) for name in floats},
        **{
            name: tensor(array[:, :width] if array.ndim == 2 else array, array.dtype)
            for name, array in optional.items()
        },
    )


def _spans(flat: Mapping[str, Array]) -> dict[str, Array]:
    """Return the spans [P], numbered over all sequences, and the teacher's values of them."""
    own, sequence = flat["span"].astype(np.int64), flat["sequence"]
    new = np.ones(len(own), bool)
    new[1:] = (own[1:] != own[:-1]) | (sequence[1:] != sequence[:-1])
    number = np.cumsum(new & (own >= 0)) - 1
    return {
        "span": np.where(own >= 0, number, -1),
        "span_log_q": flat["span_q"].astype(np.float32),
        "span_row_log_q": flat["span_row_q"].astype(np.float32),
        "span_tokens": flat["span_tokens"].astype(np.int64),
    }


def _drawn_at(flat: Mapping[str, Array], s_at: Any, t_at: Any) -> tuple[Any, Array]:
    """Return ((row, column) of each drawn id, [P] number of filled columns).

    Scored ids have a column already; others get the next ones.
    """
    mc_counts = flat["mc_cnt"].astype(np.int64)
    mc_row = row_of_entry(mc_counts)
    known_key = _keys(np.concatenate([s_at[0], t_at[0]]), [flat["s_ids"], flat["t_ids"]])
    column = np.concatenate([s_at[1], t_at[1]])
    ascending = np.argsort(known_key)
    mc_key = _keys(mc_row, [flat["mc_ids"]])
    # One more, because searchsorted may return the index behind the last.
    sorted_key = np.append(known_key[ascending], np.uint64(2**64 - 1))
    at = np.searchsorted(sorted_key, mc_key)
    new = sorted_key[at] != mc_key
    known = (flat["s_cnt"].astype(np.int64)) + flat["t_cnt"]
    new_counts = count_marked(new, mc_counts).astype(np.int64)
    mc_col = np.empty(len(mc_row), np.int64)
    mc_col[~new] = column[ascending[at[~new]]]
    mc_col[new] = known[mc_row[new]] + index_in_row(new_counts)
    return (mc_row, mc_col), known + new_counts


def _keys(row: Array, ids: list[Array]) -> Array:
    """Return uint64 keys, one for each (row, id)."""
    keys: Array = row.astype(np.uint64) << np.uint64(32) | np.concatenate(ids).astype(np.uint64)
    return keys


def tensor(array: Array, dtype: Any = np.int64) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype))
