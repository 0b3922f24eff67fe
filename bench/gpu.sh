#!/usr/bin/env bash
# Everything that needs a GPU, in one run: correctness, launch parameters, peers.
#
#   bash bench/gpu.sh      rows to $OUT/gpu.jsonl (without OUT: bench/results/gpu.jsonl), a table last
#
# Needs Python with torch, triton and numpy, a C compiler for Triton, and no network; peers on
# PYTHONPATH are measured too. After BUDGET_S (540) seconds nothing new starts, and the rest is listed
# as left out. A wrong result ends it, unless KEEP_GOING is set; the exit code is then 1 at the end.
# DEVICE=cpu tries the script in Triton's interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
end=$((SECONDS + ${BUDGET_S:-540}))
out=${OUT:-bench/results}/gpu.jsonl
status=0

export PYTHONPATH="$PWD/.src:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

interpreted() { # for a child process, because Triton reads the variable at import
  if [ "$DEVICE" = cpu ]; then TRITON_INTERPRET=1 "$@"; else "$@"; fi
}

echo "== correctness"
if ! interpreted "$PYTHON" bench/gpu_check.py --device "$DEVICE" --out "$out"; then
  [ -n "${KEEP_GOING:-}" ] || exit 1
  status=1
fi

echo && echo "== launch parameters"
half=$(((end - SECONDS) / 2))
interpreted "$PYTHON" bench/gpu_sweep.py --device "$DEVICE" --budget "$half" --out "$out" || status=1

for preset in qwen3 llama3 gemma; do
  left=$((end - SECONDS))
  if [ "$left" -lt 20 ]; then
    echo "left out, the budget was spent: preset $preset"
    continue
  fi
  echo && echo "== $preset"
  quick=()
  if [ "$DEVICE" = cpu ]; then quick=(--quick); fi
  "$PYTHON" bench/bench_kernels.py --device "$DEVICE" --preset "$preset" --budget "$left" \
    --out "$out" "${quick[@]}" || status=1
done

echo
"$PYTHON" bench/report_kernels.py "$out"
exit $status
