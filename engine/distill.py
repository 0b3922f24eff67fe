"""The on-policy loop: every round the student of that moment samples, the teacher scores, and the
student is updated. Everything goes through the store, so nothing that was done is done again.

One call of the trainer spans all rounds, and optimizer, schedule and metrics live on. A round is
made right before its first update. Its rollouts bear the digest of the student that sampled, so a
loop that was killed meets its own rollouts again and, on a CPU, ends with the same student.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import nn

from logitcask.engine.batches import PackedRow, RowSource
from logitcask.engine.config import RunConfig, Train
from logitcask.engine.course import Course, TrainReport, carry_out, open_desk
from logitcask.engine.errors import ConfigError, IdentityError
from logitcask.engine.identity import digest, model_ref
from logitcask.engine.jobs import (
    backend,
    find_objective,
    live_backend,
    student_and_prompts,
    train_settings,
)
from logitcask.engine.objectives import Facts, verdict
from logitcask.engine.plan import WINDOW_SEGMENTS, Lengths, Plan, PlanKey, make_plan
from logitcask.engine.rollout import default_unit, prompt_set_digest, rollout
from logitcask.engine.rundir import check_same
from logitcask.engine.score import check_identity, score
from logitcask.engine.store import Segment, Store, open_store
from logitcask.engine.student import live_digest
from logitcask.engine.train import Notice
from logitcask.engine.types import ModelRef, Progress, Prompt, silent


def distill(
    config: RunConfig, *, progress: Progress = silent, notice: Notice = lambda line: None
) -> TrainReport:
    """Runs the rounds that `config` describes; the same call resumes.

    Raises ConfigError, IdentityError (another tokenizer; another run in the folder or under the
    name of the rollouts) and whatever the stages raise.
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
    check_loop(config, prompts)
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
    identity = {
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
    # Rounds of two runs under one name would mix students that only share their version numbers.
    run = {"settings": asdict(settings), "objective": asdict(preset.objective), **identity}
    check_name(store, config.store.rollouts, run)
    desk = open_desk(
        config.run.out,
        model=model,
        settings=settings,
        overwrite=config.run.overwrite,
        device=config.run.device,
    )
    identity["store"] = store.uuid
    course = Course(
        rows=lambda student: Rounds(
            student, config, store, model, prompts, template, teacher, scorer, width, run
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


def check_loop(config: RunConfig, prompts: list[Prompt]) -> None:
    """ConfigError for a loop that could not run as it is written."""
    longest, budget = _longest(config, prompts), config.train.tokens_per_batch
    sequences = config.loop.prompts_per_round * config.rollout.n
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
    if config.loop.updates_per_round > sequences:
        raise ConfigError(
            f"loop.updates_per_round = {config.loop.updates_per_round}: a round has {sequences} "
            "responses, so some updates would have none",
            remedy=f"set loop.updates_per_round to {sequences} or less",
        )
    for key in ("accumulation", "epochs", "teacher", "partial", "foreign_student"):
        if (value := getattr(config.train, key)) != Train.model_fields[key].default:
            raise ConfigError(
                f"train.{key} = {value}: distill does not take it",
                remedy="leave it out; [loop] says how much an update sees, and [teacher] whose "
                "scores",
            )


def rows_per_update(config: RunConfig, prompts: list[Prompt]) -> int:
    """Packed rows that an update can need at most: how long responses get is not known before.

    First-fit-decreasing leaves at most one row of a window half empty, so twice the tokens and a
    row per window are enough; rows that are not needed are empty and cost next to nothing.
    """
    sequences = -(
        -config.loop.prompts_per_round * config.rollout.n // config.loop.updates_per_round
    )
    unit = config.rollout.unit_prompts or default_unit(config.rollout.sampling())
    # The last unit of the file and that of the round may be smaller.
    windows = -(-(config.loop.prompts_per_round // unit + 2) // WINDOW_SEGMENTS)
    tokens = sequences * _longest(config, prompts)
    return min(sequences, 2 * tokens // config.train.tokens_per_batch + windows)


def _longest(config: RunConfig, prompts: list[Prompt]) -> int:
    """Tokens that a prompt and its response can reach."""
    return max(len(p.token_ids) for p in prompts) + config.rollout.max_new_tokens


def check_name(store: Store, name: str, run: Mapping[str, Any]) -> None:
    """IdentityError if `name` holds anything but rounds of this very run."""
    for segment in store.head().rollouts(name)[:1]:
        if "run" not in segment.lineage:
            raise IdentityError(
                f"rollouts {name!r} in {store.path} were not made by distill",
                remedy="set store.rollouts to a name of this run's own",
            )
        check_same(
            f"rollouts {name!r} in {store.path}",
            segment.lineage["run"],
            run,
            remedy="go on as they were begun, or set store.rollouts and run.out to names of this "
            "run's own",
        )


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
        run: Mapping[str, Any],
    ) -> None:
        """`student` is the model in training, on its device; `width` the packed rows of an update;
        `run` what the name of the rollouts stands for.
        """
        self._student = student
        self._config = config
        self._store = store
        self._model = model
        self._prompts = prompts
        self._template = template
        self._teacher = teacher
        self._scorer = scorer
        self._width = width
        self._run = run
        self._sampler = live_backend(student, model, config.run)
        self._made: tuple[RowSource, list[Plan]]

    def prepare(self, step: int) -> None:
        """Makes the round that update `step` begins; inside a round there is nothing to do."""
        updates = self._config.loop.updates_per_round
        if step % updates:
            return
        live = replace(
            self._model, digest=live_digest(self._student), version=self._model.version + step
        )
        self._roll(live, step // updates)
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
        update, slot = divmod(index, self._width)
        source, plans = self._made
        return source.row(plans[update % len(plans)].row(slot))

    def _roll(self, live: ModelRef, round_number: int) -> None:
        config, count = self._config, self._config.loop.prompts_per_round
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
            first=round_number * count % len(self._prompts),
            count=count,
            versions=True,
            run=self._run,
            lineage_extra={"chat_template": self._template},
        )

    def _pack(self, live: ModelRef) -> tuple[RowSource, list[Plan]]:
        """The round's own segments, packed for each of its updates."""
        config = self._config

        def ours(segment: Segment) -> bool:
            # Both: a first update at a learning rate of 0 leaves the weights as they are.
            student = segment.lineage["student"]
            return bool((student["weights"], student["version"]) == (live.digest, live.version))

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
        rng = np.random.default_rng([config.run.seed, live.version])
        parts = deal(source.lengths(), config.loop.updates_per_round, rng)
        plans = [make_plan(key, part) for part in parts]
        assert max(map(len, plans)) <= self._width, "rows_per_update"
        return source, plans


def deal(lengths: Sequence[Lengths], updates: int, rng: np.random.Generator) -> list[list[Lengths]]:
    """Drawn shares of the sequences, one for each update, equally many but for one.

    Whole packed rows would not do: a round of short responses may fill less rows than updates.
    """
    counts = [len(segment.response) for segment in lengths]
    owner = np.split(rng.permutation(sum(counts)) % updates, np.cumsum(counts)[:-1])
    return [
        [
            # A plan leaves out what has no response.
            replace(segment, response=np.where(of == update, segment.response, 0))
            for segment, of in zip(lengths, owner, strict=True)
        ]
        for update in range(updates)
    ]
