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

from logitcask.engine.errors import ObjectiveError

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
    """[P] float32, the teacher's entropy, nats; of an interval the least."""
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
    sequence: Tensor
    """[P] int64, which of the packed sequences a row belongs to, from 0 in their order."""
    position: Tensor
    """[P] int64, from 0: which response token of its sequence a row predicts."""
    s_log_p: Tensor
    """[P, C] float32, that student's log-prob at its stored list; -inf at other columns."""
    mc_count: Tensor | None = None
    """[P, C] int64, how often that student drew the id at this position, beside the token that it
    went on with; None where it drew none."""
    mc_log_p: Tensor | None = None
    """[P, C] float32, its log-prob at those ids; -inf elsewhere."""
    q_draws: Tensor | None = None
    """[P, C] int64, how often the teacher drew the id; None where its best ids were kept."""
    base_log_p: Tensor | None = None
    """[P, C] float32, the base model's log-prob; NaN where it was not asked."""
    base_token_lp: Tensor | None = None
    """[P] float32, of the sampled token."""
    reward: Tensor | None = None
    """[P] float32, the reward of the row's sequence, in [0, 1]. None where the store holds none."""
    q_entropy_hi: Tensor | None = None
    """[P] float32, the most that the teacher's entropy can be, nats, if it told its best ids alone;
    where an entropy is exact, that. None where all are."""

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

    def held(self, name: str) -> Tensor:
        """The optional field of this name. Raises ObjectiveError where the store has none."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ObjectiveError(f"these rows hold no {name}", hint=_REMEDIES[name])
        return value

    def at(self, index: Tensor) -> "Targets":
        """The rows at `index` [n], all columns."""
        return self._map(lambda tensor: tensor[index])

    def columns(self, which: Tensor, on: Tensor) -> "Targets":
        """Columns `which` [P, n] alone, padding where `on` [P, C] is not, without the token's."""
        ids = torch.where(on, self.ids, -1).gather(1, which)
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
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: None if v is None else change(v) for k, v in held.items()}
        return Targets(**changed)


_REMEDIES = {
    "mc_count": "sample with --mc-draws, and score at them with --extra-ids mc",
    "mc_log_p": "sample with --mc-draws, and score at them with --extra-ids mc",
    "q_draws": "score with --selection sampled and --draws",
    "base_log_p": "score the rollouts with the base model (--teacher-kind base), and name "
    "it with --base",
    "base_token_lp": "score the rollouts with the base model (--teacher-kind base), name it "
    "with --base",
    "reward": "sample with --grader",
}
