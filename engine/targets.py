"""What the store knows of P rows, padded to C columns: everything an objective may look at.

A column is one vocabulary id of one row. Columns come in this order: the student's stored ids as
they were stored (its top-k, best first), the teacher's other known ids (best first), ids that the
student drew and the teacher was not asked at, and the sampled token if it is none of these. Ids are
distinct within a row; rows end in padding.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

BEYOND = 1 << 30
"""The rank of an id that the teacher did not keep: larger than any k."""


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
    """[P, C] float32, the teacher's log-prob; -inf at padding and where it is not known."""
    q_rank: Tensor
    """[P, C] int64, 0-based place in the teacher's kept list, or BEYOND."""
    in_student: Tensor
    """[P, C] bool, in the student's stored list; column c < k of it is in its top-k."""
    cached: Tensor
    """[P, C] bool, the teacher's log-prob is stored; False at padding and at a token in no list."""
    token_col: Tensor
    """[P] int64, column of the sampled token."""
    kept: Tensor
    """[P] int64, length of the teacher's kept list: its top-k is exact for every k up to it."""
    q_log_tail: Tensor
    """[P] float32, log of the teacher's mass outside all cached ids."""
    q_entropy: Tensor
    """[P] float32, the teacher's entropy, nats."""
    s_entropy: Tensor
    """[P] float32, the entropy of the student that sampled, nats."""
    s_lp: Tensor
    """[P] float32, that student's log-prob of the sampled token."""
    b_lp: Tensor
    """[P] float32, log-prob of the sampled token under the law it was drawn from."""
    q_token_lp: Tensor
    """[P] float32, the teacher's log-prob of the sampled token."""
    version: Tensor
    """[P] int64, version of that student."""
    sequence: Tensor | None = None
    """[P] int64, which sequence of the batch the row belongs to, from 0 in order."""
    position: Tensor | None = None
    """[P] int64, r: the row predicts response token r of its sequence."""
    s_log_p: Tensor | None = None
    """[P, C] float32, log-prob by the student that sampled at the ids of its stored list; -inf
    elsewhere."""
    mc_count: Tensor | None = None
    """[P, C] int64, how often that student drew the id from its whole softmax at temperature 1;
    0 = never. None where the rollouts hold no such draws."""
    mc_log_p: Tensor | None = None
    """[P, C] float32, that student's log-prob at the ids it drew; -inf elsewhere."""
    q_draws: Tensor | None = None
    """[P, C] int64, how often the teacher drew the id. None where its ids are its best ones."""
    base_log_p: Tensor | None = None
    """[P, C] float32, log-prob by the model that the teacher was made from; NaN where it was not
    asked. None without one."""
    base_token_lp: Tensor | None = None
    """[P] float32, that model's log-prob of the sampled token."""
    reward: Tensor | None = None
    """[P] float32, the reward of the row's sequence; NaN where it has none. None where the store
    holds none."""

    def __len__(self) -> int:
        return len(self.token)

    def places(self, top_ids: Tensor) -> Tensor:
        """[P, C] int64: where each column's id stands in top_ids [P, K], which are distinct in a
        row; BEYOND for an id that is not there, as padding never is.
        """
        # Sorted and searched: comparing all with all would make [P, C, K].
        ascending, place = top_ids.sort(1)
        at = torch.searchsorted(ascending, self.ids).clamp_(max=top_ids.shape[1] - 1)
        return torch.where(ascending.gather(1, at) == self.ids, place.gather(1, at), BEYOND)

    def at(self, index: Tensor) -> "Targets":
        """The rows at `index` [n], all columns."""
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> "Targets":
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Targets":
        every: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: change(t) for n, t in every.items() if t is not None})
