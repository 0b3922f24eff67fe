"""Which ids of a row a loss looks at. A support is a mask over the columns of Targets."""

from collections.abc import Callable

import torch
from torch import Tensor

from logitcask.engine.targets import Targets
from logitcask.kernels.sparse_kl import RowView

Support = Callable[[RowView, Targets, int], Tensor]
"""(view of C rows, the same rows, k) -> [C, S] bool."""


def teacher(view: RowView, rows: Targets, k: int) -> Tensor:
    """S(q): the teacher's top-k. Fixed: the student cannot move it."""
    return rows.q_rank < k


def student(view: RowView, rows: Targets, k: int) -> Tensor:
    """S(p) of the student that sampled: frozen at its version. Its ids are the first columns."""
    column = torch.arange(rows.ids.shape[1], device=rows.ids.device)
    return rows.in_student & (column < k)


def overlap(view: RowView, rows: Targets, k: int) -> Tensor:
    """S(p) & S(q), S(p) of the live student: the intersection never leaves what was scored."""
    return teacher(view, rows, k) & rows.matches(view.top_ids[:, :k]).any(-1)


def sampled(view: RowView, rows: Targets, k: int) -> Tensor:
    """The sampled token alone; k is 1."""
    column = torch.arange(rows.ids.shape[1], device=rows.ids.device)
    return column == rows.token_col[:, None]


SUPPORTS: dict[str, Support] = {
    "teacher": teacher,
    "student": student,
    "overlap": overlap,
    "sampled": sampled,
}
