"""Every kernel compiles for GPUs that are not here: no spills, wide loads, one exp per logit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Some 17 compilations: minutes where the machine is shared.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict]:
    """Return (name, architecture) -> the row of aot.py on the kernel."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).with_name("aot.py")
    done = subprocess.run(
        [sys.executable, "-P", script], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = map(json.loads, done.stdout.splitlines())
    return {(row["name"], row["arch"]): row for row in rows}


def test_nothing_spills_and_shared_memory_fits(compiled: dict[tuple[str, int], dict]) -> None:
    assert len(compiled) == (37 if os.environ.get("LOGITCASK_SOAK") else 17)
    for row in compiled.values():
        assert row["stack"] == row["spill"] == 0, row
        # Limits of one program on an A100, an H100 and a B200.
        assert row["shared"] <= {80: 166912, 90: 232448, 100: 232448}[row["arch"]], row


def test_registers_leave_room_for_two_programs_a_core(
    compiled: dict[tuple[str, int], dict],
) -> None:
    # 65536 registers a core; a program of 8 warps has 256 threads.
    for (name, _), row in compiled.items():
        if not name.startswith(("select", "fused")):  # 4 warps, or many ids
            assert row["registers"] <= 128, row


def test_rows_are_read_and_written_in_128_bit_words(
    compiled: dict[tuple[str, int], dict],
) -> None:
    for (name, _), row in compiled.items():
        if "small" not in name:
            assert row["wide_loads"] >= 2, row
        if name.startswith("grad"):
            assert row["wide_stores"] >= 2, row


def test_one_exponential_per_logit(compiled: dict[tuple[str, int], dict]) -> None:
    # 4096 logits on 256 threads are 16 a thread, in the main loop and again in the tail.
    for (name, _), row in compiled.items():
        if name in ("scan bf16", "grad bf16", "grad bf16, entropy"):
            assert row["exp"] == 32, row


def test_instructions_per_logit(compiled: dict[tuple[str, int], dict]) -> None:
    # An H200 that reads 4.3 TB/s has about 13 issue slots a bf16 logit (132 cores, 128 lanes, 1.7
    # GHz), and twice as many a float32 one: beyond that a pass would be bound by instructions.
    bounds = {"scan bf16": 10.0, "scan bf16, no groups": 10.0, "scan fp32": 10.5}
    bounds |= {"grad bf16": 6.5, "grad fp32": 6.5, "grad bf16, entropy": 8.5}
    for (name, arch), row in compiled.items():
        if name in bounds and arch == 90:
            assert 1 < row["loop"] <= bounds[name], row


def test_the_small_maths_cost_the_selection_no_program(
    compiled: dict[tuple[str, int], dict],
) -> None:
    # With 128 registers or fewer, 4 programs of 4 warps fit a core, with or without them.
    for (name, _), row in compiled.items():
        if name in ("select k=16 bf16", "fused bf16"):
            assert row["registers"] <= 128, row
