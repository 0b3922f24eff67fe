"""The actors that train: processes in a placement group, all started again when one is lost."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from logitcask.engine.errors import LogitcaskError, ProcessError
from logitcask.engine.events import EventHandler
from logitcask.engine.types import NO_DETAIL, Detail, Progress
from logitcask.engine.workers.processes import free_port
from logitcask.engine.workers.ray.actors import enter, node
from logitcask.engine.workers.ray.cluster import options_of, reason

Train = Callable[[Progress, EventHandler], Any]
"""Trains and returns the report; called again after a kill, it resumes."""
Counts = tuple[str, int, int, Detail]
"""Arguments of a Progress."""
Address = tuple[str, int]
"""Host and port at which the processes of a group meet."""
DEATH_S = 10.0
"""Seconds in which the death is noticed that made another process of the group fail."""


class TrainActor:
    """Trains in one call, and says meanwhile in others how far it is."""

    def __init__(self, folder: str) -> None:
        enter(folder)
        self._events: list[str] = []
        self._counts: dict[str, Counts] = {}

    def address(self) -> Address:
        """Return an address of this process that others of the cluster reach."""
        import ray

        util: Any = ray.util
        return str(util.get_node_ip_address()), free_port("")

    def train(self, run: Train, rank: int, ranks: int, at: Address | None) -> Any:
        """Return the report, or the error of ours that it raised.

        ranks: of the group, which meets at an address.
        """
        if at is not None:
            # Ray gives each process its own GPUs, so each is the only one of its machine.
            os.environ |= {
                **{"RANK": str(rank), "WORLD_SIZE": str(ranks)},
                **{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
                **{"MASTER_ADDR": at[0], "MASTER_PORT": str(at[1])},
            }

        def progress(stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
            self._counts[stage] = (stage, done, total, detail)

        try:
            return run(progress, self._events.append)
        except LogitcaskError as error:
            return error

    def news(self) -> tuple[str, list[str], list[Counts]]:
        """Return the process, and its lines and counts since the last call."""
        events, self._events[:] = list(self._events), []
        counts = [self._counts.pop(stage) for stage in list(self._counts)]
        return node(), events, counts


class Trainer:
    """The actors that train, as their driver sees them. The first one speaks for all."""

    def __init__(
        self,
        ray: Any,
        run: Train,
        resources: Mapping[str, float],
        *,
        ranks: int,
        restarts: int,
        folder: str,
        on_event: EventHandler,
        progress: Progress,
    ) -> None:
        """Start the actors; resources: of each of them, ranks: their number."""
        from ray.util.placement_group import placement_group

        self._ray, self._on_event, self._progress = ray, on_event, progress
        self._run, self._resources, self._folder = run, resources, folder
        self._ranks, self._restarts, self._deaths = ranks, restarts, 0
        self._nodes = [""] * ranks
        bundle = {name: value for name, value in resources.items() if value}
        self._group = placement_group([bundle] * ranks, strategy="PACK")
        self._start()

    def _start(self) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._handles = [
            self._ray.remote(TrainActor)
            .options(
                # One alone would wait for the others for ever.
                max_restarts=0,
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, rank),
                **options_of(self._resources),
            )
            .remote(self._folder)
            for rank in range(self._ranks)
        ]
        at = self._handles[0].address.remote() if self._ranks > 1 else None
        self._calls = [
            each.train.remote(self._run, rank, self._ranks, at)
            for rank, each in enumerate(self._handles)
        ]
        self._news = {each.news.remote(): rank for rank, each in enumerate(self._handles)}

    @property
    def running(self) -> list[Any]:
        """Return the calls that have not ended."""
        calls: list[Any] = self._ray.wait(self._calls, num_returns=self._ranks, timeout=0)[1]
        return calls

    def step(self) -> bool:
        """Pass on the news, and start all actors again where one has died.

        Return True at the end of the training. Raises its error, and ProcessError where it died too
        often, or of an error that is not ours.
        """
        from ray.exceptions import RayActorError, RayError, RayTaskError

        self._pass_on()
        ended = self._ended()
        if any(isinstance(each, Exception) for each in ended):
            # The death of one makes others end with an error.
            self._ray.wait(self._calls, num_returns=self._ranks, timeout=DEATH_S)
            ended = self._ended()
        if died := [
            each
            for each in ended
            if isinstance(each, RayActorError)
            or (isinstance(each, RayError) and not isinstance(each, RayTaskError))
        ]:
            self._again(died[0])
            return False
        for each in ended:
            if isinstance(each, LogitcaskError):
                self._pass_on()
                raise each
            if isinstance(each, RayTaskError):
                raise ProcessError(
                    f"an actor that trains failed: {reason(each)}",
                    hint="read the logs of Ray, then run the same command again: it resumes",
                ) from each
        return len(ended) == self._ranks

    def _ended(self) -> list[Any]:
        """Return the results of the calls that have ended: reports and errors, by rank."""
        from ray.exceptions import RayError

        running, found = set(self.running), list[Any]()
        for call in self._calls:
            if call not in running:
                try:
                    found.append(self._ray.get(call))
                except RayError as error:
                    found.append(error)
        return found

    def _again(self, death: Exception) -> None:
        """Start all actors again. Raises ProcessError where one died too often."""
        self._deaths += 1
        if self._deaths > self._restarts:
            raise ProcessError(
                f"an actor that trains died {self._deaths} times: {reason(death)}",
                hint="read the logs of Ray, then run the same command again: it resumes",
            ) from death
        self._on_event(
            f"train died: {reason(death)}: restart {self._deaths} of {self._restarts}, from the "
            "newest checkpoint"
        )
        self._kill()
        # The lock of the folder is free when all have ended.
        self._ray.wait(self._calls, num_returns=self._ranks, timeout=DEATH_S)
        self._start()

    def _pass_on(self) -> None:
        """Pass on what the first actor said since the last call, and where each of them runs."""
        from ray.exceptions import RayActorError

        for call in self._ray.wait([*self._news], num_returns=len(self._news), timeout=0)[0]:
            rank = self._news.pop(call)
            try:
                where, events, counts = self._ray.get(call)
            except RayActorError:
                continue  # `step` finds it
            if where != self._nodes[rank]:
                name = f"train-{rank}" if self._ranks > 1 else "train"
                self._on_event(f"{name} runs on {where}")
                self._nodes[rank] = where
            if rank:
                continue
            for line in events:
                self._on_event(f"train: {line}")
            for each in counts:
                self._progress(*each)
            self._news[self._handles[0].news.remote()] = 0

    def result(self) -> Any:
        """Return the report of the training, after its end."""
        self._ray.wait([*self._news], timeout=1.0)
        self._pass_on()
        return self._ray.get(self._calls[0])

    def close(self) -> None:
        """Kill the actors, and give their resources back."""
        from ray.util.placement_group import remove_placement_group

        self._kill()
        remove_placement_group(self._group)

    def _kill(self) -> None:
        for each in self._handles:
            self._ray.kill(each, no_restart=True)
