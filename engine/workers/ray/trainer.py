"""The actor that trains: one process in a placement group, started again when it is lost."""

from collections.abc import Callable, Mapping
from typing import Any

from logitcask.engine.errors import LogitcaskError, ProcessError
from logitcask.engine.events import EventHandler
from logitcask.engine.types import NO_DETAIL, Detail, Progress
from logitcask.engine.workers.ray.actors import enter, node
from logitcask.engine.workers.ray.cluster import options_of, reason

Train = Callable[[Progress, EventHandler], Any]
"""Trains and returns the report; called again after a kill, it resumes."""
Counts = tuple[str, int, int, Detail]
"""Arguments of a Progress."""


class TrainActor:
    """Trains in one call, and says meanwhile in others how far it is."""

    def __init__(self, folder: str) -> None:
        enter(folder)
        self._events: list[str] = []
        self._counts: dict[str, Counts] = {}

    def train(self, run: Train) -> Any:
        """Return the report, or the error of ours that it raised."""

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
    """The actor that trains, as its driver sees it."""

    def __init__(
        self,
        ray: Any,
        run: Train,
        resources: Mapping[str, float],
        restarts: int,
        folder: str,
        on_event: EventHandler,
        progress: Progress,
    ) -> None:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._ray, self._on_event, self._progress = ray, on_event, progress
        bundle = {name: value for name, value in resources.items() if value}
        self._group = placement_group([bundle], strategy="STRICT_PACK")
        # A retried call trains from the newest checkpoint, so Ray may repeat it.
        self._handle = (
            ray.remote(TrainActor)
            .options(
                max_restarts=restarts,
                max_task_retries=restarts,
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, 0),
                **options_of(resources),
            )
            .remote(folder)
        )
        self.call = self._handle.train.remote(run)
        self._news = self._handle.news.remote()
        self._node = ""

    def pass_on(self) -> None:
        """Pass on what the actor said since the last call."""
        from ray.exceptions import RayActorError

        if not self._ray.wait([self._news], timeout=0)[0]:
            return
        try:
            where, events, counts = self._ray.get(self._news)
        except RayActorError:
            return  # `result` raises it
        if where != self._node:
            self._on_event(f"train runs on {where}")
            self._node = where
        for line in events:
            self._on_event(f"train: {line}")
        for each in counts:
            self._progress(*each)
        self._news = self._handle.news.remote()

    def result(self) -> Any:
        """Return the report of the training.

        Raises its error, and ProcessError where it died too often, or of an error that is not ours.
        """
        from ray.exceptions import RayActorError, RayTaskError

        try:
            report = self._ray.get(self.call)
        except (RayActorError, RayTaskError) as error:
            raise ProcessError(
                f"the actor that trains died: {reason(error)}",
                hint="read the logs of Ray, then run the same command again: it resumes",
            ) from error
        self._ray.wait([self._news], timeout=1.0)
        self.pass_on()
        if isinstance(report, LogitcaskError):
            raise report
        return report

    def close(self) -> None:
        """Kill the actor, and give its resources back."""
        from ray.util.placement_group import remove_placement_group

        self._ray.kill(self._handle, no_restart=True)
        remove_placement_group(self._group)
