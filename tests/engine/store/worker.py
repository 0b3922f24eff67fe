"""A process of its own on a store that others use too: `python worker.py KIND STORE NUMBER...`.

  write STORE WRITER COUNT    commits COUNT units of its own, skipping what the log holds, as a
                              resumed job does; prints unit_key and seg_id of each when it returns
  race STORE COUNT            fights for COUNT units with others of its kind, from one moment on
  churn STORE SECONDS         commits, retires and sweeps all the time
  read STORE SECONDS          reads all of a snapshot, and reads it again: it must be the same

It prints `ready` when its imports are done.
"""

import hashlib
import sys
import time

from logitcask.engine.errors import StoreError
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.retention import gc, retire
from tests.engine.store.made import commit_rollouts, commit_scores, key


def write(store: Store, writer: int, count: int) -> None:
    done = store.head().unit_keys()
    for number in range(count):
        unit_key = key(writer, number)
        if unit_key not in done:
            held = commit_rollouts(store, writer * 1000 + number, unit_key)
            print(unit_key, held.seg_id, flush=True)


def race(store: Store, count: int) -> None:
    time.sleep(2 - time.time() % 2)  # all begin at the same even second
    for number in range(count):
        held = commit_rollouts(store, time.time_ns() % 100_000, key("race", number))
        print(key("race", number), held.seg_id, flush=True)


def churn(store: Store, seconds: int) -> None:
    end, seed, removed = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        seed += 1
        base = commit_rollouts(store, seed, student=True)
        commit_scores(store, base, seed)
        commit_rollouts(store, seed + 500_000, key("old", seed), name="old")
        if seed % 3 == 0:
            retire(store, rollouts="old")
            removed += gc(store, keep_days=0, lease_hours=1).segments
    print(seed, removed, flush=True)


def read(store: Store, seconds: int) -> None:
    end, snapshots, gone = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
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
    """seg_id -> digest of what it decodes to, of the pin's newest few segments.

    None where a retired one was removed under us: that is said, and no other error is raised.
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
            if "was retired, and gc has removed it" in error.cause:
                return None
            raise
        found[segment.seg_id] = hashlib.sha256(array.tobytes()).hexdigest()
    return found


WORKERS = {"write": write, "race": race, "churn": churn, "read": read}

if __name__ == "__main__":
    opened = open_store(sys.argv[2], create=True)
    print("ready", flush=True)
    WORKERS[sys.argv[1]](opened, *map(int, sys.argv[3:]))
