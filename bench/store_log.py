"""A log of 50,000 segments: opening it, `store info`, `store ls`, a commit, a look of a worker.

The records are like those of the product, half rollouts and half scores of them, with a provenance
of about 1.5 kB; the objects of their segments do not exist, for no measured command reads them.
`python bench/store_log.py STORE open|info|ls|commit|look` is one of the measured processes.
"""

import hashlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from store_before import synthetic_small
from store_common import PROVENANCE, RUNS, bar, fresh, key

from logitcask.engine.score.planner import ScorePlanner
from logitcask.engine.score.unit import ScoreRequest
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.format.entry import Segment, SegmentBody, sha256
from logitcask.engine.store.format.schema import read_alone
from logitcask.engine.store.inspect import list_segments, summary
from logitcask.engine.store.log import bundles, record
from logitcask.engine.store.log.body import encode_body
from logitcask.engine.types import ModelRef

SEGMENTS = 50_000


def provenance(kind: str) -> dict[str, Any]:
    """Return a provenance of the usual keys and size."""
    model = {
        **{name: key(kind, name) for name in ("weights", "base_weights", "tokenizer", "template")},
        **{
            "name": "Qwen/Qwen3-1.7B",
            "revision": "0" * 40,
            "n_vocab": 151_936,
            "dtype": "bfloat16",
        },
        "stop_ids": [151_643, 151_645],
    }
    backend = {"kind": "hf", "dtype": "bfloat16", "device": "cuda", "torch": "2.13.0"}
    backend |= {"transformers": "5.23.0", "attention": "flash", "batch_tokens": 16_384}
    if kind == "score":
        request = {"selection": "top-p", "teacher_top_p": 0.999, "at_student": True}
        request |= {"teacher_topk_min": 16, "teacher_topk_max": 64}
        return {
            **{"teacher": model, "student": model, "teacher_kind": "teacher", "context": ""},
            **{"request": request, "backend": backend, "token_map": key("map")},
        }
    return {
        "set": PROVENANCE["set"]
        | {"units": 25_000, "student_topk": 16, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        | {"min_p": 0.0, "repetition_penalty": 1.0, "n": 4, "max_new_tokens": 1024, "seed": 7},
        "student": model | PROVENANCE["student"],
        "backend": backend,
    }


def segments(count: int) -> Iterator[Segment]:
    """Yield rollouts and their scores in turn."""
    known = {kind: provenance(kind) for kind in ("rollout", "score")}
    for number in range(count):
        digest = hashlib.sha256(b"object %d" % number).hexdigest()
        is_score, unit = bool(number % 2), number // 2
        kind, layout = ("score", "dedup") if is_score else ("rollout", "student")
        counts = {"N": 64, "P": 20_000 + number % 5000, "E": 300_000 + number % 90_000}
        counts |= {"S": 320_000} if is_score else {"M": 16, "T": 2048, "J": 4096}
        base = hashlib.sha256(b"object %d" % (number - 1)).hexdigest()[:32] if is_score else ""
        yield Segment(
            kind=kind,
            seg_id=digest[:32],
            unit_key=key(number),
            name="qwen3-4b" if is_score else "main",
            base=base,
            tokens_sha256=key("tokens", unit),
            layout=layout,
            profile="default",
            counts=counts,
            size=2_000_000 + number,
            sha256=f"sha256:{digest}",
            version=0 if is_score else unit // 100,
            first=0 if is_score else 16 * unit,
            source=SegmentBody(
                unit={"rollouts": base}
                if is_score
                else {"version": unit // 100, "first": 16 * unit},
                provenance=known[kind],
                entries={name: (64, 1000, key(name)) for name in read_alone(layout)},
                seconds=12.5 if is_score else None,
            ),
        )


def make(path: Path, count: int) -> None:
    """Write a store with the records of `count` segments, and their bundles."""
    store = open_store(path, create=True)
    prev = store.log.prev()
    writer = {"host": "node-17", "pid": 4711, "versions": {"logitcask": "1", "numpy": "2.4.6"}}
    for number, new in enumerate(segments(count)):
        head = {"n": number, "prev": prev, "time": "2026-01-01T00:00:00+00:00", "tags": {}}
        head |= {"adds": [record.encode_add(new)], "deletes": [], "removes": []}
        body = {"commit_id": f"{number:032x}", "writer": writer, "adds": [encode_body(new)]}
        data = record.encode_record(head, body)
        # As `create` does it, without its flushes.
        (path / "log" / record.file_name(number)).write_bytes(data)
        bundles.write(store.storage, number + 1)
        prev = sha256(record.split(data, "")[0])
    for number in range(count):
        if bundles.is_old(number, count):
            (path / "log" / record.file_name(number)).unlink()


def log() -> dict[str, Any]:
    """Measure the commands on a log of many segments, each in processes of their own."""
    with fresh("log") as folder:
        make(folder / "cask", SEGMENTS)
        found = {}
        for what in ("open", "info", "ls", "look", "commit"):
            command = [sys.executable, __file__, str(folder / "cask"), what]
            runs = [
                json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                for _ in range(RUNS)
            ]
            found[what] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    print(json.dumps(found))
    return {
        "segments": SEGMENTS,
        "commands": found,
        "bars": [
            bar(f"{what} at {SEGMENTS} segments: CPU seconds <= {most}", found[what]["seconds"],
                found[what]["seconds"] <= most)
            for what, most in (("open", 1.0), ("info", 2.0), ("ls", 2.0), ("commit", 0.03))
        ] + [
            bar(f"a look with one new segment at {SEGMENTS}: CPU ms <= 20",
                1000 * found["look"]["seconds"], found["look"]["seconds"] <= 0.02),
            bar(f"open at {SEGMENTS} segments: memory <= 200 MB", found["open"]["memory_mb"],
                found["open"]["memory_mb"] <= 200)
        ],
    }  # fmt: skip


def commit(store: Store, number: int, of: dict[str, Any]) -> None:
    """Commit a small unit that is not in the store yet."""
    store.commit_rollouts(
        synthetic_small(number),
        name="main",
        unit_key=key("new", number, time.time_ns()),
        unit={"version": 0, "first": number},
        provenance=of,
    )


class Scorer:
    """A teacher that a plan asks for its abilities alone."""

    capabilities = frozenset({"top", "at_ids", "entropy", "tail"})

    def describe(self) -> dict[str, str]:
        return {"name": "made up", "dtype": "bfloat16"}


def request(store: Store) -> ScoreRequest:
    """Return the request of a teacher that has scored nothing."""
    student: dict[str, Any] = provenance("rollout")["student"]
    teacher = ModelRef(
        name="made up",
        path=Path(),
        revision="",
        digest=key("teacher"),
        tokenizer_digest=student["tokenizer"],
        template_digest=student["template"],
        n_vocab=student["n_vocab"],
        stop_ids=(),
        version=0,
        base_weights=key("teacher"),
    )
    scorer: Any = Scorer()
    return ScoreRequest(store=store, model=teacher, scorer=scorer, teacher_name="other")


def measure(path: str, what: str) -> None:
    """Run one command in this process; print its CPU seconds and its memory."""
    start = time.process_time()
    store = open_store(path)
    snapshot = store.head()
    if what == "info":
        assert summary(store)["segments"] >= SEGMENTS
    elif what == "ls":
        assert len(list_segments(store)) >= SEGMENTS
    elif what == "commit":
        times = []
        for number in range(9):
            start = time.process_time()
            commit(store, number, PROVENANCE)
            times.append(time.process_time() - start)
        start = time.process_time() - sorted(times)[4]
    elif what == "look":
        # As a teacher looks that has half of the store before it, while another process samples.
        planner, other, times = ScorePlanner(request(store), growing=True), open_store(path), []
        missing = len(planner.plan(snapshot).missing)
        for number in range(9):
            commit(other, snapshot.number + number, provenance("rollout"))
            start = time.process_time()
            found = planner.plan(store.head())
            times.append(time.process_time() - start)
            assert len(found.missing) == missing + number + 1
        start = time.process_time() - sorted(times)[4]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": time.process_time() - start, "memory_mb": memory}))


if __name__ == "__main__":
    measure(sys.argv[1], sys.argv[2])
