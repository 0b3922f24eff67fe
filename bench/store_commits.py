"""Commits of several processes, data wait of a training, opening a long log.

`python bench/store_commits.py URL NUMBER` is one of the writers.
"""

import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import results
from store_before import synthetic_small
from store_common import PROVENANCE, RUNS, WORK, bar, fresh, key, seal_rollouts

from logitcask.engine.store import open_store
from logitcask.engine.store.retention import tag


def commits() -> dict[str, Any]:
    """Measure four processes that commit to a disk and to an S3 server."""
    from moto.server import ThreadedMotoServer

    found = {"disk": writers(str(WORK / "commits"))}
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else it prints every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(
        AWS_ACCESS_KEY_ID="x",
        AWS_SECRET_ACCESS_KEY="x",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ALLOW_HTTP="true",
    )
    import boto3

    boto3.client("s3").create_bucket(Bucket="cask")
    found["S3 server"] = writers("s3://cask/commits")
    server.stop()
    for where, counts in found.items():
        print(where, json.dumps(counts))
    return {
        "processes": 4,
        "each": 200,
        "media": found,
        "bars": [
            bar(f"{where}: units present of 800, none doubled", counts["present"],
                counts["present"] == counts["records"] == 800)
            for where, counts in found.items()
        ],
    }  # fmt: skip


def writers(url: str) -> dict[str, float]:
    """Run four writers, and count their units and seconds."""
    if "://" not in url:
        shutil.rmtree(url, ignore_errors=True)
    open_store(url, create=True)
    start = time.monotonic()
    processes = [
        subprocess.Popen([sys.executable, __file__, url, str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(4)
    ]
    seconds: list[float] = []
    for process in processes:
        out, _ = process.communicate()
        assert process.returncode == 0, "a writer failed"
        seconds += json.loads(out)
    snapshot = open_store(url).head()
    return {
        "present": len(snapshot.unit_keys()),
        "records": snapshot.number + 1,
        "commits_per_second": 800 / (time.monotonic() - start),
        "p50_ms": 1e3 * statistics.median(seconds),
        "p99_ms": 1e3 * sorted(seconds)[int(0.99 * len(seconds))],
    }


def writer(url: str, number: int) -> None:
    """Commit 200 small units, a few hundred positions each, as one of the processes."""
    made = synthetic_small(number)
    store, seconds = open_store(url), []
    for i in range(200):
        tokens = (made.tokens + np.uint32(i + 1000 * number)).astype(np.uint32)
        start = time.perf_counter()
        store.commit_rollouts(
            replace(made, tokens=tokens),
            name="main",
            unit_key=key(number, i),
            unit={"version": 0, "first": 1000 * number + i},
            provenance=PROVENANCE,
        )
        seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds))


def wait() -> dict[str, Any]:
    """Measure the share of data wait in the demo's trainings."""
    out = WORK / f"demo-{results.code_commit()}"
    logitcask = str(Path(sys.executable).with_name("logitcask"))
    for objective in ("overlap", "forward_kl"):
        command = [logitcask, "demo", "--out", str(out), "--objective", objective]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shares = {}
    for objective in ("overlap", "forward_kl"):
        file = out / "runs" / objective / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        seconds = np.diff([0.0, *(line["progress/seconds"] for line in lines)])
        waited = sum(line["train/data_wait"] * s for line, s in zip(lines, seconds, strict=True))
        shares[objective] = {
            "share": float(waited / seconds.sum()),
            "median_share": statistics.median(line["train/data_wait"] for line in lines),
            "updates": len(lines),
        }
    print(json.dumps(shares))
    worst = max(each["share"] for each in shares.values())
    return {
        "shares": shares,
        "bars": [bar("waiting for rows, share of the demo's training < 0.02", worst, worst < 0.02)],
    }


def opening(count: int = 4096) -> dict[str, Any]:
    """Measure opening a store of thousands of records, made by tags."""
    with fresh("open") as folder:
        store = open_store(folder / "cask", create=True)
        base = seal_rollouts(store, synthetic_small(0), "default")
        for n in range(count):
            tag(store, f"t{n}", base.number)
        seconds = {}
        for name in ("bundles", "records"):
            if name == "records":
                shutil.rmtree(folder / "cask" / "bundles")
            times = []
            for _ in range(RUNS):
                start = time.perf_counter()
                assert open_store(store.url).head().number == count, "all records are there"
                times.append(time.perf_counter() - start)
            seconds[name] = statistics.median(times)
    print(json.dumps(seconds))
    return {"records": count + 1, "open_seconds": seconds}


if __name__ == "__main__":
    writer(sys.argv[1], int(sys.argv[2]))
