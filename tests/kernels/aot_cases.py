"""Kernels and shapes that aot.py compiles, and which of them for which GPU."""

from typing import Any, NamedTuple

from logitcask.kernels.fused_objective import DIVERGENCES, TAILS
from logitcask.kernels.fused_rows import objective_kernel
from logitcask.kernels.group_stats import group_kernel
from logitcask.kernels.indexed_rows import dot_kernel, weighted_sum_kernel
from logitcask.kernels.launch import TILE, next_power_of_2, num_warps
from logitcask.kernels.precomputed_grad import scale_kernel
from logitcask.kernels.row_grad import grad_kernel
from logitcask.kernels.row_stats import scan_kernel
from logitcask.kernels.segment_sums import BLOCK_N, TILE_N, piece_kernel, segment_kernel
from logitcask.kernels.topk_select import select_kernel, select_sizes, triton_group

V = 151936
SHAPES = ((16, 128), (64, 64), (64, 128), (128, 128))
"""K live top-k and S listed ids. A default store's scores list 64 + 16 + 1: 128 when padded."""

POINTER = {
    "logits": "*bf16",
    "out": "*bf16",
    "ids": "*i64",
    "kept_group": "*i32",
    "kept_place": "*i32",
    "kept_key": "*i32",
    "hidden": "*bf16",
    "weight": "*bf16",
    "by_id": "*i64",
    "starts": "*i64",
    "n_distinct": "*i64",
    "row_of": "*i64",
    "q_rank": "*i64",
    "n_kept": "*i64",
    "top_ids": "*i64",
    "fixed_mask": "*u8",
    "known": "*u8",
}
"""Type of an argument by name; others are float32 pointers."""
INTEGER = {
    *("stride", "out_stride", "hidden_stride", "weight_stride"),
    *("n_vocab", "n_columns", "n_ids", "n_groups", "n_slots", "n_elements", "k", "n"),
    *("live_k", "metric_k"),
}
FLOAT = {"inner", "outer", "slope", "log_b", "log_1b"}
# Multiples of 16 at V=151936 and the default K; a default store lists 81 ids.
ALIGNED = {n for n in INTEGER if "stride" in n} | {"n_vocab", "n_columns", "n_slots", "n_elements"}
ALIGNED |= {"k", "live_k", "metric_k", "n"}


class Case(NamedTuple):
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    pointers: dict[str, str]
    """Types other than in POINTER."""


