"""Compile every kernel for sm_90 without a GPU, some for sm_80 or sm_100 too, and print one JSON
line for each.

Triton's wheel carries ptxas and cuobjdump. TRITON_INTERPRET must not be set. With LOGITCASK_SOAK
set, every case is compiled: python aot.py
"""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from logitcask.kernels.fused_rows import objective_kernel
from logitcask.kernels.indexed_rows import dot_kernel, segment_kernel, weighted_sum_kernel
from logitcask.kernels.precomputed_grad import scale_kernel
from logitcask.kernels.row_grad import grad_kernel
from logitcask.kernels.row_stats import scan_kernel
from logitcask.kernels.topk_select import select_kernel

POINTER = {
    "logits": "*bf16",
    "out": "*bf16",
    "ids": "*i64",
    "kept_group": "*i32",
    "kept_id": "*i32",
    "hidden": "*bf16",
    "weight": "*bf16",
    "by_id": "*i64",
    "target": "*i64",
    "row_of": "*i64",
    "q_rank": "*i64",
    "n_kept": "*i64",
    "top_ids": "*i64",
    "fixed_mask": "*u8",
    "known": "*u8",
}
INTEGER = {
    *("stride", "out_stride", "hidden_stride", "weight_stride"),
    *("n_vocab", "n_columns", "n_ids", "n_groups", "n_slots", "n_elements", "k", "n"),
    *("live_k", "metric_k"),
}
FLOAT = {"inner", "outer", "slope", "log_b", "log_1b"}
# Multiples of 16 at V=151936.
ALIGNED = {n for n in INTEGER if "stride" in n} | {"n_vocab", "n_columns", "n_slots", "n_elements"}
SCAN = {"ROWS": 32, "GROUP": 128, "GROUPS": True, "SOFTCAP": False}
SELECT = {"K": 16, "GROUPS": 2048, "GROUP": 128, "ZERO_BITS": 16}
GRAD = {"TILE": 4096, "IDS": 64, "SOFTCAP": False, "DENSE_LOG": False}
ENTROPY = GRAD | {"DENSE_LOG": True}
CAPPED = {"SOFTCAP": True}
LISTED = {"TILE_S": 16, "TILE_D": 128}
SEGMENT = {"TILE_N": 16, "TILE_D": 128}
FP32 = {"logits": "*fp32", "out": "*fp32"}
FUSED = SELECT | {"SLOTS": 64, "DIVERGENCE": "reverse_kl", "TAIL": "bucket", "SOFTCAP": False}
JSD = FUSED | {"DIVERGENCE": "jsd"}
WIDE = JSD | {"K": 128, "GROUPS": 4096, "GROUP": 64, "SLOTS": 128}
CASES = [
    ("scan bf16", scan_kernel, SCAN, 8, {}),
    ("scan fp32", scan_kernel, SCAN, 8, {"logits": "*fp32"}),
    ("scan small V", scan_kernel, SCAN | {"ROWS": 1}, 4, {}),
    ("scan bf16, no groups", scan_kernel, SCAN | {"ROWS": 64, "GROUP": 64, "GROUPS": False}, 8, {}),
    ("scan bf16, soft cap", scan_kernel, SCAN | CAPPED, 8, {}),
    ("grad bf16, soft cap", grad_kernel, GRAD | CAPPED, 8, {}),
    ("select k=16 bf16", select_kernel, SELECT, 4, {}),
    ("select k=16 fp32", select_kernel, SELECT | {"ZERO_BITS": 0}, 4, {"logits": "*fp32"}),
    ("select k=64 bf16", select_kernel, SELECT | {"K": 64, "GROUPS": 4096, "GROUP": 64}, 4, {}),
    ("select k=128 bf16", select_kernel, SELECT | {"K": 128, "GROUPS": 4096, "GROUP": 64}, 8, {}),
    ("fused bf16", objective_kernel, FUSED, 4, {}),
    ("fused fp32, jsd, soft cap", objective_kernel, JSD | CAPPED | {"ZERO_BITS": 0}, 4, FP32),
    ("fused bf16, renormalized", objective_kernel, JSD | {"TAIL": "renormalize"}, 4, {}),
    ("fused k=S=128 bf16", objective_kernel, WIDE, 8, {}),
    ("grad bf16", grad_kernel, GRAD, 8, {}),
    ("grad fp32", grad_kernel, GRAD, 8, FP32),
    ("grad bf16, entropy", grad_kernel, ENTROPY, 8, {}),
    ("grad bf16, entropy, soft cap", grad_kernel, ENTROPY | CAPPED, 8, {}),
    ("scale bf16", scale_kernel, {"TILE": 4096}, 8, {"x": "*bf16"}),
    ("dot bf16", dot_kernel, LISTED, 4, {"out": "*fp32"}),
    ("dot fp32", dot_kernel, LISTED, 4, {"hidden": "*fp32", "weight": "*fp32", "out": "*fp32"}),
    ("weighted sum bf16", weighted_sum_kernel, LISTED, 4, {}),
    ("segment bf16", segment_kernel, SEGMENT, 4, {}),
]
OTHERS = {"fused bf16": [80], "select k=16 bf16": [100]}
"""Case -> the other architectures that it is compiled for in every run."""
SOAK_CASES = {
    "select k=16 fp32",
    "select k=64 bf16",
    "select k=128 bf16",
    "fused fp32, jsd, soft cap",
    "fused bf16, renormalized",
    "fused k=S=128 bf16",
    "scan bf16, soft cap",
    "grad bf16, entropy, soft cap",
}
"""Left to `make soak`: long lists, and combinations of branches that other cases take singly."""
SOAK_OTHERS = {"scan bf16", "grad bf16", "dot bf16", "weighted sum bf16", "segment bf16"}
"""Compiled by `make soak` for the other architectures, as those of OTHERS are."""


