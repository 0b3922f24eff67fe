"""A worker process that shares a store with others: `python worker.py KIND STORE NUMBER...`.

  write STORE WRITER COUNT    commit COUNT units, skipping those in the log, as a resumed job does;
                              print unit_key and seg_id of each after its commit
  race STORE COUNT            compete with other processes for COUNT units, from one moment on
  churn STORE ROUNDS          commit, delete and collect for ROUNDS rounds, and on until the file
                              `stop` is next to the store
  read STORE COUNT            read COUNT snapshots twice: both must be the same

It prints `ready` after its imports.
"""

import hashlib
import sys
import time
from pathlib import Path

from logitcask.engine.errors import StoreError
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.retention import delete, gc
from tests.engine.store.made import commit_rollouts, commit_scores, key


def write(store: Store, writer: int, count: int) -> None:
    done = store.head().unit_keys()
    for number in range(count):
        unit_key = key(writer, number)
        if unit_key not in done:
            segment = commit_rollouts(store, writer * 1000 + number, unit_key)
            print(unit_key, segment.seg_id, flush=True)


def race(store: Store, count: int) -> None:
    time.sleep(2 - time.time() % 2)  # all processes begin at the same even second
    for number in range(count):
        segment = commit_rollouts(store, time.time_ns() % 100_000, key("race", number))
        print(key("race", number), segment.seg_id, flush=True)


def churn(store: Store, rounds: int) -> None:
    stop, seed, removed = Path(store.url).with_name("stop"), 0, 0
    while seed < rounds or not stop.exists():
        seed += 1
        base = commit_rollouts(store, seed, student=True)
        commit_scores(store, base, seed)
        commit_rollouts(store, seed + 500_000, key("old", seed), name="old")
        if seed % 3 == 0:
            delete(store, rollouts="old")
            removed += gc(store, keep_days=0, lease_hours=1).segments
    print(seed, removed, flush=True)


def read(store: Store, count: int) -> None:
    snapshots, gone = 0, 0
    while snapshots < count:
        snapshot = store.head()
        first = content(store, snapshot.number)
        if first is None:
            gone += 1
            continue
        kept = {s.seg_id for s in store.head().segments}
        again = content(store, snapshot.number, only=kept) or {}
        assert all(first[name] == digest for name, digest in again.items())
        snapshots += 1
    print(snapshots, gone, flush=True)


def content(store: Store, number: int, only: set[str] | None = None) -> dict[str, str] | None:
    """Return seg_id -> digest of the decoded data, of the newest few segments of a snapshot.

    None where gc removed a deleted segment meanwhile; no other error is hidden.
    """
    found = {}
    for segment in store.snapshot(number).segments[-12:]:
        if only is not None and segment.seg_id not in only:
            continue
        try:
            if segment.kind == "rollout":
                array = store.read_rollouts(segment).b_lp
            else:
                array = store.read_scores((segment,)).entry_lp
        except StoreError as error:
            if "was deleted, and gc has removed it" in error.cause:
                return None
            raise
        found[segment.seg_id] = hashlib.sha256(array.tobytes()).hexdigest()
    return found


WORKERS = {"write": write, "race": race, "churn": churn, "read": read}

if __name__ == "__main__":
    opened = open_store(sys.argv[2], create=True)
    print("ready", flush=True)
    WORKERS[sys.argv[1]](opened, *map(int, sys.argv[3:]))
