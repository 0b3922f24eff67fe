"""The role `score` of a loop: its units, by a teacher that is fixed or follows the student.

A unit of a teacher that follows belongs to one refresh. A scorer loads it when it begins such a
unit, and takes units of the two oldest refreshes that have any, those of the oldest round first.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from logitcask.engine.backends.base import close_backend
from logitcask.engine.commands.load_teacher import LoadedTeacher
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.distill.setup import LoopSetup, open_loop, read_input
from logitcask.engine.distill.teacher.facts import facts_of, write_facts
from logitcask.engine.distill.teacher.open import open_loop_teacher
from logitcask.engine.distill.teacher.refreshes import read_refresh
from logitcask.engine.distill.timed import timed
from logitcask.engine.distill.versions import loaded
from logitcask.engine.events import CancelToken, EventHandler
from logitcask.engine.score.planner import ScorePlanner
from logitcask.engine.score.unit import ScoreRequest, ScoreUnit, run_score_unit
from logitcask.engine.store import Segment, open_store
from logitcask.engine.types import ModelRef, Report
from logitcask.engine.workers.job import Job, WorkPlan
from logitcask.engine.workers.timeline import span

REFRESHES = 2
"""Refreshes whose units a scorer may take: each unit of another one costs a load."""

Unit = tuple[ScoreUnit, ScoreRequest, Mapping[str, Any]]
"""A unit, the request of its refresh without a scorer that has this loaded, its provenance."""


def score_job(
    config: RunConfig, cancel: CancelToken, on_event: EventHandler, timeline: Path | None
) -> Job[Any]:
    """Return the units of the scores of a loop."""
    inputs = read_input(config, on_event)
    teacher = open_loop_teacher(inputs, cancel, on_event)
    try:
        facts, notes = facts_of(teacher, config)
        for line in notes:
            on_event(line)
        store = open_store(config.store.url, create=True)
        scoring = _Scoring(open_loop(inputs, facts, store), teacher, on_event, timeline)
        write_facts(config.run.out, facts)
    except BaseException:
        teacher.close()
        raise
    job: Job[Any] = Job(
        stage="score", store=store, plan=scoring.plan, work=scoring.work, close=scoring.close
    )
    return timed(job, timeline, scoring.place)


@dataclass(frozen=True, slots=True)
class Described:
    """A scorer that a plan describes, without its weights."""

    capabilities: frozenset[str]
    record: Mapping[str, str]

    def describe(self) -> dict[str, str]:
        return dict(self.record)


class _Scoring:
    """The units without scores, and the teacher that is loaded."""

    def __init__(
        self,
        loop: LoopSetup,
        teacher: LoadedTeacher,
        on_event: EventHandler,
        timeline: Path | None,
    ) -> None:
        self._loop, self._on_event, self._timeline = loop, on_event, timeline
        self._rounds, self._policy = loop.inputs.rounds(), loop.inputs.policy
        scorer = teacher.scorer
        self._described = replace(teacher, scorer=Described(scorer.capabilities, scorer.describe()))
        self._model: ModelRef | None = teacher.model
        self._scorer: Any = scorer
        self._planners: dict[ModelRef, tuple[ScoreRequest, ScorePlanner]] = {}

    def plan(self, left_out: Collection[str]) -> WorkPlan[Unit]:
        """Plan the units of rollouts without scores, those of the oldest round first."""
        rounds, loop = self._rounds, self._loop
        head = rounds.refresh(loop.store)
        done, total = rounds.units_scored, self._policy.units_total
        units: dict[str, Unit] = {}
        planners: dict[ModelRef, tuple[ScoreRequest, ScorePlanner]] = {}
        for version in rounds.waiting[:REFRESHES]:
            model = self._published(version)
            if model is None:
                self._on_event(f"waiting for version {version} of the teacher")
                break
            request, planner = planners[model] = self._planner(model, version)
            found = planner.plan(head)
            for note in found.notes:
                self._on_event(note)
            # An earlier trainer may have published other weights of this version, whose scores are
            # as good.
            units |= {
                key: (unit, request, found.provenance)
                for key, unit in found.missing.items()
                if version is None or not rounds.is_scored(unit.segment)
            }
        self._planners = planners
        number_of = {key: rounds.round_of(unit.segment) for key, (unit, *_) in units.items()}
        oldest = min(number_of.values(), default=0)
        first = [key for key, number in number_of.items() if number == oldest]
        return WorkPlan(
            units=units,
            first=first,
            done=done,
            total=total,
            may_shrink=loop.inputs.may_resample(),
        )

    def work(self, key: str, unit: Unit, report: Report) -> int:
        """Score a unit by its refresh; 0 positions where that was removed meanwhile."""
        part, request, provenance = unit
        if not self._load(request.model):
            return 0
        return run_score_unit(replace(request, scorer=self._scorer), key, part, provenance, report)

    def place(self, unit: Unit) -> tuple[int, int]:
        """Return (round, version that sampled) of a unit."""
        segment = unit[0].segment
        return self._rounds.round_of(segment), segment.version

    def close(self) -> None:
        close_backend(self._released())

    def _released(self) -> Any:
        """Return the scorer, which belongs to the caller then."""
        scorer, self._model, self._scorer = self._scorer, None, None
        return scorer

    def _published(self, version: int | None) -> ModelRef | None:
        """Return the teacher of a refresh, None before it is published."""
        if version is None:
            return self._described.model
        return read_refresh(self._loop.inputs, version)

    def _planner(self, model: ModelRef, version: int | None) -> tuple[ScoreRequest, ScorePlanner]:
        if model in self._planners:
            return self._planners[model]

        def of_refresh(segment: Segment) -> bool:
            return self._policy.teacher_version(self._rounds.round_of(segment)) == version

        teacher = replace(self._described, model=model)
        request = self._loop.score_request(teacher, None if version is None else of_refresh)
        return request, ScorePlanner(request, growing=True)

    def _load(self, model: ModelRef) -> bool:
        """Load a refresh; return False where it was removed meanwhile."""
        if self._model == model:
            return True
        config = self._loop.inputs.config
        with span(self._timeline, "load", version=model.version):
            self._scorer = loaded(
                self._released(),
                model,
                config.run,
                self._on_event,
                still=lambda: read_refresh(self._loop.inputs, model.version) == model,
                exact=config.score.exact,
            )
        self._model = None if self._scorer is None else model
        return self._model is not None
