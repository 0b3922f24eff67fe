"""Which ids of a row a loss looks at. A support is a mask over the columns of Targets."""

from collections.abc import Callable

import torch
from torch import Tensor

from logitcask.engine.targets import Targets

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


def sampled(places: Tensor, rows: Targets, k: int) -> Tensor:
    """The sampled token alone; k is 1."""
    column = torch.arange(rows.ids.shape[1], device=rows.ids.device)
    return column == rows.token_col[:, None]


SUPPORTS: dict[str, Support] = {
    "teacher": teacher,
    "student": student,
    "overlap": overlap,
    "sampled": sampled,
}
