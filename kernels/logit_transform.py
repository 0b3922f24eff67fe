"""Scale, soft cap and temperature between the head's product z and the logits y of the softmax.

    y = a z / T                     a scale, T temperature
    y = c tanh(a z / c) / T         with a soft cap c

y grows with z, so a top-k by z is one by y. dy/dz = a / T, or (a / T) (1 - tanh(a z / c)^2).

With a soft cap a logit of -inf becomes -c / T and has mass; without one it has none.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class LogitTransform(NamedTuple):
    """Scale, soft cap and temperature; `check` raises ValueError unless all are positive."""

    scale: float = 1.0
    """a: Cohere's logit_scale, the inverse of Granite's logits_scaling."""
    softcap: float | None = None
    """c: Gemma's final_logit_softcapping."""
    temperature: float = 1.0
    """T of the student's distribution; cached log-probs are those at T = 1."""

    @property
    def slope_at_0(self) -> float:
        """Return dy/dz at z = 0."""
        return self.scale / self.temperature

    @property
    def is_plain(self) -> bool:
        """Return whether y = z."""
        return self.softcap is None and self.slope_at_0 == 1.0

    def check(self) -> None:
        """Raise ValueError unless all numbers are positive and finite."""
        for name, value in self._asdict().items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"logit_transform.{name}={value} must be a positive number; "
                    "leave it out for none"
                )

    def apply(self, z: Tensor) -> Tensor:
        """Return y of z, any shape, in its dtype."""
        if self.softcap is None:
            return z if self.is_plain else z * self.slope_at_0
        return torch.tanh(z * (self.scale / self.softcap)) * (self.softcap / self.temperature)

    def slope(self, z: Tensor) -> Tensor:
        """Return dy/dz at z, any shape, in its dtype."""
        if self.softcap is None:
            return torch.full_like(z, self.slope_at_0)
        return (1 - torch.tanh(z * (self.scale / self.softcap)) ** 2) * self.slope_at_0

    def factors(self) -> tuple[float, float]:
        """Return (inner, outer) of `transformed`."""
        if self.softcap is None:
            return self.slope_at_0 * LOG2E.value, 1.0
        inner = 2 * self.scale / self.softcap * LOG2E.value
        return inner, self.softcap / self.temperature * LOG2E.value


PLAIN = LogitTransform()


@triton.jit
def softcapped(x, inner):  # type: ignore[no-untyped-def]
    # tanh(u), inner = 2 u log2(e) / x. Exact to an absolute 1e-7, enough for a logit.
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * inner))


@triton.jit  # type: ignore[untyped-decorator]
def transformed(x, inner, outer, shift, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    # (y of x) - shift in units of log2.
    if SOFTCAP:
        return tl.fma(softcapped(x, inner), outer, -shift)
    return tl.fma(x, inner, -shift)
