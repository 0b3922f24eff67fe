"""Least bytes and operations of a task of the kernel benchmark, and their time.

A limit belongs to a task, not to a method: a dense product is compared with a gather if a gather is
enough. It is bytes over the measured copy rate plus operations over the measured rate of a square
product of the same dtype, without overlap and without a cache.

  logits         2 reads and 1 write of [T, V]: statistics, gradient
  topk           1 read of [T, V]
  hidden         3 products of T H V: logits, gradient by the hidden states, by the head
  teacher        the head's rows at K ids read, their gradients added to a dense [V, H] of zeros
  teacher rows   the same, the gradient kept as rows
  teacher frozen no gradient by the head
  live           1 product for the student's live top-k, and what `teacher` moves
  live frozen    the same without a gradient by the head
"""

from dataclasses import dataclass

from kernel_shapes import Shape

TASKS = (
    "logits",
    "topk",
    "hidden",
    "teacher",
    "teacher rows",
    "teacher frozen",
    "live",
    "live frozen",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Rates measured at the start of a run, on its device, in its dtype."""

    copy_bytes_per_s: float
    """Read and written bytes of a copy, both counted."""
    flop_per_s: float
    """Operations of a square product."""


def least(task: str, shape: Shape, element: int) -> tuple[int, int]:
    """Return (bytes, operations) of a task; `element` is the bytes of a number."""
    T, V, H, K = shape.T, shape.V, shape.H, shape.K
    product = 2 * T * H * V
    if task == "logits":
        return 3 * T * V * element, 0
    if task == "topk":
        return T * V * element, 0
    if task == "hidden":
        return 0, 3 * product
    gathered = T * K * H * element
    moved = gathered + 2 * T * H * element  # the head's rows; hidden states and their gradient
    if not task.endswith("frozen"):
        moved += gathered  # gradients of the head's rows, written
    if not task.endswith(("frozen", "rows")):
        moved += gathered + V * H * element  # read again to be added to, in a dense gradient
    return moved, product if task.startswith("live") else 0


def limit_ms(task: str, shape: Shape, element: int, rates: Rates) -> float:
    """Return the least milliseconds of a task."""
    moved, operations = least(task, shape, element)
    return 1e3 * (moved / rates.copy_bytes_per_s + operations / rates.flop_per_s)
