"""Every kernel compiles for sm_90 without a GPU: no spills, wide loads, one exp per logit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """name -> what aot_sm90.py says of the kernel."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).with_name("aot_sm90.py")
    done = subprocess.run(
        [sys.executable, "-P", script], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


def test_nothing_spills_and_shared_memory_fits(compiled: dict[str, dict]) -> None:
    assert len(compiled) == 10
    for row in compiled.values():
        assert row["stack"] == row["spill"] == 0, row
        assert row["shared"] <= 232448, row  # an SM of Hopper


def test_registers_leave_room_for_two_programs_a_core(compiled: dict[str, dict]) -> None:
    # 65536 registers a core; a program of 8 warps has 256 threads.
    for name, row in compiled.items():
        if not name.startswith("select"):
            assert row["registers"] <= 128, row


def test_rows_are_read_and_written_in_128_bit_words(compiled: dict[str, dict]) -> None:
    for name in ("scan bf16", "scan fp32", "grad bf16", "grad fp32"):
        assert compiled[name]["wide_loads"] >= 2, compiled[name]
    for name in ("grad bf16", "grad fp32"):
        assert compiled[name]["wide_stores"] >= 2, compiled[name]


def test_one_exponential_per_logit(compiled: dict[str, dict]) -> None:
    # 4096 logits on 256 threads are 16 a thread, in the main loop and again in the tail.
    for name in ("scan bf16", "grad bf16"):
        assert compiled[name]["exp"] == 32, compiled[name]
