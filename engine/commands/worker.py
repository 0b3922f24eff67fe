"""Workers that stay: `rollout --worker` and `score --worker`.

They do the same units as the commands without --worker, by claims, and look again when nothing is
left: for rollouts that appeared meanwhile, or for a new version of the student.
"""

import threading
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from logitcask.engine.backends.base import close_backend, reload_backend
from logitcask.engine.commands.resolve import grader_of, rendering_of, student_and_prompts
from logitcask.engine.commands.rollout import rollout_request
from logitcask.engine.commands.score import score_request
from logitcask.engine.config.runner import Work
from logitcask.engine.config.sections import RolloutConfig, ScoreConfig, StoreSection
from logitcask.engine.errors import ConfigError, IdentityError, ModelError
from logitcask.engine.events import Cancelled, CancelToken, EventHandler, warn_once
from logitcask.engine.models import identity
from logitcask.engine.rollout.plan import RolloutPlanner, Unscored, next_range
from logitcask.engine.rollout.unit import RolloutRequest, RolloutUnit, run_rollout_unit
from logitcask.engine.score.planner import ScorePlanner
from logitcask.engine.score.unit import ScoreUnit, run_score_unit
from logitcask.engine.store import Snapshot, Store, holds_store, open_store
from logitcask.engine.store.format.provenance import PROMPT_RANGE
from logitcask.engine.types import ModelRef, Progress, no_progress
from logitcask.engine.workers.job import Job, WorkPlan, WorkReport
from logitcask.engine.workers.worker import run_worker

_NOTHING: dict[str, Any] = {
    **{"units": 0, "positions": 0, "seconds": 0.0, "positions_per_second": 0.0},
    **{"failed": 0, "first_error": ""},
}


