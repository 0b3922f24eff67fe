"""Workers that kill and stop themselves: `python worker_pool.py STORE LOG --units N ...`.

Each worker is a separate process, forked directly after the imports, and restarted after a kill. A
unit is a small commit and lines in LOG: event, unit key, worker. Prints the exit code of each
process (-9 = killed).

With --hangs, the units come in this number of batches. In each batch, the first worker on a chosen
unit sends itself SIGSTOP, which stops its heartbeat too. Only the worker that takes the unit over,
after the lease, wakes it. This worker keeps the unit until the stopped one has given it up, and
checks that its own claim still exists.
"""

import argparse
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import logitcask.engine.store.commit as commit
from logitcask.engine.config.runner import Work
from logitcask.engine.store import Store, open_store
from logitcask.engine.types import Report
from logitcask.engine.workers.job import Job, WorkPlan
from logitcask.engine.workers.worker import run_worker
from tests.engine.store.made import commit_rollouts, key

LIFE_S = 120
"""Time limit of a worker, in seconds; then SIGALRM ends it."""
HANGS = ("before", "publish", "slow")
"""The point at which a worker stops, for each batch: before its commit; in it, with all files in
place and no record; before it, and woken before the other worker commits."""


class Worker:
    """A worker process: restart number `restart` of slot `slot`."""

    def __init__(self, args: argparse.Namespace, slot: int, restart: int) -> None:
        self.args, self.restart = args, restart
        self.name = f"lane{slot}-{restart}"
        self.store: Store = open_store(args.store)
        self.units = [key("fleet", n) for n in range(args.units)]
        self.chance = random.Random(f"{args.seed} {self.name}")
        self.done = 0
        self.stopped_in = ""
        """The unit in which it was stopped, until it has given it up."""
        chosen, size = random.Random(args.seed), args.units // max(1, args.hangs)
        self.batches = [self.units[n : n + size] for n in range(0, args.units, size)]
        pairs = zip(self.batches, HANGS[: args.hangs], strict=False)
        self.hangs = {chosen.choice(units): moment for units, moment in pairs}

    def run(self) -> None:
        signal.alarm(LIFE_S)
        settings = Work(worker_name=self.name, lease_seconds=1.5, poll=0.05, idle_exit=0.05)
        never = threading.Event()
        job = Job(stage="fleet", store=self.store, plan=self.plan, work=self.work)
        run_worker(job, settings, stop=never)

    def plan(self, left_out: Collection[str]) -> WorkPlan[int]:
        if self.stopped_in:
            self.marker(self.stopped_in, "resumed").touch()
            self.stopped_in = ""
        done = self.store.head().unit_keys()
        batch = next((each for each in self.batches if not done.issuperset(each)), [])
        units = {unit: self.units.index(unit) for unit in batch if unit not in done}
        return WorkPlan(units=units, done=len(done), total=len(self.units))

    def work(self, unit: str, seed: int, report: Report) -> int:
        self.done += 1
        self.log("started", unit)
        self.kill("before")
        taken_over = self.marker(unit, "stopped").exists()
        if taken_over and self.hangs[unit] == "slow":
            self.wake(unit)
        self.hang(unit, "before", "slow")
        segment = self.commit(unit, seed)
        self.log("committed" if segment.unit["worker"] == self.name else "suppressed", unit)
        if taken_over and self.hangs[unit] != "slow":
            self.wake(unit)
        self.kill("after")
        return int(segment.counts["P"])

    def commit(self, unit: str, seed: int) -> Any:
        publish: Callable[..., Any] = commit.publish_add

        def published(*arguments: Any) -> Any:
            self.hang(unit, "publish")
            return publish(*arguments)

        commit.publish_add = published
        try:
            inputs = {"version": 0, "first": seed, "worker": self.name}
            return commit_rollouts(self.store, seed, unit, unit=inputs)
        finally:
            commit.publish_add = publish

    def kill(self, moment: str) -> None:
        restarts = self.restart < self.args.kills
        second = self.args.kill_second == moment and restarts and self.done == 2
        if second or (moment == "before" and self.chance.random() < self.args.kill_share):
            os.kill(os.getpid(), signal.SIGKILL)

    def hang(self, unit: str, *moments: str) -> None:
        if self.hangs.get(unit) not in moments or self.marker(unit, "stopped").exists():
            return
        self.stopped_in = unit
        self.log("stopped", unit)
        self.marker(unit, "stopped").write_text(str(os.getpid()))
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    def wake(self, unit: str) -> None:
        while not self.marker(unit, "resumed").exists():
            os.kill(int(self.marker(unit, "stopped").read_text()), signal.SIGCONT)
            time.sleep(0.01)
        claim = f"claims/{unit[7:9]}/{unit[9:]}."
        if any(each.name.startswith(claim) for each in self.store.storage.files("claims")):
            self.log("still claimed", unit)

    def marker(self, unit: str, event: str) -> Path:
        return Path(f"{self.args.log}.{unit.removeprefix('sha256:')}.{event}")

    def log(self, event: str, unit: str) -> None:
        with open(self.args.log, "a") as file:
            file.write(f"{event}\t{unit}\t{self.name}\n")


def start(args: argparse.Namespace, slot: int, restart: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        Worker(args, slot, restart).run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("log")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--units", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-share", type=float, default=0.0)
    parser.add_argument("--kill-second", choices=["before", "after"])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--hangs", type=int, default=0, choices=range(len(HANGS) + 1))
    args = parser.parse_args()
    running = {start(args, slot, 0): (slot, 0) for slot in range(args.workers)}
    try:
        while running:
            child, status = os.wait()
            slot, restart = running.pop(child)
            code = os.waitstatus_to_exitcode(status)
            print(code, flush=True)
            if code == -signal.SIGKILL:
                running[start(args, slot, restart + 1)] = (slot, restart + 1)
            elif code:
                sys.exit(f"a worker ended with {code}")
    finally:
        for child in running:
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
