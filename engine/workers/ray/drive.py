"""The driver: it calls the actors of all roles until the work is over, and ends them."""

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from logitcask.engine.events import EventHandler
from logitcask.engine.types import Progress, no_progress
from logitcask.engine.workers.ray.pool import Pool, Role
from logitcask.engine.workers.ray.trainer import Trainer
from logitcask.engine.workers.worker import check_failed

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
    trainer: Trainer | None = None,
) -> list[Pool]:
    """Run the actors of the roles, and return their pools, ended, with what was done.

    It ends when `stop` is set and the units in hand are done; when nothing is left to do for any
    role; and with a trainer, when that ends, and not before. Raises as `Pool.take` and
    `Trainer.step` do, and IncompleteError where a unit was left out that the trainer needs.
    Whatever ends it, no actor of the roles lives after it.
    """
    run = f"{socket.gethostname()}-{os.getpid()}"
    with ExitStack() as stack:
        pools = []
        for role in roles:
            pools.append(Pool(ray, role, run, os.getcwd(), on_event))
            stack.callback(pools[-1].kill)
        while not stop.is_set():
            _turn(ray, pools, progress, trainer)
            if trainer is None and all(pool.over for pool in pools):
                break
            if trainer is not None and trainer.step():
                break
        for pool in pools:
            pool.finish(GRACE_S)
    return pools


def check_room(ray: Any, needs: Sequence[dict[str, float]], on_event: EventHandler) -> None:
    """Say so where the cluster has less than all actors of the start need."""
    total: Counter[str] = Counter()
    for each in needs:
        total.update(each)
    has = ray.cluster_resources()
    lacking = [
        f"{name} = {value:g} of {has.get(name, 0.0):g}"
        for name, value in total.items()
        if value > has.get(name, 0.0)
    ]
    if lacking:
        on_event(
            f"the actors need {', '.join(lacking)} in the cluster: some wait for more nodes; "
            "fewer actors, or smaller resources of each, need none"
        )


def _turn(ray: Any, pools: Sequence[Pool], progress: Progress, trainer: Trainer | None) -> None:
    """Call actors, wait for the next answer, and read all that have come."""
    active = [pool for pool in pools if not pool.over]
    for pool in active:
        pool.step()
    owners = {call: pool for pool in active for call in pool.calls}
    waiting = [*owners, *(trainer.running if trainer is not None else ())]
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
            if trainer is not None:
                check_failed(pool.left_out, pool.first_error, pool.role.store)
