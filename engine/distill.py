"""The on-policy loop: every round the student of that moment samples, the teacher scores, and the
student is updated. Everything goes through the store, so nothing that was done is done again.

One call of the trainer spans all rounds, and optimizer, schedule and metrics live on. A round is
made right before its first update. Its rollouts bear the digest of the student that sampled, so a
loop that was killed meets its own rollouts again and, on a CPU, ends with the same student.
"""

import os
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from logitcask.engine.batches import PackedRow, RowSource
from logitcask.engine.config import RunConfig
from logitcask.engine.course import Course, TrainReport, carry_out, open_desk
from logitcask.engine.errors import ConfigError
from logitcask.engine.identity import digest, model_ref
from logitcask.engine.jobs import (
    backend,
    find_objective,
    live_backend,
    student_and_prompts,
    train_settings,
)
from logitcask.engine.objectives import Facts, verdict
from logitcask.engine.plan import Plan, PlanKey, make_plan
from logitcask.engine.rollout import prompt_set_digest, rollout
from logitcask.engine.score import check_identity, score
from logitcask.engine.store import Segment, Store, open_store
from logitcask.engine.student import live_digest
from logitcask.engine.train import Notice
from logitcask.engine.types import ModelRef, Progress, Prompt, silent


def distill(
    config: RunConfig, *, progress: Progress = silent, notice: Notice = lambda line: None
) -> TrainReport:
    """Runs the rounds that `config` describes; the same call resumes.

    Raises ConfigError, IdentityError (another tokenizer; another run in the folder) and whatever
    the stages raise.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: distill runs in one process",
            remedy="start it without torchrun; `logitcask train` takes several processes",
        )
    preset = find_objective(config.train)
    model, prompts, template = student_and_prompts(config.student, config.prompts, config.rollout)
    teacher = model_ref(
        config.teacher.model, revision=config.teacher.revision, chat_template=template
    )
    for line in check_identity(model.lineage(), teacher):
        notice(line)
    width = rows_per_update(config, prompts)
    sampling = config.rollout.sampling()
    exactness = verdict(
        preset,
        Facts(
            student_k=config.rollout.student_k,
            k_min=config.score.k_min,
            k_max=config.score.k_max,
            layout="once",
            versions=(),  # renewed every round
            student_version=model.version,
            same_root=True,
            same_template=True,
            plain_sampling=sampling.is_plain(),
        ),
    )
    for line in exactness.lines():
        notice(line)
    store = open_store(config.store.url, create=True)
    scorer = backend(teacher, config.run)
    loop = config.loop
    settings = replace(
        train_settings(config.train, config.run),
        accumulation=width,
        # A checkpoint inside a round would not know the student that sampled the round.
        save_steps=-(-config.train.save_steps // loop.updates_per_round) * loop.updates_per_round,
    )
    desk = open_desk(
        config.run.out,
        model=model,
        settings=settings,
        overwrite=config.run.overwrite,
        device=config.run.device,
    )
    identity = {
        "store": store.uuid,
        "rollouts": config.store.rollouts,
        "prompts": prompt_set_digest(
            prompts, model, sampling, seed=config.run.seed, student_k=config.rollout.student_k
        ),
        "unit_prompts": config.rollout.unit_prompts,
        "teacher": teacher.digest,
        "teacher_name": config.teacher.name,
        "request": asdict(config.score.request()),
        "loop": loop.model_dump(),
    }
    course = Course(
        rows=lambda student: Rounds(
            student, config, store, model, prompts, template, teacher, scorer, width, progress
        ),
        updates=loop.rounds * loop.updates_per_round,
        objective=preset,
        same_root=True,
        identity=identity,
        plan=digest(identity),
        exactness=exactness,
    )
    return carry_out(
        course,
        desk,
        model=model,
        settings=settings,
        config=config.model_dump(mode="json"),
        progress=progress,
    )


def rows_per_update(config: RunConfig, prompts: list[Prompt]) -> int:
    """Packed rows that an update can need at most: how long responses get is not known before.

    First-fit-decreasing leaves at most one row half empty, so twice the tokens of a round fill
    them all; rows that are not needed are empty and cost next to nothing.
    """
    longest = max(len(p.token_ids) for p in prompts) + config.rollout.max_new_tokens
    budget = config.train.tokens_per_batch
    if config.loop.prompts_per_round > len(prompts):
        raise ConfigError(
            f"loop.prompts_per_round = {config.loop.prompts_per_round}: the file has "
            f"{len(prompts)} prompts",
            remedy=f"set loop.prompts_per_round to {len(prompts)} or less",
        )
    if longest > budget:
        raise ConfigError(
            f"train.tokens_per_batch = {budget} is less than the longest prompt with its response, "
            f"{longest} tokens, and a sequence never spans rows",
            remedy=f"set train.tokens_per_batch to {longest} or more, or lower "
            "rollout.max_new_tokens",
        )
    if config.train.accumulation != 1:
        raise ConfigError(
            f"train.accumulation = {config.train.accumulation}: distill derives it from the round",
            remedy="leave it out; loop.prompts_per_round says how much an update sees",
        )
    sequences = config.loop.prompts_per_round * config.rollout.n
    rows = min(sequences, 2 * sequences * longest // budget + 1)
    return -(-rows // config.loop.updates_per_round)


class Rounds:
    """The `Rows` of a loop: a round's rollouts and scores are made before its first update."""

    def __init__(
        self,
        student: nn.Module,
        config: RunConfig,
        store: Store,
        model: ModelRef,
        prompts: list[Prompt],
        template: bool,
        teacher: ModelRef,
        scorer: Any,
        width: int,
        progress: Progress,
    ) -> None:
        """`student` is the model in training; `width` the packed rows of an update."""
        self._student = student
        self._config = config
        self._store = store
        self._model = model
        self._prompts = prompts
        self._template = template
        self._teacher = teacher
        self._scorer = scorer
        self._width = width
        self._progress = progress
        self._sampler = live_backend(student, model, config.run)
        self._made: tuple[RowSource, Plan]

    def prepare(self, step: int) -> None:
        """Makes the round that update `step` begins; inside a round there is nothing to do."""
        updates = self._config.loop.updates_per_round
        if step % updates:
            return
        live = replace(
            self._model, digest=live_digest(self._student), version=self._model.version + step
        )
        for first, count in self._ranges(step // updates):
            self._roll(live, first, count)
        score(
            self._store,
            model=self._teacher,
            scorer=self._scorer,
            teacher_name=self._config.teacher.name,
            rollouts_name=self._config.store.rollouts,
            request=self._config.score.request(),
        )
        self._made = self._pack(live)

    def row(self, index: int) -> PackedRow:
        """Updates of a round take its rows in turn, so that they are equally full."""
        updates = self._config.loop.updates_per_round
        update, slot = divmod(index % (updates * self._width), self._width)
        source, plan = self._made
        return source.row(plan.row(slot * updates + update))

    def _ranges(self, round_number: int) -> list[tuple[int, int]]:
        """(first, count) of the round's prompts: in order, and from the start again at the end."""
        total, left = len(self._prompts), self._config.loop.prompts_per_round
        first = round_number * left % total
        ranges = []
        while left:
            count = min(left, total - first)
            ranges.append((first, count))
            first, left = 0, left - count
        return ranges

    def _roll(self, live: ModelRef, first: int, count: int) -> None:
        config = self._config
        rollout(
            self._store,
            model=live,
            sampler=self._sampler,
            prompts=self._prompts,
            sampling=config.rollout.sampling(),
            name=config.store.rollouts,
            seed=config.run.seed,
            student_k=config.rollout.student_k,
            unit_prompts=config.rollout.unit_prompts or None,
            first=first,
            count=count,
            versions=True,
            lineage_extra={"chat_template": self._template},
        )

    def _pack(self, live: ModelRef) -> tuple[RowSource, Plan]:
        """The round's own segments, packed. Others under the name are of other rounds."""
        config = self._config

        def ours(segment: Segment) -> bool:
            return bool(segment.lineage["student"]["weights"] == live.digest)

        pin = self._store.head()
        source = RowSource(
            self._store, pin, config.store.rollouts, config.teacher.name, partial=True, only=ours
        )
        # The pin's number may differ between runs that share a store; the round may not.
        key = PlanKey(
            pin=live.version,
            pin_sha256=live.digest,
            rollouts=config.store.rollouts,
            teacher=config.teacher.name,
            seed=config.run.seed,
            epochs=1,
            tokens_per_batch=config.train.tokens_per_batch,
        )
        return source, make_plan(key, source.lengths())
