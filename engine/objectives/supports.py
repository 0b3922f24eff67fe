"""Which ids of a row a loss looks at. A support is a mask over the columns of Targets."""

from collections.abc import Callable

import torch
from torch import Tensor

from logitcask.engine.packing.targets import Targets

Support = Callable[[Tensor, Targets, int], Tensor]
"""(places [C, S] of the columns in the live student's top ids, the rows, k) -> [C, S] bool."""


def teacher(places: Tensor, rows: Targets, k: int) -> Tensor:
    """S(q): the teacher's top-k. Fixed: the student cannot move it."""
    return rows.q_rank < k


def student(places: Tensor, rows: Targets, k: int) -> Tensor:
    """S(p) of the student that sampled: frozen at its version. Its ids are the first columns."""
    column = torch.arange(rows.ids.shape[1], device=rows.ids.device)
    return rows.in_student & (column < k)


def overlap(places: Tensor, rows: Targets, k: int) -> Tensor:
    """S(p) & S(q), S(p) of the live student: the intersection never leaves what was scored."""
    return teacher(places, rows, k) & (places < k)


def union(places: Tensor, rows: Targets, k: int) -> Tensor:
    """S(p) | S(q), S(p) live, as far as it was scored: see cache/miss_mass."""
    return rows.cached & (teacher(places, rows, k) | (places < k))


def non_overlap(places: Tensor, rows: Targets, k: int) -> Tensor:
    """What one of S(p) and S(q) has and the other has not, S(p) live, as far as it was scored."""
    return rows.cached & (teacher(places, rows, k) ^ (places < k))


def sampled(places: Tensor, rows: Targets, k: int) -> Tensor:
    """The sampled token alone; k is 1."""
    column = torch.arange(rows.ids.shape[1], device=rows.ids.device)
    return column == rows.token_col[:, None]


def mc(places: Tensor, rows: Targets, k: int) -> Tensor:
    """Ids that the student drew when it sampled, beside the token that it went on with; k is 1."""
    return rows.held("mc_count") > 0


def teacher_mc(places: Tensor, rows: Targets, k: int) -> Tensor:
    """Ids that the teacher drew; k is 1."""
    return rows.held("q_draws") > 0


SUPPORTS: dict[str, Support] = {
    "teacher": teacher,
    "student": student,
    "overlap": overlap,
    "union": union,
    "non_overlap": non_overlap,
    "sampled": sampled,
    "mc": mc,
    "teacher_mc": teacher_mc,
}

LIVE = frozenset({"overlap", "union", "non_overlap"})
"""Supports in which the student of today has a say."""

DRAWN = frozenset({"sampled", "mc", "teacher_mc"})
"""Supports that are draws and no top-k."""
