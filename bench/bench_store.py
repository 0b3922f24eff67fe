"""The store and its peers: bytes, rates, latency, and the KL that a loss on stored scores misses.

Run: .venv/bin/python bench/bench_store.py [SECTION ...]      (default: all, some 30 minutes)

  sizes      bytes a position of made-up rows, and the error of stored values, per profile
  pair       a trained student and teacher: each entry once, or both lists
  frontier   bytes against KL missed: profiles, top-p, k-min, k-max, and peers' fixed rows
  rates      sealing, and decoding whole segments, against parquet and raw arrays
  random     single sequences from a decoded cache, against the same
  commits    four processes, 200 commits each, on this disk and on an S3 server on loopback
  before     one writer, against the code of the time when a segment was a folder
  wait       the share of data wait in the demo's training
  race       16 processes that commit at once, against those of an earlier version
  log        opening, info, ls, a look and a commit at 50,000 segments: CPU seconds and memory

A section appends its row to bench/results/store.jsonl; `python bench/report.py` makes the tables
and the picture of bench/README.md from the newest of each. With a clone of DistillKit on PYTHONPATH
its own writer is measured too.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import results
from store_before import before
from store_commits import commits, wait
from store_log import log
from store_pair import pair
from store_race import race
from store_rates import random, rates
from store_sizes import frontier, sizes

SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "sizes": sizes,
    "pair": pair,
    "frontier": frontier,
    "rates": rates,
    "random": random,
    "commits": commits,
    "before": before,
    "wait": wait,
    "race": race,
    "log": log,
}


def main(arguments: list[str]) -> None:
    """Measure sections and append their rows."""
    parser = results.option_parser(__doc__, "store")
    parser.add_argument("section", nargs="*", help=f"One of {', '.join(SECTIONS)}.")
    options = parser.parse_args(arguments)
    if unknown := set(options.section) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    for name in options.section or list(SECTIONS):
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        row = SECTIONS[name]()
        for bar in row.get("bars", []):
            print(f"{'met ' if bar['met'] else 'MISSED'}  {bar['bar']}: {bar['value']:.4g}")
        packages = ("zarr", "numcodecs", "pcodec", "numpy", "pyarrow", "obstore")
        results.append(
            options.out,
            {
                "bench": "store",
                "section": name,
                "command": f"python bench/bench_store.py {name}",
                "seconds": round(time.monotonic() - start),
                **row,
                **results.environment(*packages),
            },
        )


if __name__ == "__main__":
    main(sys.argv[1:])
