"""The actors of one stage, and the calls that they have in flight.

A pool decides nothing about the work: each actor plans, claims and commits for itself. What the
pool holds is which calls are out. An actor whose process or node is lost is started again by Ray; a
lost call is not repeated, and the claims of its actor are removed, so that others take its unit.
"""

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from logitcask.engine.config.runner import Work
from logitcask.engine.errors import ProcessError
from logitcask.engine.events import EventHandler
from logitcask.engine.store import holds_store, open_store
from logitcask.engine.store.log.claims import forget_claims
from logitcask.engine.workers.job import Receipt
from logitcask.engine.workers.ray.actors import Answer, OpenJob, UnitActor
from logitcask.engine.workers.ray.cluster import are_free, options_of, reason

IN_FLIGHT = 2
"""Calls of one actor at most: the next unit begins without a word from the driver."""
GROW_S = 5.0
"""Seconds between two looks for the resources of one more actor."""
DEATH_S = 1.0
"""Seconds in which a killed process ends; a claim that comes later waits for its lease."""
RETRY_S = 1.0
"""Seconds between two calls of an actor that does not live."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """A stage, and what its actors may use."""

    name: str
    open_job: OpenJob
    store: str
    work: Work
    resources: Mapping[str, float]
    """Of one actor."""
    actors: int
    """Actors that are started at once."""
    most: int
    """Actors while the cluster has free resources."""
    restarts: int
    """Restarts of one actor, in all."""


@dataclass(eq=False)
class _Actor:
    name: str
    handle: Any
    calls: list[Any] = field(default_factory=list)
    """Oldest first."""
    rests_until: float = 0.0
    ready: bool = False
    """True from its first answer to its death."""


class Pool:
    """The actors of a role."""

    def __init__(self, ray: Any, role: Role, run: str, folder: str, on_event: EventHandler) -> None:
        """run: name of this driver, in the claims of its actors."""
        self.role = role
        self.left_out = self.total = 0
        self.first_error = ""
        self.done = self.done_before = -1
        """Units committed as of the newest plan, and of the first; -1 before it."""
        self.over = False
        self.peak_memory: dict[str, int] = {}
        """The largest of all actors."""
        self._ray, self._run, self._folder, self._on_event = ray, run, folder, on_event
        self._numbers, self._said = itertools.count(), set[str]()
        self._actors: list[_Actor] = []
        self._grow_at_s = time.monotonic() + GROW_S
        for _ in range(role.actors):
            self._start()

    @property
    def calls(self) -> list[Any]:
        """Return the calls in flight."""
        return [call for actor in self._actors for call in actor.calls]

    def step(self) -> None:
        """Call the actors that may have one more call, and start one more actor if it has room."""
        now_s = time.monotonic()
        for actor in self._actors:
            while len(actor.calls) < IN_FLIGHT and now_s >= actor.rests_until:
                actor.calls.append(actor.handle.do_one.remote())
        if now_s < self._grow_at_s:
            return
        self._grow_at_s = now_s + GROW_S
        role, all_ready = self.role, all(actor.ready for actor in self._actors)
        if len(self._actors) < role.most and all_ready and are_free(self._ray, role.resources):
            self._start()

    def take(self, call: Any) -> None:
        """Read the answer to a call, and whether its actor lives.

        Raises the error that an actor returned, and ProcessError for an actor that died too often,
        or failed outside of a unit.
        """
        from ray.exceptions import (
            ActorUnavailableError,
            RayActorError,
            RayTaskError,
            TaskCancelledError,
        )

        actor = next((each for each in self._actors if call in each.calls), None)
        if actor is None:
            return  # the second call of an actor that is gone
        actor.calls.remove(call)
        try:
            answer: Answer = self._ray.get(call)
        except TaskCancelledError:
            return
        except ActorUnavailableError:
            self._bury(actor)
            return
        except (RayActorError, RayTaskError) as error:
            dead = isinstance(error, RayActorError)
            how = f"died after {self.role.restarts} restarts" if dead else "failed outside a unit"
            raise ProcessError(
                f"{actor.name} {how}: {reason(error)}",
                hint="read the logs of Ray, then run the same command again: it resumes",
            ) from error
        actor.ready = True
        # Each actor has the same notes on the same models.
        for line in dict.fromkeys(answer.events):
            if line not in self._said:
                self._said.add(line)
                self._on_event(f"{actor.name}: {line}")
        for kind, size in answer.peak_memory_bytes.items():
            self.peak_memory[kind] = max(size, self.peak_memory.get(kind, 0))
        if answer.error is not None:
            raise answer.error
        assert answer.receipt is not None
        self._count(answer.receipt)
        if not answer.receipt.claimed:
            actor.rests_until = time.monotonic() + self.role.work.poll

    def finish(self, wait_s: float) -> None:
        """Let the actors end their unit within `wait_s` seconds, and kill them.

        Raises as `take` does.
        """
        running = [actor.calls[0] for actor in self._actors if actor.ready and actor.calls]
        for actor in self._actors:
            for call in actor.calls:
                # Only calls that wait can be cancelled; those of the model that loads too.
                if call not in running:
                    self._ray.cancel(call)
        if running:
            for call in self._ray.wait(running, num_returns=len(running), timeout=wait_s)[0]:
                self.take(call)
        self.kill()

    def kill(self) -> None:
        """Kill the actors, and remove the claims that they held."""
        for actor in self._actors:
            self._ray.kill(actor.handle, no_restart=True)
        busy = [actor for actor in self._actors if actor.calls]
        calls = [call for actor in busy for call in actor.calls]
        if calls:
            # Ray does not wait for the end of a process, which may claim a unit until then.
            self._ray.wait(calls, num_returns=len(calls), timeout=DEATH_S)
            time.sleep(DEATH_S)
        for actor in busy:
            self._forget(actor)
        self._actors.clear()

    def _start(self) -> None:
        role = self.role
        name = f"{role.name}-{next(self._numbers)}"
        work = role.work.model_copy(update={"worker_name": f"{self._run}-{name}"})
        # A lost call may have done its unit: only the store knows, so it is not repeated.
        handle = (
            self._ray.remote(UnitActor)
            .options(max_restarts=role.restarts, max_task_retries=0, **options_of(role.resources))
            .remote(role.open_job, work, self._folder)
        )
        self._actors.append(_Actor(name, handle))

    def _count(self, receipt: Receipt) -> None:
        if receipt.left_out > self.left_out:
            self.left_out, self.first_error = receipt.left_out, receipt.first_error
        self.done = max(self.done, receipt.done)
        self.total = receipt.total
        if self.done_before < 0 or receipt.done < self.done_before:
            self.done_before = receipt.done
        self.over = self.over or receipt.over

    def _bury(self, actor: _Actor) -> None:
        """Remove the claims of an actor that died; Ray starts it again where it finds room."""
        # Calls fail until it lives again.
        actor.rests_until = time.monotonic() + RETRY_S
        if not actor.ready:
            return
        actor.ready = False
        self._forget(actor)
        living = sum(each.ready for each in self._actors)
        if living >= self.role.actors:
            self._ray.kill(actor.handle, no_restart=True)
            self._actors.remove(actor)
            self._on_event(f"{actor.name} is lost: {living} are left")
        else:
            self._on_event(f"{actor.name} is lost: Ray starts it again where it has room")

    def _forget(self, actor: _Actor) -> None:
        if holds_store(self.role.store):
            forget_claims(open_store(self.role.store).storage, f"{self._run}-{actor.name}")
