"""Commits of several processes, and the data wait of a training.

`python bench/store_commits.py URL NUMBER UNITS` is one of the writers.
"""

import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import results
from store_before import synthetic_small
from store_common import PROVENANCE, WORK, bar, fresh, key

from logitcask.engine.store import Store, open_store

FEW, MANY = (4, 200), (16, 40)
"""Processes, and units of each."""


def commits() -> dict[str, Any]:
    """Measure processes that commit to a disk and to an S3 server."""
    found = {
        "disk": writers(str(WORK / "commits"), *FEW),
        "disk, 16 processes": writers(str(WORK / "commits"), *MANY),
    }
    with s3_server():
        found["S3 server"] = writers("s3://cask/commits", *FEW)
    for where, counts in found.items():
        print(where, json.dumps(counts))
    most = found["disk, 16 processes"]["p99_ms"] / 1e3
    return {
        "media": found,
        "bars": [
            *(bar(f"{where}: units present of {counts['units']}, none doubled", counts["present"],
                  counts["present"] == counts["segments"] == counts["units"])
              for where, counts in found.items()),
            bar("disk, 16 processes: p99 of a commit <= 2 s", most, most <= 2),
        ],
    }  # fmt: skip


@contextmanager
def s3_server() -> Iterator[None]:
    """Run an S3 server on loopback, whose address is in the environment."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def alone(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        # This server looks first and stores later: two puts of one name could both succeed.
        with lock:
            return [b"".join(app(environ, start_response))]

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else it prints every request
    server = make_server("127.0.0.1", 0, alone, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ.update(
        AWS_ACCESS_KEY_ID="x",
        AWS_SECRET_ACCESS_KEY="x",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{server.port}",
        AWS_ALLOW_HTTP="true",
    )
    boto3.client("s3").create_bucket(Bucket="cask")
    yield
    server.shutdown()


def writers(url: str, processes: int, each: int) -> dict[str, float]:
    """Run writers that begin together, and count their units and seconds."""
    if "://" not in url:
        shutil.rmtree(url, ignore_errors=True)
    open_store(url, create=True)
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen([sys.executable, __file__, url, str(n), str(each)], **pipes)
        for n in range(processes)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", "a writer failed"
    start = time.monotonic()
    for process in started:
        assert process.stdin is not None
        print("begin", file=process.stdin, flush=True)
    seconds: list[float] = []
    for process in started:
        out, _ = process.communicate()
        assert process.returncode == 0, "a writer failed"
        seconds += json.loads(out)
    took_s = time.monotonic() - start
    snapshot = open_store(url).head()
    return {
        "processes": processes,
        "units": processes * each,
        "present": len(snapshot.unit_keys()),
        "segments": len(snapshot.segments),
        "records": snapshot.number + 1,
        "commits_per_second": processes * each / took_s,
        "p50_ms": 1e3 * statistics.median(seconds),
        "p99_ms": 1e3 * sorted(seconds)[int(0.99 * len(seconds))],
    }


def writer(url: str, number: int, each: int) -> None:
    """Commit small units, a few hundred positions each, as one of the processes."""
    made, seconds = synthetic_small(number), []

    def commit(store: Store, i: int) -> None:
        store.commit_rollouts(
            replace(made, tokens=(made.tokens + np.uint32(i + 1000 * number)).astype(np.uint32)),
            name="main",
            unit_key=key(number, i),
            unit={"version": 0, "first": 1000 * number + i},
            provenance=PROVENANCE,
        )

    # The first commit of a process imports the codecs.
    with fresh(f"first-{number}") as folder:
        commit(open_store(folder / "cask", create=True), each)
    store = open_store(url)
    print("ready", flush=True)
    sys.stdin.readline()
    for i in range(each):
        start = time.perf_counter()
        commit(store, i)
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


if __name__ == "__main__":
    writer(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