def scan_case(dtype: str, group: int = 128, tile: int = TILE, **constants: bool) -> Case:
    flags = {"GROUPS": True, "SOFTCAP": False}
    sizes = {"ROWS": tile // group, "GROUP": group, "VECTOR": 8 if dtype == "bf16" else 4}
    constants = {**sizes, **flags, **constants}
    return Case(scan_kernel, constants, num_warps(tile), {"logits": f"*{dtype}"})


def grad_case(dtype: str, **constants: bool) -> Case:
    flags = {"SOFTCAP": False, "DENSE_LOG": False}
    constants = {"TILE": TILE, "IDS": 128, **flags, **constants}
    types = {"logits": f"*{dtype}", "out": f"*{dtype}"}
    return Case(grad_kernel, constants, num_warps(TILE), types)


def select_case(k: int, dtype: str, kernel: Any = select_kernel, **constants: Any) -> Case:
    sizes = select_sizes(k, V, triton_group(k, V))
    warps = sizes.pop("num_warps")
    constants = {**sizes, "ZERO_BITS": 16 if dtype == "bf16" else 0, **constants}
    return Case(kernel, constants, warps, {"logits": f"*{dtype}"})


def fused_case(
    k: int, n_ids: int, dtype: str, divergence: str, tail: str, softcap: bool = False
) -> Case:
    constants = {"DIVERGENCE": divergence, "TAIL": tail, "SOFTCAP": softcap}
    n_padded = next_power_of_2(n_ids)
    return select_case(k, dtype, objective_kernel, SLOTS=n_padded, **constants)


LISTED = {"TILE_S": 16, "TILE_D": 128}
SEGMENT = {"BLOCK_N": BLOCK_N, "TILE_N": TILE_N, "TILE_D": 128}
FP32 = {"hidden": "*fp32", "weight": "*fp32", "out": "*fp32"}
CASES = {
    "scan bf16": scan_case("bf16"),
    "scan fp32": scan_case("fp32"),
    "scan bf16, small V": scan_case("bf16", tile=128),
    "scan bf16, no groups": scan_case("bf16", group=64, GROUPS=False),
    "scan bf16, soft cap": scan_case("bf16", SOFTCAP=True),
    "groups fp32": Case(
        group_kernel, {"ROWS": TILE // 64, "GROUP": 64}, num_warps(TILE), {"logits": "*fp32"}
    ),
    "grad bf16": grad_case("bf16"),
    "grad fp32": grad_case("fp32"),
    "grad bf16, soft cap": grad_case("bf16", SOFTCAP=True),
    "grad bf16, entropy": grad_case("bf16", DENSE_LOG=True),
    "grad bf16, entropy, soft cap": grad_case("bf16", DENSE_LOG=True, SOFTCAP=True),
    "scale bf16": Case(scale_kernel, {"TILE": TILE}, num_warps(TILE), {"x": "*bf16"}),
    "dot bf16": Case(dot_kernel, LISTED, 4, {"out": "*fp32"}),
    "dot fp32": Case(dot_kernel, LISTED, 4, FP32),
    "weighted sum bf16": Case(weighted_sum_kernel, LISTED, 4, {}),
    "piece bf16": Case(piece_kernel, SEGMENT, 4, {}),
    "segment bf16": Case(segment_kernel, SEGMENT | {"COMPACT": False}, 4, {}),
    "segment fp32, compact": Case(segment_kernel, SEGMENT | {"COMPACT": True}, 4, FP32),
}
CASES |= {
    f"select K{k} {dtype}": select_case(k, dtype)
    for dtype in ("bf16", "fp32")
    for k in (16, 64, 128)
}
CASES |= {
    f"fused K{k} S{n_ids} {dtype} jsd bucket": fused_case(k, n_ids, dtype, "jsd", "bucket")
    for dtype in ("bf16", "fp32")
    for k, n_ids in SHAPES
}
CASES |= {
    f"fused K16 S128 bf16 {divergence} {tail}": fused_case(16, 128, "bf16", divergence, tail)
    for divergence, tail in [
        *((each, "bucket") for each in DIVERGENCES),
        *(("jsd", t) for t in TAILS),
    ]
}
CASES["fused K16 S128 fp32 jsd bucket, soft cap"] = fused_case(
    16, 128, "fp32", "jsd", "bucket", softcap=True
)

WITH_CODE = {
    *("scan bf16", "scan fp32", "scan bf16, no groups"),
    *("grad bf16", "grad fp32", "grad bf16, entropy"),
}
"""Cases with figures of the machine code."""

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
PLANS = {
    # Every kernel, and every architecture.
    "newest": [
        *((name, "sm_90") for name in ("scan bf16", "scan fp32", "scan bf16, no groups")),
        ("groups fp32", "sm_90"),
        *((name, "sm_90") for name in ("grad bf16", "grad bf16, entropy", "scale bf16")),
        *((name, "sm_90") for name in ("dot bf16", "weighted sum bf16", "piece bf16")),
        ("fused K16 S128 bf16 jsd bucket", "sm_90"),
        ("scan bf16, small V", "sm_80"),
        ("segment bf16", "sm_100"),
        ("grad bf16, soft cap", "sm_120"),
        ("scan bf16", "gfx942"),
    ],
    # Lists of candidates, long lists, and loops are what an older Triton compiles differently.
    "oldest": [
        ("scan bf16", "sm_90"),
        ("grad bf16", "sm_90"),
        ("segment bf16", "sm_80"),
        ("select K64 bf16", "sm_90"),
        ("fused K128 S128 bf16 jsd bucket", "sm_90"),
    ],
    "all": [(name, target) for name in CASES for target in ARCHITECTURES],
}
"""Plan -> (case, target) in order."""
