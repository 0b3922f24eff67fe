"""Workers that kill themselves: `python fleet.py STORE BEGUN --units N ...`.

Each worker is a process of its own, forked when only imports were done, and started again when it
was killed. A unit is a line in BEGUN and a small commit. Prints how each life ended (-9 = killed).
"""

import argparse
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Collection

from logitcask.engine.store import open_store
from logitcask.engine.work import Plan, WorkSettings, follow
from tests.engine.store.made import commit_rollouts, key


def live(told: argparse.Namespace, worker: str, life: int) -> None:
    store = open_store(told.store)
    units = [key("fleet", n) for n in range(told.units)]
    chance = random.Random(worker)
    done = 0

    def die(moment: str) -> None:
        second = told.kill_second == moment and life < told.lives and done == 2
        if second or (moment == "before" and chance.random() < told.kill_share):
            os.kill(os.getpid(), signal.SIGKILL)

    def plan(given_up: Collection[str]) -> Plan[int]:
        there = store.head().unit_keys()
        left = {unit: n for n, unit in enumerate(units) if unit not in there}
        return Plan(units=left, done=len(units) - len(left), total=len(units))

    def work(unit: str, seed: int) -> int:
        nonlocal done
        done += 1
        with open(told.begun, "a") as file:
            file.write(unit + "\n")
        die("before")
        positions = commit_rollouts(store, seed, unit).counts["P"]
        die("after")
        return positions

    settings = WorkSettings(worker=worker, lease_s=2.0, poll_s=0.05, idle_s=0.05)
    follow(store, plan, work, settings=settings, stage="fleet", stop=threading.Event())


def start(told: argparse.Namespace, lane: int, life: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        live(told, f"lane{lane}-{life}", life)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("begun")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--units", type=int, required=True)
    parser.add_argument("--kill-share", type=float, default=0.0)
    parser.add_argument("--kill-second", choices=["before", "after"])
    parser.add_argument("--lives", type=int, default=0)
    told = parser.parse_args()
    running = {start(told, lane, 0): (lane, 0) for lane in range(told.workers)}
    while running:
        child, status = os.wait()
        lane, life = running.pop(child)
        code = os.waitstatus_to_exitcode(status)
        print(code, flush=True)
        if code == -signal.SIGKILL:
            running[start(told, lane, life + 1)] = (lane, life + 1)
        elif code:
            sys.exit(f"a worker ended with {code}")


if __name__ == "__main__":
    main()
