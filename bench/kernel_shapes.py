"""Shapes of the kernel benchmark, and made-up tensors of a shape.

T rows, V vocabulary, H hidden size, K listed ids of the teacher, k live ids of the student. The
student's logits are normal with a deviation of 3 nats; the teacher's are the same with noise of
1.5, so that the two top lists overlap in part, as in training.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from kernel_losses import Teacher
from torch import Tensor

SECTIONS = ("logits", "hidden", "indexed", "topk")
SPREAD, NOISE = 3.0, 1.5
"""Deviation of the student's logits, and of the noise that the teacher adds; nats."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one measurement."""

    T: int
    V: int
    H: int
    K: int
    k: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Return the shape of 'T,V,H,K,k'. Raises ValueError with the violated rule."""
        numbers = [int(part) for part in text.split(",")]
        if len(numbers) != 5:
            raise ValueError(f"{text!r} must be five numbers, T,V,H,K,k")
        shape = cls(*numbers)
        if min(numbers) < 1 or max(shape.K, shape.k) > shape.V:
            raise ValueError(f"{text!r}: all must be 1 or more, K and k at most V")
        return shape

    def __str__(self) -> str:
        return f"T={self.T} V={self.V} H={self.H} K={self.K} k={self.k}"


PRESETS = {
    "qwen3": (151_936, 2048, 4096),
    "llama3": (128_256, 2048, 4096),
    "gemma": (262_144, 2560, 3840),
}
"""Model family -> vocabulary, hidden size of a small and of a large model."""


def shapes(preset: str, section: str, device: str, quick: bool) -> list[Shape]:
    """Return the default shapes of a section.

    Few rows on a CPU: all sections together take about seven minutes on two cores.
    """
    V, small, large = PRESETS[preset]
    if device == "cpu":
        T, H = (32, 256) if quick else (128, 1024)
        if section == "indexed":
            return [Shape(n, V, H, 16, 16) for n in ((8 * T,) if quick else (8 * T, 32 * T))]
        return [Shape(T, V, H, 64, 64)]
    if section == "hidden":
        found = [Shape(8192, V, large, 64, 64), Shape(4096, V, small, 64, 64)]
    elif section == "indexed":
        found = [Shape(4096, V, large, 16, 16), Shape(8192, V, large, 64, 64)]
    else:
        sizes = [(4096, 16), (4096, 64), (16384, 64), (1024, 64), (4096, 256)]
        found = [Shape(T, V, small, K, min(K, 64)) for T, K in sizes]
    return found[:2] if quick and section != "hidden" else found[: 1 if quick else None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Tensors of one shape: logits, or hidden and weight, as the section needs them."""

    shape: Shape
    section: str
    logits: Tensor | None
    """[T, V]"""
    hidden: Tensor | None
    """[T, H]"""
    weight: Tensor | None
    """[V, H]"""
    teacher: Teacher
    """At its own best K ids."""
    at_student: Teacher
    """At the student's best K ids."""

    @property
    def inputs(self) -> list[Tensor]:
        """Return the differentiable tensors: the logits, or hidden states and head."""
        return [t for t in (self.logits, self.hidden, self.weight) if t is not None]

    @property
    def device(self) -> torch.device:
        return self.teacher.ids.device

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs[0].dtype

    @property
    def labels(self) -> Tensor:
        """Return [T] int64: the teacher's best id, for peers with cross-entropy alone."""
        return self.teacher.ids[:, 0].contiguous()

    def first(self, n: int) -> "Case":
        """Return the first n rows."""
        rows = slice(0, n)
        s = self.shape
        return Case(
            shape=Shape(min(n, s.T), s.V, s.H, s.K, s.k),
            section=self.section,
            logits=None if self.logits is None else self.logits[rows].contiguous(),
            hidden=None if self.hidden is None else self.hidden[rows].contiguous(),
            weight=self.weight,
            teacher=self.teacher.rows(rows),
            at_student=self.at_student.rows(rows),
        )


def make_case(
    section: str, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Case:
    """Return made-up tensors of a shape."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(n: int, m: int, spread: float) -> Tensor:
        made = torch.empty(n, m, dtype=dtype, device=device)
        for rows in _some_rows(n, m):  # float32 draws of a chunk, not of all
            part = made[rows]
            part.copy_(torch.randn(part.shape, generator=generator, device=device) * spread)
        return made

    logits = hidden = weight = None
    if section in ("logits", "topk"):
        logits = normal(shape.T, shape.V, SPREAD)
    else:
        hidden = normal(shape.T, shape.H, 1.0)
        weight = normal(shape.V, shape.H, SPREAD / shape.H**0.5)
    own, at_student = [], []
    for rows in _some_rows(shape.T, shape.V):
        if logits is not None:
            z = logits[rows].float()
        else:
            assert hidden is not None
            assert weight is not None
            z = (hidden[rows] @ weight.T).float()
        noise = torch.randn(z.shape, generator=generator, device=device)
        log_q = (z + NOISE * noise).log_softmax(-1)
        own.append(_cached_at(log_q, log_q.topk(shape.K).indices))
        at_student.append(_cached_at(log_q, z.topk(shape.K).indices))
    return Case(
        shape=shape,
        section=section,
        logits=logits,
        hidden=hidden,
        weight=weight,
        teacher=_joined(own),
        at_student=_joined(at_student),
    )


def _some_rows(n: int, m: int) -> Iterator[slice]:
    """Return chunks of the rows of [n, m] with float32 copies of 256 MB at most."""
    size = max(1, (1 << 26) // m)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _cached_at(log_q: Tensor, ids: Tensor) -> Teacher:
    """Return the cached scores at ids [C, K] of a teacher with log-probs log_q [C, V]."""
    at = log_q.gather(1, ids)
    tail = (1 - at.double().exp().sum(-1)).clamp(min=1e-12).log()
    return Teacher(ids, at, tail.float())


def _joined(parts: list[Teacher]) -> Teacher:
    return Teacher(
        torch.cat([p.ids for p in parts]),
        torch.cat([p.log_q for p in parts]),
        torch.cat([p.log_tail for p in parts]),
    )
