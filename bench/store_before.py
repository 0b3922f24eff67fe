"""Commits of one writer, by turns with those of an earlier version of this code.

`python bench/store_before.py URL` is the writer: one commit for each line of its input, with the
version on PYTHONPATH.
"""

import hashlib
import inspect
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.engine.store import open_store
from logitcask.engine.types import Prompt, Rollouts

EARLIER = "c0dedd4"
"""The last commit with a folder a segment: 35 files of rollouts, 19 of scores."""
ROUNDS, WARM_UP = 60, 5


def sources(folder: Path) -> dict[str, Path]:
    """Return the import path of the code of EARLIER and of today, made in a folder."""
    from results import ROOT

    command = ["git", "-C", str(ROOT), "archive", EARLIER]
    files = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(files)) as packed:
        packed.extractall(folder / "code", filter="data")
    found = {}
    for name, code in (("earlier", folder / "code"), ("now", ROOT)):
        found[name] = folder / f"src-{name}"
        (found[name] / "logitcask").mkdir(parents=True)
        (found[name] / "logitcask/engine").symlink_to(code / "engine")
    return found


def before() -> dict[str, Any]:
    """Measure commits of small units, each version's in turn on the same disk."""
    from store_common import bar, fresh

    with fresh("before") as folder:
        writers = {}
        for name, source in sources(folder).items():
            writers[name] = subprocess.Popen(
                [sys.executable, __file__, str(folder / name)],
                env={**os.environ, "PYTHONPATH": str(source)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        seconds: dict[str, list[list[float]]] = {name: [] for name in writers}
        for _ in range(WARM_UP + ROUNDS):
            for name, process in writers.items():
                assert process.stdin is not None
                assert process.stdout is not None
                print("commit", file=process.stdin, flush=True)
                seconds[name].append(json.loads(process.stdout.readline()))
        for process in writers.values():
            process.communicate()
    wall, cpu = (
        {name: 1e3 * statistics.median(each[i] for each in of[WARM_UP:]) for name, of in times}
        for i, times in ((0, seconds.items()), (1, seconds.items()))
    )
    print(json.dumps({"p50_ms": wall, "cpu_ms": cpu}))
    faster = wall["earlier"] / wall["now"]
    return {
        "earlier": EARLIER,
        "commits": ROUNDS,
        "p50_ms": wall,
        "cpu_ms": cpu,
        "bars": [
            bar(f"one writer, small units: p50 of a commit at {EARLIER} over today's >= 4", faster,
                faster >= 4),
        ],
    }  # fmt: skip


def writer(url: str) -> None:
    """Commit a small unit for each line of the input; print its seconds and CPU seconds."""
    made, store = synthetic_small(0), open_store(url, create=True)
    content = {
        "set": {"digest": "made up"},
        "student": {"base_weights": "made up", "root": "made up"},
    }
    named = inspect.signature(store.commit_rollouts).parameters
    provenance = {"provenance" if "provenance" in named else "lineage": content}
    for number, _ in enumerate(sys.stdin):
        tokens = (made.tokens + np.uint32(number)).astype(np.uint32)
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        start, begun = time.perf_counter(), time.process_time()
        store.commit_rollouts(
            replace(made, tokens=tokens),
            name="main",
            unit_key=f"sha256:{digest}",
            unit={"version": 0, "first": number},
            **provenance,
        )
        print(json.dumps([time.perf_counter() - start, time.process_time() - begun]), flush=True)


def synthetic_small(seed: int) -> Rollouts:
    """Return 256 positions without scores, which measure the commit and not the codec."""
    rng = np.random.default_rng(seed)
    return Rollouts(
        prompts=(Prompt(id="p", token_ids=(1, 2, 3)),),
        seq_prompt=np.zeros(4, np.uint32),
        seq_off=np.arange(5, dtype=np.int64) * 64,
        tokens=rng.integers(0, 1000, 256).astype(np.uint32),
        loss_mask=np.ones(256, np.uint16),
        b_lp=-rng.exponential(2, 256).astype(np.float32),
        finish=np.zeros(4, np.uint16),
        version_start=np.zeros(4, np.int64),
        version_end=np.zeros(4, np.int64),
    )


if __name__ == "__main__":
    writer(sys.argv[1])
