"""Processes that commit small units at once: those of an earlier version, then those of this one.

`python bench/store_race.py URL NUMBER` is one writer, with the version on PYTHONPATH; it begins
with the first line of its input.
"""

import hashlib
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from store_before import EARLIER, sources, synthetic_small

from logitcask.engine.store import open_store

WRITERS, EACH = 16, 20
TOTAL = WRITERS * (EACH + 1)


def race() -> dict[str, Any]:
    """Measure the commits of many writers, of each version on the same disk."""
    from store_common import bar, fresh

    with fresh("race") as folder:
        found = {name: together(folder / name, source) for name, source in sources(folder).items()}
    print(json.dumps(found))
    now = found["now"]
    return {
        "earlier": EARLIER,
        "writers": WRITERS,
        "commits": WRITERS * EACH,
        "found": found,
        "bars": [
            bar(f"{WRITERS} writers: p99 of a commit, seconds <= 2", now["p99_s"],
                now["p99_s"] <= 2),
            bar(f"{WRITERS} writers: units present of {TOTAL}, none doubled",
                now["present"], now["present"] == now["segments"] == TOTAL),
        ],
    }  # fmt: skip


def together(url: Path, source: Path) -> dict[str, float]:
    """Run the writers of one version at once; return their seconds and the state of the store."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(url), str(number)],
            env={**os.environ, "PYTHONPATH": str(source)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(WRITERS)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    start = time.monotonic()
    for process in processes:
        assert process.stdin is not None
        print("go", file=process.stdin, flush=True)
    outs = [process.communicate()[0] for process in processes]
    took_s = time.monotonic() - start
    seconds = sorted(s for out in outs for s in json.loads(out)["seconds"])
    # The last writer has seen all.
    state = max((json.loads(out)["state"] for out in outs), key=lambda each: each["present"])
    return {
        **state,
        "commits_per_second": len(seconds) / took_s,
        "p50_s": statistics.median(seconds),
        "p99_s": seconds[int(0.99 * len(seconds))],
    }


def writer(url: str, number: int) -> None:
    """Commit small units; print their seconds, and what the store holds at the end."""
    made, store = synthetic_small(number), open_store(url, create=True)
    content = {
        "set": {"digest": "made up"},
        "student": {"base_weights": "made up", "root": "made up"},
    }
    named = inspect.signature(store.commit_rollouts).parameters
    provenance = {"provenance" if "provenance" in named else "lineage": content}

    def commit(unit: int) -> float:
        tokens = (made.tokens + np.uint32(unit + 1)).astype(np.uint32)
        digest = hashlib.sha256(f"{number} {unit}".encode()).hexdigest()
        start = time.perf_counter()
        store.commit_rollouts(
            replace(made, tokens=tokens),
            name="main",
            unit_key=f"sha256:{digest}",
            unit={"version": 0, "first": 1000 * number + unit + 1},
            **provenance,
        )
        return time.perf_counter() - start

    commit(-1)  # loads what the first commit of a process loads
    print("ready", flush=True)
    sys.stdin.readline()
    seconds = [commit(unit) for unit in range(EACH)]
    snapshot = store.head()
    state = {
        "present": len(snapshot.unit_keys()),
        "segments": len(snapshot.segments),
        "records": snapshot.number + 1,
    }
    print(json.dumps({"seconds": seconds, "state": state}))


if __name__ == "__main__":
    writer(sys.argv[1], int(sys.argv[2]))
