"""Workers that kill and stop themselves: `python fleet.py STORE LOG --units N ...`.

Each worker is a process of its own, forked when only imports were done, and started again when it
was killed. A unit is a small commit and lines in LOG: what happened, its key, and to which worker.
Prints how each life ended (-9 = killed).

With --hangs, the units come in as many lots, and in each lot the first who does a certain unit
sends itself SIGSTOP there, which stops its heartbeat too. Nobody wakes it but the one who has taken
the unit over, which is after the lease; that one holds on to the unit until the sleeper has given
it up, and looks whether its own claim is still there.
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
from logitcask.engine.config.teacher import Work
from logitcask.engine.store import Store, open_store
from logitcask.engine.workers.worker import WorkPlan, run_worker
from tests.engine.store.made import commit_rollouts, key

LIFE_S = 120
"""A worker that lives longer waits for what never comes, and ends with SIGALRM."""
HANGS = ("before", "publish", "slow")
"""Where the sleeper of each lot stops: before its commit; in it, with all files in place and no
record; and before it again, to be woken before the other has committed."""


class Worker:
    """One life of a worker."""

    def __init__(self, args: argparse.Namespace, lane: int, life: int) -> None:
        self.args, self.life = args, life
        self.name = f"lane{lane}-{life}"
        self.store: Store = open_store(args.store)
        self.units = [key("fleet", n) for n in range(args.units)]
        self.chance = random.Random(f"{args.seed} {self.name}")
        self.done = 0
        self.slept = ""
        """The unit that it slept in, until it has given it up."""
        chosen, lot = random.Random(args.seed), args.units // max(1, args.hangs)
        self.lots = [self.units[n : n + lot] for n in range(0, args.units, lot)]
        pairs = zip(self.lots, HANGS[: args.hangs], strict=False)
        self.hangs = {chosen.choice(units): moment for units, moment in pairs}

    def live(self) -> None:
        signal.alarm(LIFE_S)
        settings = Work(worker_name=self.name, lease_seconds=1.5, poll=0.05, idle_exit=0.05)
        never = threading.Event()
        run_worker(self.store, self.plan, self.work, settings=settings, stage="fleet", stop=never)

    def plan(self, given_up: Collection[str]) -> WorkPlan[int]:
        if self.slept:
            self.at(self.slept, "gone on").touch()
            self.slept = ""
        there = self.store.head().unit_keys()
        left = next((lot for lot in self.lots if not there.issuperset(lot)), [])
        units = {unit: self.units.index(unit) for unit in left if unit not in there}
        return WorkPlan(units=units, done=len(there), total=len(self.units))

    def work(self, unit: str, seed: int) -> int:
        self.done += 1
        self.say("begun", unit)
        self.die("before")
        sleeper = self.at(unit, "asleep")
        taken_over = sleeper.exists()
        if taken_over and self.hangs[unit] == "slow":
            self.wake(unit)
        self.hang(unit, "before", "slow")
        made = self.commit(unit, seed)
        self.say("committed" if made.unit["worker"] == self.name else "suppressed", unit)
        if taken_over and self.hangs[unit] != "slow":
            self.wake(unit)
        self.die("after")
        return int(made.counts["P"])

    def commit(self, unit: str, seed: int) -> Any:
        append: Callable[..., Any] = commit.append

        def appended(*arguments: Any) -> Any:
            self.hang(unit, "publish")
            return append(*arguments)

        commit.append = appended
        try:
            inputs = {"version": 0, "first": seed, "worker": self.name}
            return commit_rollouts(self.store, seed, unit, unit=inputs)
        finally:
            commit.append = append

    def die(self, moment: str) -> None:
        second = self.args.kill_second == moment and self.life < self.args.lives and self.done == 2
        if second or (moment == "before" and self.chance.random() < self.args.kill_share):
            os.kill(os.getpid(), signal.SIGKILL)

    def hang(self, unit: str, *moments: str) -> None:
        if self.hangs.get(unit) not in moments or self.at(unit, "asleep").exists():
            return
        self.slept = unit
        self.say("asleep", unit)
        self.at(unit, "asleep").write_text(str(os.getpid()))
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    def wake(self, unit: str) -> None:
        while not self.at(unit, "gone on").exists():
            os.kill(int(self.at(unit, "asleep").read_text()), signal.SIGCONT)
            time.sleep(0.01)
        claims = self.store.storage.names("claims")
        if any(name.startswith(unit.removeprefix("sha256:")) for name in claims):
            self.say("claimed still", unit)

    def at(self, unit: str, what: str) -> Path:
        return Path(f"{self.args.log}.{unit.removeprefix('sha256:')}.{what}")

    def say(self, what: str, unit: str) -> None:
        with open(self.args.log, "a") as file:
            file.write(f"{what}\t{unit}\t{self.name}\n")


def start(args: argparse.Namespace, lane: int, life: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        Worker(args, lane, life).live()
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
    parser.add_argument("--lives", type=int, default=0)
    parser.add_argument("--hangs", type=int, default=0, choices=range(len(HANGS) + 1))
    args = parser.parse_args()
    running = {start(args, lane, 0): (lane, 0) for lane in range(args.workers)}
    try:
        while running:
            child, status = os.wait()
            lane, life = running.pop(child)
            code = os.waitstatus_to_exitcode(status)
            print(code, flush=True)
            if code == -signal.SIGKILL:
                running[start(args, lane, life + 1)] = (lane, life + 1)
            elif code:
                sys.exit(f"a worker ended with {code}")
    finally:
        for child in running:
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
