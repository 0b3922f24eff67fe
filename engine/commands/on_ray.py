"""`rollout --runner ray` and `score --runner ray`: the units of a command, by actors of a cluster.

The actors plan and commit as the command itself does, and as many as there are nodes for them. The
report is made from the store: a lost actor may have committed a unit before it could answer.
"""

import threading
import time
from collections.abc import Collection
from functools import partial

import numpy as np

from logitcask.engine.backends.base import close_backend
from logitcask.engine.commands.rollout import open_rollout
from logitcask.engine.commands.worker import score_job
from logitcask.engine.config.sections import RolloutConfig, ScoreConfig
from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.events import CancelToken, EventHandler
from logitcask.engine.rollout.plan import RolloutReport, plan_rollouts
from logitcask.engine.rollout.unit import RolloutUnit, run_rollout_unit
from logitcask.engine.score.plan import ScoreReport
from logitcask.engine.score.unit import ScoreUnit
from logitcask.engine.store import Segment, holds_store, open_store
from logitcask.engine.store.inspect import rewards_of, rows_of
from logitcask.engine.teachers.remote import is_remote
from logitcask.engine.types import STOP, Progress, no_progress
from logitcask.engine.workers.job import Job, WorkPlan
from logitcask.engine.workers.ray.actors import OpenJob
from logitcask.engine.workers.ray.cluster import connected, resources_of
from logitcask.engine.workers.ray.drive import check_room, run_roles
from logitcask.engine.workers.ray.pool import Pool, Role
from logitcask.engine.workers.worker import check_failed


def score_on_ray(
    config: ScoreConfig,
    *,
    stop: threading.Event,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> ScoreReport:
    """Score what is missing.

    Raises as `run_score` does, IncompleteError where units failed too often or `stop` was set
    before the end, and ProcessError for actors that die too often.
    """
    begun_s, before = time.monotonic(), _segments(config.store.url)
    pool = _run(config, "score", partial(open_score_job, config), stop, progress, on_event)
    # A unit with extra ids is two segments of one base.
    positions = {
        each.base: rows_of(each)
        for key, each in _segments(config.store.url).items()
        if key not in before and each.kind == "score" and each.name == config.teacher.name
    }
    took_s = time.monotonic() - begun_s
    return ScoreReport(
        units_total=pool.total,
        units_done_before=pool.done_before,
        units_new=pool.total - pool.done_before,
        positions=sum(positions.values()),
        seconds=took_s,
        positions_per_second=sum(positions.values()) / took_s,
        peak_memory_bytes=pool.peak_memory,
        notes=(),
    )


def rollout_on_ray(
    config: RolloutConfig,
    *,
    stop: threading.Event,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> RolloutReport:
    """Sample what is missing; raises as `run_rollout` and `score_on_ray` do."""
    begun_s, before = time.monotonic(), _segments(config.store.url)
    pool = _run(config, "rollout", partial(open_rollout_job, config), stop, progress, on_event)
    store = open_store(config.store.url)
    new = [
        each
        for key, each in _segments(config.store.url).items()
        if key not in before and each.kind == "rollout" and each.name == config.store.rollouts
    ]
    finish = [store.read_arrays(each, ("finish_reason",))["finish_reason"] for each in new]
    rewards = [found for each in new if (found := rewards_of(store, each)) is not None]
    positions, sequences = (sum(each.counts[of] for each in new) for of in ("P", "N"))
    took_s = time.monotonic() - begun_s
    return RolloutReport(
        units_total=pool.total,
        units_done_before=pool.done_before,
        units_new=pool.total - pool.done_before,
        positions=positions,
        sequences=sequences,
        seconds=took_s,
        mean_length=positions / max(1, sequences),
        stopped_share=sum(int((each == STOP).sum()) for each in finish) / max(1, sequences),
        positions_per_second=positions / took_s,
        peak_memory_bytes=pool.peak_memory,
        mean_reward=float(np.concatenate(rewards).mean(dtype=float)) if rewards else None,
    )


def _run(
    config: ScoreConfig | RolloutConfig,
    stage: str,
    open_job: OpenJob,
    stop: threading.Event,
    progress: Progress,
    on_event: EventHandler,
) -> Pool:
    """Run the actors of one stage until nothing is missing."""
    runner, work = config.runner, config.work
    if work.worker:
        raise ConfigError(
            "worker with runner = ray: its actors end when nothing is missing",
            hint="leave --worker out, and run the command again when there is more",
        )
    remote = isinstance(config, ScoreConfig) and is_remote(config.teacher.model)
    device = "cpu" if remote else config.run.device
    with connected(runner.ray_address) as ray:
        needs = resources_of(ray, runner.resources(stage), device)
        check_room(ray, [needs] * runner.count(stage), on_event)
        role = Role(
            name=stage,
            open_job=open_job,
            store=config.store.url,
            work=work,
            resources=needs,
            actors=runner.count(stage),
            most=runner.most_actors(stage),
            restarts=runner.restarts,
        )
        (pool,) = run_roles(ray, [role], stop=stop, progress=progress, on_event=on_event)
    if not pool.over:
        raise IncompleteError(
            "SIGTERM came before the end", hint="run the same command again: it resumes"
        )
    check_failed(pool.left_out, pool.first_error, config.store.url)
    return pool


def _segments(url: str) -> dict[str, Segment]:
    """Return seg_id -> segment; none where there is no store yet."""
    if not holds_store(url):
        return {}
    return {each.seg_id: each for each in open_store(url).head().segments}


def open_score_job(config: ScoreConfig, on_event: EventHandler) -> Job[ScoreUnit]:
    store = open_store(config.store.url)
    cancel = CancelToken(on_event)
    return score_job(config, store, store.head(), cancel, on_event, growing=False)


def open_rollout_job(config: RolloutConfig, on_event: EventHandler) -> Job[RolloutUnit]:
    """Load the student for the rollouts of this version of it."""
    request = open_rollout(config, on_event)
    units = request.units

    def plan(left_out: Collection[str]) -> WorkPlan[RolloutUnit]:
        missing = plan_rollouts(request, request.store.head())
        return WorkPlan(units=missing, done=len(units) - len(missing), total=len(units))

    return Job(
        stage="rollout",
        store=request.store,
        plan=plan,
        work=lambda key, unit, report: run_rollout_unit(request, key, unit, report).positions,
        close=lambda: close_backend(request.sampler),
    )
