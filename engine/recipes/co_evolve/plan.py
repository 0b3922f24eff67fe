"""Steps of two students that score each other: the settings of every command, known beforehand.

    STORE   rollouts NAME-first-1, NAME-second-1   responses of each student in round 1
            scores second-1, first-1               of the other student, with its weights of then
    OUT     prompts-1.jsonl                        prompts of round 1
            first-1, second-1                      the students after round 1, as of `train`

Both students of a round sample, score and learn with the weights that the round before left, so
neither is a step ahead. Names have the number of the round: a name of scores is bound to weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from logitcask.engine.config.prompts import Prompts
from logitcask.engine.config.section import Section
from logitcask.engine.config.sections import (
    RolloutConfig,
    Run,
    RunConfig,
    ScoreConfig,
    StoreSection,
    Student,
    TrainConfig,
)
from logitcask.engine.config.teacher import Score, Teacher, is_file
from logitcask.engine.config.trainer_args import HUB
from logitcask.engine.config.training import Eval, Loop, Train
from logitcask.engine.errors import ConfigError
from logitcask.engine.teachers.remote import is_remote
from logitcask.engine.types import MC_IDS

SIDES = ("first", "second")
"""The students: that of [student] in the file, and that of [teacher]."""
ROLLOUT, SCORE, TRAIN = "rollout", "score", "train"
"""Commands, in the order of a round."""

_ONE_PROCESS = "leave it out: the recipe calls one command after the other, in this process"
_EACH_ROUND = "leave it out: the recipe sets it for each round"
_NOT_HERE: tuple[tuple[str, type[Section], tuple[str, ...], str], ...] = (
    ("loop", Loop, ("max_age",), _ONE_PROCESS),
    (
        "loop",
        Loop,
        ("updates_per_round",),
        "leave it out: a round is one `train`, whose updates [train] sets by "
        "gradient_accumulation_steps and num_train_epochs",
    ),
    (
        "score",
        Score,
        ("teacher_kind",),
        "leave it out: each student scores what the other one read",
    ),
    (
        "train",
        Train,
        ("teacher", "teacher_field", "base", "snapshot", "partial", "allow_off_lineage"),
        _EACH_ROUND,
    ),
    (
        "eval",
        Eval,
        ("store", "rollouts", "teacher", "snapshot"),
        "leave it out: held-out scores are of one teacher; eval.prompts measures both students",
    ),
)
"""(section, its class, keys that the recipe does not take, hint)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One command of a round."""

    round: int
    """From 1."""
    side: str
    """The student that samples, whose responses are scored, or that learns."""
    command: str
    config: RolloutConfig | ScoreConfig | TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairing:
    """The objective, and what each scoring gets where the tokenizers differ."""

    objective: str
    """Of both students."""
    differ: bool = False
    """Each scoring gets the tokenizer of the student that sampled."""
    rendered: tuple[str, ...] = ()
    """Sides whose prompts a chat template renders and the other student reads by its own: it has
    another vocabulary, and their scoring gets the prompts file."""


def check_config(config: RunConfig) -> None:
    """Raise ConfigError for settings that two students cannot have, whatever the models are."""
    teacher, hint = config.teacher, "give the folder or hub id of the second student"
    if teacher.follow or is_remote(teacher.model):
        what = f"follow = {teacher.follow}" if teacher.follow else "a server"
        raise ConfigError(
            f"teacher.model = {teacher.model or 'the student'} ({what}): both students are "
            "trained here",
            hint=f"{hint}, with --set teacher.model=FOLDER",
        )
    if (teacher.model, teacher.revision) == (config.student.model, config.student.revision):
        raise ConfigError(
            f"student.model = teacher.model = {teacher.model}: two equal models have nothing to "
            "teach each other",
            hint=hint,
        )
    plain = Teacher(model=teacher.model, revision=teacher.revision, name=teacher.name)
    for key in Teacher.model_fields:
        if (value := getattr(teacher, key)) != getattr(plain, key):
            raise ConfigError(f"teacher.{key} = {value}: not of two students", hint=_EACH_ROUND)
    if config.runner.kind != "inline":
        raise ConfigError(f"runner.kind = {config.runner.kind}", hint=_ONE_PROCESS)
    if config.run.overwrite:
        raise ConfigError(
            "run.overwrite = true: a rerun goes on where the last one stopped",
            hint="leave it out, or give another run.out",
        )
    if config.score.extra_ids not in ("", MC_IDS) or is_file(config.score.positions):
        raise ConfigError(
            f"score.extra_ids = {config.score.extra_ids!r}, score.positions = "
            f"{config.score.positions}: names and files are of rollouts that exist already",
            hint="leave them out, give mc, or choose positions by a rule such as first:100",
        )
    for name, section, keys, way_out in _NOT_HERE:
        for key in keys:
            value = getattr(getattr(config, name), key)
            if value != section.model_fields[key].default:
                raise ConfigError(
                    f"{name}.{key} = {value}: two students do not take it", hint=way_out
                )


def folder_of(config: RunConfig, side: str, number: int) -> Path:
    """Return the folder of a student after a round."""
    return config.run.out / f"{side}-{number}"


def prompts_of(config: RunConfig, number: int) -> Path:
    """Return the file of the prompts of a round."""
    return config.run.out / f"prompts-{number}.jsonl"


def student_in(config: RunConfig, side: str, number: int) -> Student:
    """Return the student of a side that samples, scores and learns in a round."""
    if number > 1:
        return Student(model=str(folder_of(config, side, number - 1)))
    if side == SIDES[0]:
        return config.student
    return Student(model=config.teacher.model, revision=config.teacher.revision)


def steps(config: RunConfig, pairing: Pairing) -> Iterator[Step]:
    """Yield the commands of all rounds in their order."""
    for number in range(1, config.loop.rounds + 1):
        makers = ((ROLLOUT, _rollout), (SCORE, _score), (TRAIN, _train))
        for command, make in makers:
            for side in SIDES:
                yield Step(
                    round=number,
                    side=side,
                    command=command,
                    config=make(config, pairing, side, number),
                )


def _rollouts(config: RunConfig, side: str, number: int) -> str:
    return f"{config.store.rollouts}-{side}-{number}"


def _other(side: str) -> str:
    return SIDES[1 - SIDES.index(side)]


def _rollout(config: RunConfig, _: Pairing, side: str, number: int) -> RolloutConfig:
    own = config.prompts
    return RolloutConfig(
        student=student_in(config, side, number),
        # Their file has our keys, no columns of others.
        prompts=Prompts(
            file=prompts_of(config, number),
            system_prompt=own.system_prompt,
            chat_template=own.chat_template,
            chat_template_kwargs=own.chat_template_kwargs,
        ),
        store=config.store.model_copy(update={"rollouts": _rollouts(config, side, number)}),
        rollout=config.rollout,
        run=_run(config, number),
    )


def _score(config: RunConfig, pairing: Pairing, side: str, number: int) -> ScoreConfig:
    scorer = student_in(config, _other(side), number)
    own = student_in(config, side, number).model
    return ScoreConfig(
        teacher=Teacher(
            model=scorer.model,
            revision=scorer.revision,
            name=f"{_other(side)}-{number}",
            student_tokenizer=own if pairing.differ else "",
        ),
        store=config.store.model_copy(update={"rollouts": _rollouts(config, side, number)}),
        score=Score(
            **config.score.model_dump(exclude_defaults=True),
            prompts=prompts_of(config, number) if side in pairing.rendered else None,
        ),
        run=_run(config, number),
    )


def _train(config: RunConfig, pairing: Pairing, side: str, number: int) -> TrainConfig:
    own = pairing.objective == config.train.objective
    loss_topk = config.train.loss_topk if own else None
    return TrainConfig(
        student=student_in(config, side, number),
        store=StoreSection(url=config.store.url, rollouts=_rollouts(config, side, number)),
        train=config.train.model_copy(
            update={
                "teacher": f"{_other(side)}-{number}",
                "objective": pairing.objective,
                "loss_topk": loss_topk,
                "args": {key: each for key, each in config.train.args.items() if key not in HUB},
            }
        ),
        lora=config.lora,
        eval=config.eval,
        run=_run(config, number).model_copy(update={"out": folder_of(config, side, number)}),
    )


def _run(config: RunConfig, number: int) -> Run:
    """Return [run] of a round without its folder; its seed gives equal prompts other draws."""
    return config.run.model_copy(update={"seed": config.run.seed + number - 1, "out": Run().out})