def watch_scores(
    config: ScoreConfig,
    *,
    stop: threading.Event,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> WorkReport:
    """Score what appears; wait for the store, for rollouts and for the teacher's servers.

    Raises as `run_score` does, and ConfigError for what has a meaning only when all rollouts are
    there.
    """
    if config.score.prompt_template is not None:
        raise ConfigError(
            "watch with prompt_template, which is about all rollouts at once",
            hint="leave --worker out and score when they are all there; --context FILE can watch",
        )
    if (opened := _awaited(config.store, config.work, stop, on_event)) is None:
        return WorkReport(**_NOTHING)
    try:
        job = score_job(config, *opened, CancelToken(on_event, stop), on_event, growing=True)
    except Cancelled:
        return WorkReport(**_NOTHING)
    return _run(job, config.work, stop, progress, on_event)


def watch_rollouts(
    config: RolloutConfig,
    *,
    stop: threading.Event,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> WorkReport:
    """Sample what is missing, version after version; prompts are checked before weights load.

    Raises as `run_rollout` does, and IdentityError where the student's folder comes to hold another
    model than a later version of the same.
    """
    return _run(rollout_job(config, on_event), config.work, stop, progress, on_event)


def score_job(
    config: ScoreConfig,
    store: Store,
    snapshot: Snapshot,
    cancel: CancelToken,
    on_event: EventHandler,
    *,
    growing: bool,
) -> Job[ScoreUnit]:
    """Load the teacher for the scores that are missing; growing: as of `plan_scores`."""
    request = score_request(config, store, snapshot, cancel)
    said = warn_once(on_event)

    def plan(left_out: Collection[str]) -> WorkPlan[ScoreUnit]:
        found = planner.plan(store.head())
        for note in found.notes:
            said(note)
        return WorkPlan(
            units=found.missing, done=found.total - len(found.missing), total=found.total
        )

    try:
        provenance, planner = request.provenance(), ScorePlanner(request, growing=growing)
    except BaseException:
        close_backend(request.scorer)
        raise
    return Job(
        stage="score",
        store=store,
        plan=plan,
        work=lambda key, unit, report: run_score_unit(request, key, unit, provenance, report),
        close=lambda: close_backend(request.scorer),
    )


def rollout_job(config: RolloutConfig, on_event: EventHandler) -> Job[RolloutUnit]:
    """Load the student for the rollouts of its versions that are missing."""
    students = _Students(config, on_event)
    return Job(
        stage="rollout",
        store=students.store,
        plan=students.plan,
        work=lambda key, unit, report: (
            run_rollout_unit(students.now(), key, unit, report).positions
        ),
        close=students.close,
    )


def _run(
    job: Job[Any],
    work: Work,
    stop: threading.Event,
    progress: Progress,
    on_event: EventHandler,
) -> WorkReport:
    try:
        return run_worker(job, work, stop=stop, progress=progress, on_event=on_event)
    finally:
        job.close()


class _Students:
    """The versions of the student in its folder, and the units to sample from each."""

    def __init__(self, config: RolloutConfig, on_event: EventHandler) -> None:
        self._config, self._on_event, self._said = config, on_event, warn_once(on_event)
        self._model, self._prompts, self._rendering = student_and_prompts(
            config.student, config.prompts, config.rollout, on_event
        )
        self._grader = grader_of(config.rollout, self._model, self._prompts)
        self._per_version, prompts = config.work.prompts_per_version, len(self._prompts)
        if self._per_version > prompts:
            raise ConfigError(
                f"work.prompts_per_version = {self._per_version}: the file has {prompts} prompts",
                hint=f"give at most {prompts}, or 0 for all prompts of each version",
            )
        self._request: RolloutRequest | None = self._load(self._model)
        self._planner = RolloutPlanner(self._request)
        self._unscored = Unscored(config.store.rollouts)
        self.store = self._request.store
        self._odd = ""
        """Fault of the folder when it was last read: a save may be in progress."""

    def close(self) -> None:
        """Close the backend of the loaded student."""
        if self._request is not None:
            close_backend(self._request.sampler)
        self._request = None

    def now(self) -> RolloutRequest:
        assert self._request is not None, "a plan has units of a loaded student"
        return self._request

    def plan(self, left_out: Collection[str]) -> WorkPlan[RolloutUnit]:
        """Plan the missing units of this version, or of a later one where the folder has it.

        All units of this version come first, unless each version has its own part of the prompts.
        """
        snapshot = self.store.head()
        missing = self._missing(snapshot)
        busy = len(missing) > len(missing.keys() & left_out)
        if (not busy or self._is_later()) and self._moved(busy):
            missing = self._missing(snapshot)
        total = 0 if self._request is None else len(self._request.units)
        done = total - len(missing)
        most = self._config.work.max_unscored
        if most and (waiting := self._unscored.count(snapshot)) > most:
            self._said(f"{waiting} units wait for scores, more than {most}: none is begun")
            return WorkPlan(units={}, done=done, total=total)
        return WorkPlan(units=missing, done=done, total=total)

    def _missing(self, snapshot: Snapshot) -> dict[str, RolloutUnit]:
        """Return the units of the loaded version that are missing."""
        if (request := self._request) is None:
            return {}
        if self._per_version:
            first, count = next_range(
                snapshot, request.name, self._model.version, self._per_version, len(self._prompts)
            )
            if (first, count) != (request.first, request.count):
                record = {PROMPT_RANGE: {"first": first, "count": count}}
                request = self._request = replace(
                    request,
                    first=first,
                    count=count,
                    known_digest=request.set_digest,
                    provenance_extra={**(request.provenance_extra or {}), **record},
                )
        if request is not self._planner.request:
            self._planner = RolloutPlanner(request)
        return self._planner.plan(snapshot)

    def _is_later(self) -> bool:
        """Return whether to leave the other units of this version; reads no weights."""
        if not self._per_version:
            return False
        card = identity.read_metadata(self._model.path)
        return card is not None and card["version"] > self._model.version

    def _load(self, model: ModelRef) -> RolloutRequest:
        return rollout_request(
            self._config, model, self._prompts, self._rendering, self._grader, versions=True
        )

    def _moved(self, busy: bool) -> bool:
        """Load a later version if the folder holds one; return True if it did.

        busy: this version has units left, to go on with while a save is in progress.
        """
        try:
            found = self._later()
            if found is None:
                return False
            request = self._loaded_whole(found)
        except (ModelError, IdentityError) as error:
            # A save moves file by file. What is wrong twice in a row is no save.
            if busy and self._request is not None:
                return False
            if self._odd == error.cause:
                raise
            self._odd = error.cause
            return False
        self._odd = ""
        if request is None:
            return False
        self._model, self._request = found, request
        self._on_event(f"student version {found.version} of {found.name}")
        return True

    def _loaded_whole(self, found: ModelRef) -> RolloutRequest | None:
        """Load that version; return None if the folder was saved again meanwhile."""
        request = self._load_version(found)
        whole = False
        try:
            whole = identity.weights_digest(found.path) == found.digest
        finally:
            if not whole:
                close_backend(request.sampler)
        return request if whole else None

    def _load_version(self, found: ModelRef) -> RolloutRequest:
        """Load that version, into the open sampler where its backend can."""
        was, self._request = self._request, None
        if was is not None:
            reloaded = False
            try:
                reloaded = reload_backend(was.sampler, found, self._on_event)
            finally:
                if not reloaded:
                    close_backend(was.sampler)
            if reloaded:
                return replace(was, model=found, known_digest="")
            # Two students need not fit side by side.
            del was
        return self._load(found)

    def _later(self) -> ModelRef | None:
        """Return the student in the folder now; None if it is not later than the last."""
        was, path = self._model, self._model.path
        card, weights = identity.read_metadata(path), identity.weights_digest(path)
        version, base_weights = (0, weights) if card is None else (card["version"], card["root"])
        if self._request is not None and (version, weights) == (was.version, was.digest):
            self._odd = ""
            return None
        if base_weights != was.base_weights or version < was.version:
            raise IdentityError(
                f"{path} held version {was.version} of {was.base_weights}, and now holds version "
                f"{version} of {base_weights}",
                hint="give that student's rollouts a name of their own: --rollouts NAME",
            )
        if version == was.version and weights != was.digest:
            raise IdentityError(
                f"{path} holds other weights than before under the same version {version}",
                hint="let training finish its save, or remove what is no version of this student",
            )
        return identity.model_ref(
            self._config.student.model,
            revision=self._config.student.revision,
            chat_template=self._rendering.chat_template,
            stop_token_ids=self._config.rollout.stop_token_ids,
        )


def _awaited(
    where: StoreSection, work: Work, stop: threading.Event, on_event: EventHandler
) -> tuple[Store, Snapshot] | None:
    """Wait for rollouts of the name in the store; return None if `stop` was set before.

    Raises what `score` would where nothing came within idle_exit.
    """
    begun_s, said = time.monotonic(), warn_once(on_event)
    while not stop.is_set():
        late = work.idle_exit and time.monotonic() - begun_s >= work.idle_exit
        if late or holds_store(where.url):
            store = open_store(where.url)
            snapshot = store.head()
            if snapshot.rollouts(where.rollouts):
                return store, snapshot
            if late:
                rendering_of(snapshot, where.rollouts)
            said(f"waiting for rollouts named {where.rollouts!r} in {where.url}")
        else:
            said(f"waiting for a store at {where.url}")
        stop.wait(work.poll)
    return None
