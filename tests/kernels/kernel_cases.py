"""Logits that have broken kernels before, and the tolerance rule."""

import torch
from torch import Tensor

SHAPES = {"small": (3, 5), "one tile": (4, 1000), "odd": (3, 4801), "two tiles": (2, 8192)}
KINDS = ("iid", "ties", "constant", "thirds -inf", "ramp up", "ramp down", "one hot", "late start")
HALF = (torch.bfloat16, torch.float16)
# Every kind in float32; half precision where it can matter: ties, negative keys, infinities.
KINDS_AND_DTYPES = [(kind, torch.float32) for kind in KINDS] + [
    (kind, dtype) for kind in ("ties", "thirds -inf", "ramp down") for dtype in HALF
]


def make_logits(
    kind: str, n_rows: int, n_columns: int, dtype: torch.dtype, seed: int = 0
) -> Tensor:
    """Return logits [P, V] of the kind, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n_rows, n_columns, generator=generator) * 3
    if kind == "ties":
        z = torch.randint(-3, 4, z.shape, generator=generator).float()
    elif kind == "constant":
        z = torch.full_like(z, -2.0)
    elif kind == "thirds -inf":
        z[:, ::3] = -torch.inf
    elif kind == "ramp up":
        z += torch.linspace(0, 300, n_columns)
    elif kind == "ramp down":
        z -= torch.linspace(0, 300, n_columns)
    elif kind == "one hot":
        z[:, n_columns // 2] = 60.0
    elif kind == "late start":  # nothing finite in the first tile, and far below 0 after it
        z -= 400
        z[:, : n_columns * 9 // 10] = -torch.inf
    return z.to(dtype)


def make_ids(
    n_rows: int, n_columns: int, n_ids: int, seed: int = 0, *, ragged: bool = True
) -> Tensor:
    """Return [P, S] distinct ids, padded with -1 in places where ragged."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack(
        [torch.randperm(n_columns, generator=generator)[:n_ids] for _ in range(n_rows)]
    )
    if ragged:
        ids[torch.rand(ids.shape, generator=generator) < 0.2] = -1
    return ids


def list_top(ids: Tensor, logits: Tensor, n: int) -> Tensor:
    """Return ids [P, S], still distinct, with each row's best n ids first, in the live top-k."""
    top = logits.sort(dim=-1, descending=True, stable=True).indices[:, :n]
    rest = ids[:, n:]
    again = (rest[:, :, None] == top[:, None, :]).any(-1)
    return torch.cat([top, rest.masked_fill(again, -1)], 1)


def ulp(x: Tensor, dtype: torch.dtype) -> float:
    """Distance of neighbouring numbers of dtype at the largest finite |x|."""
    largest = x.double().abs()[x.isfinite()].max().item() if x.isfinite().any() else 1.0
    return torch.finfo(dtype).eps * max(largest, 1.0)


def assert_close(ours: Tensor, naive: Tensor, exact: Tensor, floor: float, what: str) -> None:
    """Tolerance rule: our error against float64 is at most twice that of naive torch in the same
    dtype, plus a floor.

    NaN and infinities must agree with float64.
    """
    ours, naive, exact = (t.detach().cpu().double() for t in (ours, naive, exact))
    odd = ~exact.isfinite()
    assert torch.equal(ours[odd].nan_to_num(nan=12345.0), exact[odd].nan_to_num(nan=12345.0)), (
        f"{what}: non-finite differ"
    )
    if odd.all():
        return
    error = (ours - exact)[~odd].abs().max().item()
    allowed = 2 * (naive - exact)[~odd].abs().nan_to_num().max().item() + floor
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"
