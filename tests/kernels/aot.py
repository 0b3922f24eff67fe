"""Compile kernels for GPUs that are not here and print one JSON line for each.

Triton's wheel carries the compilers of NVIDIA and AMD. TRITON_INTERPRET must not be set. PYTHONPATH
decides about the version of Triton: python aot.py PLAN, one of aot_cases.PLANS.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from aot_cases import ALIGNED, CASES, FLOAT, INTEGER, PLANS, POINTER, WITH_CODE, Case
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from logitcask.kernels.launch import options_of

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""A100, H100 and H200, B200, RTX 50 and RTX PRO 6000, MI300."""

READ = ("logits", "x", "hidden", "weight")
"""Argument that a launch chooses its options by, the first that a kernel has."""
CONSTANTS = {
    "scan_kernel": ("SOFTCAP",),
    "select_kernel": ("K",),
    "objective_kernel": ("K", "SLOTS"),
}
"""Constants of a launch that it chooses them by, too."""
DTYPES = {"*bf16": torch.bfloat16, "*fp32": torch.float32}


def compile_case(case: Case, target: GPUTarget):
    names = case.kernel.arg_names
    pointers = POINTER | case.pointers
    signature = {
        name: "constexpr"
        if name in case.constants
        else "i32"
        if name in INTEGER
        else "fp32"
        if name in FLOAT
        else pointers.get(name, "*fp32")
        for name in names
    }
    aligned = [n for n in names if n in ALIGNED or signature[n].startswith("*")]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    dtype = next(DTYPES[signature[name]] for name in READ if name in names)
    named = CONSTANTS.get(case.kernel.__name__, ())
    constants = tuple(case.constants[name] for name in named)
    capability = target.arch if target.backend == "cuda" else None
    options = options_of(case.kernel.__name__, dtype, constants, capability)
    return triton.compile(source, target=target, options={"num_warps": case.num_warps} | options)


def describe_nvidia(compiled, with_code: bool) -> dict:
    """Return registers, local memory, widths and, with_code, instructions for NVIDIA."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = cuobjdump("-res-usage", file.name)
        sass = cuobjdump("-sass", file.name) if with_code else ""
    ptx = compiled.asm["ptx"]
    row = {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled_bytes": sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        "wide_loads": len(re.findall(r"\bld\.global[.\w:]*\.(?:v2\.b64|v4\.b32|v8\.b32)\b", ptx)),
        "wide_stores": len(re.findall(r"\bst\.global[.\w:]*\.(?:v2\.b64|v4\.b32|v8\.b32)\b", ptx)),
    }
    if with_code:
        row["exp"] = len(re.findall(r"\bMUFU\.EX2\b", sass))
        row |= exponential_loop(sass)
    return row


def cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout


def exponential_loop(sass: str) -> dict:
    """Return figures of the tightest loop with exponentials.

    loop: instructions for each of them. exp_after_load: how many of them follow its last load from
    global memory, before the loop ends; all of them, unless the load is for the next turn.
    """
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)
    lines = [(int(at, 16), text) for at, text in code]
    found = []
    for at, text in lines:
        back = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if back and (to := int(back[1], 16)) < at:
            body = [each for where, each in lines if to <= where <= at]
            if any("MUFU.EX2" in each for each in body):
                found.append(body)
    body = min(found, key=len)
    exps = [i for i, each in enumerate(body) if "MUFU.EX2" in each]
    load = max((i for i, each in enumerate(body) if "LDG" in each), default=-1)
    return {
        "loop": round(len(body) / len(exps), 1),
        "exp_after_load": sum(i > load for i in exps),
    }


def describe_amd(assembly: str) -> dict:
    """Return registers, local memory and widths of a kernel compiled for AMD."""

    def note(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    return {
        "registers": note("vgpr_count"),
        "spilled_bytes": note("private_segment_fixed_size") + 4 * note("vgpr_spill_count"),
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly)),
        "wide_stores": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", assembly)),
        "exp": len(re.findall(r"\bv_exp_f32", assembly)),
    }


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ, "the interpreter compiles nothing"
    for name, target in PLANS[sys.argv[1]]:
        compiled = compile_case(CASES[name], TARGETS[target])
        row = {
            "triton": triton.__version__,
            "name": name,
            "target": target,
            "warps": CASES[name].num_warps,
            "shared": compiled.metadata.shared,
        }
        if "amdgcn" in compiled.asm:
            row |= describe_amd(compiled.asm["amdgcn"])
        else:
            # Disassembly takes longer than the compilation of a small kernel.
            row |= describe_nvidia(compiled, with_code=name in WITH_CODE)
        print(json.dumps(row), flush=True)
