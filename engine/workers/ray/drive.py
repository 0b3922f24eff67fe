"""The driver: it calls the actors of all roles until the work is over, and ends them."""

import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from logitcask.engine.events import EventHandler
from logitcask.engine.types import Progress, no_progress
from logitcask.engine.workers.ray.pool import Pool, Role

POLL_S = 0.5
"""Seconds of one wait for answers."""
GRACE_S = 30.0
"""Seconds that actors have for the unit in hand at the end."""


def run_roles(
    ray: Any,
    roles: Sequence[Role],
    *,
    stop: threading.Event,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
    until: Any = None,
) -> list[Pool]:
    """Run the actors of the roles, and return their pools, ended, with what was done.

    It ends when `stop` is set and the units in hand are done, and when nothing is left to do: for
    every role, or with `until`, a call of another actor, when that has its result. Raises as
    `Pool.take` does. Whatever ends it, no actor of the roles lives after it.
    """
    run = f"{socket.gethostname()}-{os.getpid()}"
    pools: list[Pool] = []
    with ExitStack() as stack:
        for role in roles:
            pool = Pool(ray, role, run, os.getcwd(), on_event)
            stack.callback(pool.kill)
            pools.append(pool)
        while not stop.is_set() and (until is not None or not all(p.over for p in pools)):
            _turn(ray, pools, progress, until)
            if until is not None and ray.wait([until], timeout=0)[0]:
                break
        for pool in pools:
            pool.finish(GRACE_S)
    return pools


def _turn(ray: Any, pools: Sequence[Pool], progress: Progress, until: Any) -> None:
    """Call actors, wait for the next answer, and read all that have come."""
    active = [pool for pool in pools if not pool.over]
    for pool in active:
        pool.step()
    owners = {call: pool for pool in active for call in pool.calls}
    others = [until] if until is not None else []
    waiting = [*owners, *others]
    if not waiting:
        time.sleep(POLL_S)
        return
    ray.wait(waiting, timeout=POLL_S)
    for call in ray.wait(list(owners), num_returns=len(owners), timeout=0)[0] if owners else ():
        owners[call].take(call)
    for pool in active:
        if pool.done >= 0:
            progress(pool.role.name, pool.done, pool.total)
        if pool.over:
            pool.finish(GRACE_S)
