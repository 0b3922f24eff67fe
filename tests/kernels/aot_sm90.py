"""Compiles every kernel for sm_90 without a GPU, and prints one JSON line each of what came out.

Triton's wheel carries ptxas and cuobjdump. TRITON_INTERPRET must not be set: python aot_sm90.py
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

from logitcask.kernels.row_grad import grad_kernel
from logitcask.kernels.row_stats import scan_kernel
from logitcask.kernels.topk_select import select_kernel

POINTER = {
    "logits": "*bf16",
    "out": "*bf16",
    "ids": "*i64",
    "kept_group": "*i32",
    "kept_id": "*i32",
}
INTEGER = {"stride", "out_stride", "n_vocab", "n_columns", "n_ids", "n_groups", "n_slots", "k"}
ALIGNED = {"stride", "out_stride", "n_vocab", "n_columns", "n_slots"}  # multiples of 16 at V=151936
SCAN = {"ROWS": 32, "GROUP": 128, "GROUPS": True}
SELECT = {"K": 16, "GROUPS": 2048, "GROUP": 128, "ZERO_BITS": 16}
GRAD = {"TILE": 4096, "IDS": 64}
CASES = [
    ("scan bf16", scan_kernel, SCAN, 8, {}),
    ("scan fp32", scan_kernel, SCAN, 8, {"logits": "*fp32"}),
    ("scan small V", scan_kernel, {"ROWS": 1, "GROUP": 128, "GROUPS": True}, 4, {}),
    ("scan bf16, no groups", scan_kernel, {"ROWS": 64, "GROUP": 64, "GROUPS": False}, 8, {}),
    ("select k=16 bf16", select_kernel, SELECT, 4, {}),
    ("select k=16 fp32", select_kernel, SELECT | {"ZERO_BITS": 0}, 4, {"logits": "*fp32"}),
    ("select k=64 bf16", select_kernel, SELECT | {"K": 64, "GROUPS": 4096, "GROUP": 64}, 4, {}),
    ("select k=128 bf16", select_kernel, SELECT | {"K": 128, "GROUPS": 4096, "GROUP": 64}, 8, {}),
    ("grad bf16", grad_kernel, GRAD, 8, {}),
    ("grad fp32", grad_kernel, GRAD, 8, {"logits": "*fp32", "out": "*fp32"}),
]


def compile_case(kernel, constants: dict, num_warps: int, pointers: dict):
    names = kernel.arg_names
    pointers = POINTER | pointers
    signature = {
        name: "constexpr"
        if name in constants
        else "i32"
        if name in INTEGER
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
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps, "enable_fp_fusion": True},
    )


def describe(cubin: bytes) -> dict:
    """Registers, local memory and load widths of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (
            subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-sass", "-res-usage")
        )
    count = {op: len(re.findall(rf"\b{op}\b", sass)) for op in ("LDL", "STL")}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spill": count["LDL"] + count["STL"],
        "wide_loads": len(re.findall(r"\bLDG\.E[.\w]*\.128\b", sass)),
        "wide_stores": len(re.findall(r"\bSTG\.E[.\w]*\.128\b", sass)),
        "exp": len(re.findall(r"\bMUFU\.EX2\b", sass)),
    }


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ, "the interpreter compiles nothing"
    for name, kernel, constants, num_warps, pointers in CASES:
        compiled = compile_case(kernel, constants, num_warps, pointers)
        row = {"name": name, "shared": compiled.metadata.shared, **describe(compiled.asm["cubin"])}
        print(json.dumps(row), flush=True)
