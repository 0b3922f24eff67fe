#!/usr/bin/env bash
# Everything that needs a GPU, in one run: correctness, peers, launch parameters, the most decisive first.
#
#   bash bench/gpu.sh      rows to $OUT/gpu.jsonl (without OUT: bench/results/gpu.jsonl), a table last
#
# Needs Python with torch, triton and numpy, a C compiler for Triton, and no network; peers on
# PYTHONPATH are measured too, and matplotlib draws the rows over the chip's limits. It ends within
# BUDGET_S (540) seconds, or when it is stopped, and keeps all rows so far: bench/gpu_run.py has the
# order. Exit code 1 if a check is wrong or something failed. DEVICE=cpu tries the script in Triton's
# interpreter. COMMIT names the code where there is no git.
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHONPATH="$PWD/.src:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

exec "${PYTHON:-python3}" bench/gpu_run.py --device "${DEVICE:-cuda}" --budget "${BUDGET_S:-540}" \
  --out "${OUT:-bench/results}/gpu.jsonl"