def compile_case(kernel, constants: dict, num_warps: int, pointers: dict, arch: int = 90):
    names = kernel.arg_names
    pointers = POINTER | pointers
    signature = {
        name: "constexpr"
        if name in constants
        else "i32"
        if name in INTEGER
        else "fp32"
        if name in FLOAT
        else pointers.get(name, "*fp32")
        for name in names
    }
    aligned = [n for n in names if n in ALIGNED or signature[n].startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "enable_fp_fusion": True},
    )


def describe(cubin: bytes) -> dict:
    """Return registers, local memory and load widths of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run(
            [tool, "-sass", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    count = {op: len(re.findall(rf"\b{op}\b", sass)) for op in ("LDL", "STL")}
    return {
        "registers": int(re.search(r"REG:(\d+)", sass)[1]),
        "stack": int(re.search(r"STACK:(\d+)", sass)[1]),
        "spill": count["LDL"] + count["STL"],
        "wide_loads": len(re.findall(r"\bLDG\.E[.\w]*\.128\b", sass)),
        "wide_stores": len(re.findall(r"\bSTG\.E[.\w]*\.128\b", sass)),
        "exp": len(re.findall(r"\bMUFU\.EX2\b", sass)),
        "loop": exponential_loop(sass),
    }


def exponential_loop(sass: str) -> float | None:
    """Count instructions per exponential in the tightest loop that has one, or return None."""
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)
    lines = [(int(at, 16), text) for at, text in code]
    found = []
    for at, text in lines:
        back = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if back and (to := int(back[1], 16)) < at:
            body = [each for where, each in lines if to <= where <= at]
            exps = sum("MUFU.EX2" in each for each in body)
            if exps:
                found.append((len(body), exps))
    return round(min(found)[0] / min(found)[1], 1) if found else None


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ, "the interpreter compiles nothing"
    soak = bool(os.environ.get("LOGITCASK_SOAK"))
    for name, kernel, constants, num_warps, pointers in CASES:
        if name in SOAK_CASES and not soak:
            continue
        others = [80, 100] if soak and name in SOAK_OTHERS | set(OTHERS) else OTHERS.get(name, [])
        for arch in (90, *others):
            compiled = compile_case(kernel, constants, num_warps, pointers, arch)
            row = {"name": name, "arch": arch, "shared": compiled.metadata.shared}
            print(json.dumps(row | describe(compiled.asm["cubin"])), flush=True)
