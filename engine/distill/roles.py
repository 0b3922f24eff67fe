"""Roles of a loop: processes that meet in the store and in the folder of the student's versions.

`rollout` samples rounds by the newest version, `score` scores what is there, `train` trains on
whole rounds in their order and publishes versions. No role holds state: each may be killed and
started again, and any number of processes may sample and score.
"""

import os
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from torch import nn

from logitcask.engine.backends.base import close_backend
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.distill.follow_rows import FollowRows
from logitcask.engine.distill.loop import train_rounds
from logitcask.engine.distill.rounds import ROUND
from logitcask.engine.distill.setup import LoopSetup, open_loop, read_input
from logitcask.engine.distill.teacher.facts import read_facts
from logitcask.engine.distill.teacher.scorer import score_job
from logitcask.engine.distill.timed import Updates, named, timed
from logitcask.engine.distill.versions import loaded, newest_version, read_version
from logitcask.engine.errors import ConfigError
from logitcask.engine.events import Cancelled, CancelToken, EventHandler, warn_once
from logitcask.engine.packing.batches import Packs
from logitcask.engine.rollout.unit import RolloutRequest, RolloutUnit, run_rollout_unit
from logitcask.engine.store import open_store
from logitcask.engine.store.log.claims import forget_claims
from logitcask.engine.training.run import TrainReport
from logitcask.engine.training.run_dir.files import TEACHER, VERSIONS
from logitcask.engine.types import ModelRef, Progress, no_progress
from logitcask.engine.workers.job import Job, WorkPlan, WorkReport
from logitcask.engine.workers.timeline import span
from logitcask.engine.workers.worker import run_worker

Role = Literal["rollout", "score"]


