"""The runner `ray`: the roles of a loop as actors of a Ray cluster.

Samplers and scorers do one unit for each call; those that train are in a placement group. All of
them meet in the store and in the folder of the run, which every node must see.
"""

import threading
from functools import partial
from pathlib import Path
from typing import Any, Literal

from logitcask.engine.config.sections import RunConfig
from logitcask.engine.distill.roles import open_role, train_role
from logitcask.engine.errors import IncompleteError
from logitcask.engine.events import EventHandler
from logitcask.engine.teachers.remote import is_remote
from logitcask.engine.training.run import TrainReport
from logitcask.engine.types import Progress, no_progress
from logitcask.engine.workers.job import Job
from logitcask.engine.workers.ray.cluster import connected, resources_of
from logitcask.engine.workers.ray.drive import check_room, run_roles
from logitcask.engine.workers.ray.pool import Role
from logitcask.engine.workers.ray.trainer import Trainer


def distill_on_ray(
    config: RunConfig,
    *,
    stop: threading.Event,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> TrainReport:
    """Run the roles of a loop until the training is done; the same call resumes.

    Raises as the roles do, ProcessError for an actor that died too often, and IncompleteError where
    a unit failed too often or `stop` was set before the end.
    """
    runner = config.runner
    with connected(runner.ray_address) as ray:
        device = config.run.device
        needs = {
            "rollout": resources_of(ray, runner.rollout_resources, device),
            "score": resources_of(
                ray,
                runner.score_resources,
                "cpu" if is_remote(config.teacher.model) else device,
            ),
        }
        trains = resources_of(ray, runner.train_resources, device)
        roles = [
            Role(
                name=stage,
                open_job=partial(_open, config, stage),
                store=config.store.url,
                work=config.work,
                resources=needs[stage],
                actors=runner.count(stage),
                most=runner.most_actors(stage),
                restarts=runner.restarts,
            )
            for stage in ("rollout", "score")
        ]
        start = [need for stage, need in needs.items() for _ in range(runner.count(stage))]
        check_room(ray, [*start, *[trains] * runner.ranks], on_event)
        trainer = Trainer(
            ray,
            partial(_train, config),
            trains,
            ranks=runner.ranks,
            restarts=runner.restarts,
            folder=str(Path.cwd()),
            on_event=on_event,
            progress=progress,
        )
        try:
            run_roles(ray, roles, stop=stop, progress=progress, on_event=on_event, trainer=trainer)
            if stop.is_set():
                raise IncompleteError(
                    "SIGTERM came before the end", hint="run the same command again: it resumes"
                )
            report: TrainReport = trainer.result()
        finally:
            trainer.close()
    return report


def _open(config: RunConfig, role: Literal["rollout", "score"], on_event: EventHandler) -> Job[Any]:
    return open_role(config, role, on_event=on_event)


def _train(config: RunConfig, progress: Progress, on_event: EventHandler) -> TrainReport:
    return train_role(config, progress=progress, on_event=on_event)