def run_role(
    config: RunConfig,
    role: Role,
    *,
    index: int | None = None,
    stop: threading.Event | None = None,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> WorkReport:
    """Sample or score the rounds of a loop until all of them are done; the same call resumes.

    index: number among the processes of the role on this machine, for one process at a time; None =
    none. stop: ends it after the unit in hand. Raises as `distill` does.
    """
    stop = stop or threading.Event()
    work, file = named(config, role, index)
    try:
        job = open_role(config, role, stop=stop, on_event=on_event, timeline=file)
    except Cancelled:
        return WorkReport(
            units=0, positions=0, seconds=0.0, positions_per_second=0.0, failed=0, first_error=""
        )
    try:
        if index is not None:
            # Of one that was killed: its units need not wait for the end of a lease.
            forget_claims(job.store.storage, work.worker_name)
        return run_worker(
            job, work, stop=stop, progress=progress, on_event=on_event, until_over=True
        )
    finally:
        job.close()


def train_role(
    config: RunConfig,
    *,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> TrainReport:
    """Train on the rounds of a loop that other roles make; the same call resumes.

    Under torchrun every process calls this. Raises as `distill` does.
    """
    _check_role(config, "train")
    if config.lora.load_in_4bit:
        raise ConfigError(
            "lora.load_in_4bit = true with the role train: weights in 4 bits are not published",
            hint="leave it out, or run the loop in one process: --runner inline",
        )
    inputs = read_input(config, on_event)
    said = warn_once(on_event)
    while (facts := read_facts(config.run.out)) is None:
        said(f"waiting for a scorer to write {config.run.out / TEACHER}")
        time.sleep(config.work.poll)

    # Under torchrun one process speaks for all.
    file = named(config, "train", 0)[1] if os.environ.get("RANK", "0") == "0" else None
    updates = Updates(file)

    def packs(loop: LoopSetup, student: nn.Module, width: int) -> Packs:
        return FollowRows(
            loop=loop, student=student, width=width, timeline=updates, on_event=on_event
        )

    return train_rounds(inputs, facts, packs, updates.watched(progress), on_event)


def open_role(
    config: RunConfig,
    role: Role,
    *,
    stop: threading.Event | None = None,
    on_event: EventHandler = lambda line: None,
    timeline: Path | None = None,
) -> Job[Any]:
    """Return the units of a role; it waits in its plans for what other roles provide.

    stop: ends waits for servers. timeline: file for the spans of this process.
    """
    _check_role(config, role)
    on_event = warn_once(on_event)
    if role == "score":
        return score_job(config, CancelToken(on_event, stop), on_event, timeline)
    sampler = _Sampler(config, on_event, timeline)
    job: Job[Any] = Job(
        stage="rollout",
        store=sampler.store,
        plan=sampler.plan,
        work=lambda key, unit, report: run_rollout_unit(unit[0], key, unit[1], report).positions,
        close=sampler.close,
    )

    def place(unit: tuple[RolloutRequest, RolloutUnit]) -> tuple[int, int]:
        request, _ = unit
        assert request.provenance_extra is not None, "the request of a round"
        return int(request.provenance_extra[ROUND]), request.model.version

    return timed(job, timeline, place)


def _check_role(config: RunConfig, role: str) -> None:
    if config.run.overwrite:
        raise ConfigError(
            f"run.overwrite = true with the role {role}: each start would lose the run",
            hint=f"leave it out, and remove {config.run.out} if that run is not needed",
        )


class _Sampler:
    """The newest version of the student, and the units that it may sample."""

    def __init__(self, config: RunConfig, on_event: EventHandler, timeline: Path | None) -> None:
        self._config, self._on_event, self._timeline = config, on_event, timeline
        self._inputs = read_input(config, on_event)
        self._rounds = self._inputs.rounds()
        self._total = self._inputs.policy.units_total
        self.store = open_store(config.store.url, create=True)
        self._loop: LoopSetup | None = None
        self._model: ModelRef | None = None
        self._sampler: Any = None
        self._requests: dict[int, RolloutRequest] = {}

    def plan(self, left_out: Collection[str]) -> WorkPlan[tuple[RolloutRequest, RolloutUnit]]:
        """Plan the units of all rounds that may begin, the first round before the others."""
        rounds, policy = self._rounds, self._inputs.policy
        rounds.refresh(self.store)
        units: dict[str, tuple[RolloutRequest, RolloutUnit]] = {}
        first: Collection[str] = ()
        for number in self._admitted():
            request, held = self._request(number), rounds.rollouts(number)
            units |= {
                key: (request, unit)
                for key, unit in request.units.items()
                if unit["first"] not in held
            }
            first = first or tuple(units)
        if rounds.unscored_bytes >= policy.max_unscored_bytes:
            self._on_event(
                f"rollouts of loop.max_unscored_bytes = {policy.max_unscored_bytes} bytes wait for "
                "scores: no unit is begun until they are fewer"
            )
        return WorkPlan(
            units=units,
            first=first,
            done=rounds.units_sampled,
            total=self._total,
            may_shrink=self._inputs.may_resample(),
        )

    def close(self) -> None:
        """Close the backend of the loaded version."""
        close_backend(self._released())

    def _released(self) -> Any:
        """Return the backend, which belongs to the caller then."""
        sampler, self._model, self._sampler = self._sampler, None, None
        return sampler

    def _admitted(self) -> list[int]:
        """Return the rounds that may begin now, with the newest version loaded if there are any."""
        out, first = self._config.run.out, self._inputs.model
        if self._loop is None:
            if (facts := read_facts(out)) is None:
                self._on_event(f"waiting for a scorer to write {out / TEACHER}")
                return []
            self._loop = open_loop(self._inputs, facts, self.store)
        newest = newest_version(out, first)
        if newest is None:
            self._on_event(f"waiting for the trainer's first version in {out / VERSIONS}")
            return []
        policy, rounds = self._inputs.policy, self._rounds
        admitted = list(policy.admitted(rounds, newest.version, rounds.sampled))
        return admitted if admitted and self._load(newest) else []

    def _request(self, number: int) -> RolloutRequest:
        assert self._loop is not None, "a round is admitted"
        assert self._model is not None, "a version is loaded"
        if number not in self._requests:
            self._requests[number] = self._loop.rollout_request(self._sampler, self._model, number)
        return self._requests[number]

    def _load(self, newest: ModelRef) -> bool:
        """Load a version; return False where it was removed meanwhile."""
        if self._model == newest:
            return True
        self._requests.clear()
        run, out, first = self._config.run, self._config.run.out, self._inputs.model
        if run.backend == "server":  # that of the teacher
            run = run.model_copy(update={"backend": "auto"})
        with span(self._timeline, "load", version=newest.version):
            self._sampler = loaded(
                self._released(),
                newest,
                run,
                self._on_event,
                still=lambda: read_version(out, first, newest.version) == newest,
            )
        if self._sampler is None:
            return False
        self._model = newest
        return True
