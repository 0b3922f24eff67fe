"""Cold start: a student learns from accepted responses of its teacher before it is distilled.

arXiv 2604.13016, section 5.1, Fig. 8 and 21, Table 3: supervised fine-tuning on the teacher's text
raises the overlap at the start of the distillation, and its ceiling.

    STORE   rollouts SAMPLED-1, SAMPLED-2, ...  all responses of the teacher, by attempt
            rollouts NAME                       the accepted ones, with the scores of the teacher
    OUT     the student after the fine-tuning, as of `train`

Each part resumes: stored responses are not sampled again, and the training continues.
"""

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from logitcask.engine.backends.base import close_backend
from logitcask.engine.commands.load_teacher import backend
from logitcask.engine.commands.prove import prove
from logitcask.engine.commands.resolve import decoder
from logitcask.engine.commands.rollout import rollouts_left
from logitcask.engine.commands.train import run_train
from logitcask.engine.config.recipes import ColdStart
from logitcask.engine.config.sections import RunConfig, TrainConfig
from logitcask.engine.config.trainer_args import HUB
from logitcask.engine.errors import IncompleteError
from logitcask.engine.estimate.left import Approve, refuse_full_disk
from logitcask.engine.events import EventHandler
from logitcask.engine.packing.source import PackSource
from logitcask.engine.prompts.graders import Decode
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.recipes.kept import Chosen
from logitcask.engine.recipes.rejection import REASONS, rejection
from logitcask.engine.recipes.teacher_text import (
    TeacherPrompts,
    keep_chosen,
    open_request,
    teacher_prompts,
)
from logitcask.engine.rollout.plan import rollout
from logitcask.engine.rollout.unit import RolloutRequest
from logitcask.engine.store import Store
from logitcask.engine.training.run import TrainReport
from logitcask.engine.types import LENGTH, Progress, no_progress

OFF = "off"
"""Value of `require` for no required text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColdStartReport:
    out: Path
    """Folder of the student."""
    prompts: int
    attempts: Sequence[Mapping[str, int]]
    """Of each attempt: responses sampled and accepted, and those of each reason of rejection."""
    accepted: int
    """Responses that the student has learned from."""
    prompts_without: int
    """Prompts without an accepted response."""
    positions: int
    """Tokens of the accepted responses."""
    updates: int
    loss: float
    """Cross-entropy of the last update, nats a token."""
    overrides: tuple[str, ...]
    """Of the file, by which `distill` goes on from this student."""
    next: str
    """Command that does."""


def run_cold_start(
    config: RunConfig,
    settings: ColdStart,
    *,
    file: str = "CONFIG",
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
    approve: Approve = refuse_full_disk,
) -> ColdStartReport:
    """Sample the teacher, reject, and fine-tune the student of a distillation.

    file: name of its TOML file, for the next command. Raises as `teacher_prompts`, IncompleteError
    where every response is rejected, and the errors of rollout and training.
    """
    found = teacher_prompts(
        config, settings, settings.sampled, prompts=settings.prompts, on_event=on_event
    )
    first = found.config.store.model_copy(update={"rollouts": f"{settings.sampled}-1"})
    attempt = found.config.model_copy(update={"store": first})
    approve(replace(rollouts_left(attempt, len(found.prompts)), stage="cold-start, first attempt"))
    request = open_request(found)
    try:
        attempts, chosen, without = accept(request, found, settings, progress)
    finally:
        close_backend(request.sampler)
    if not chosen:
        raise IncompleteError(
            f"all {sum(each['sampled'] for each in attempts)} responses were rejected: "
            f"{_reasons(attempts)}",
            hint="give a larger --max-new-tokens for truncated ones, or --require off",
        )
    scorer = backend(found.student, config.run)
    try:
        kept = keep_chosen(
            config,
            found,
            request,
            chosen,
            scorer,
            name=settings.name,
            rule={"recipe": "cold-start", "require": settings.require},
            progress=progress,
        )
    finally:
        close_backend(scorer)
    trained = fine_tune(config, settings, request.store, progress, on_event)
    overrides = next_sets(config, settings, found)
    sets = [word for each in overrides for word in ("--set", each)]
    return ColdStartReport(
        out=settings.out,
        prompts=len(found.prompts),
        attempts=tuple(attempts),
        accepted=kept.sequences,
        prompts_without=without,
        positions=kept.positions,
        updates=trained.updates,
        loss=float(trained.last["loss"]),
        overrides=overrides,
        next=shlex.join(["logitcask", "distill", file, *sets]),
    )


def accept(
    request: RolloutRequest, found: TeacherPrompts, settings: ColdStart, progress: Progress
) -> tuple[list[dict[str, int]], list[Chosen], int]:
    """Sample every prompt until it has n accepted responses, `attempts` times at most.

    Returns counts of each attempt, the accepted responses, and the prompts without one. An attempt
    has a seed of its own: the first that of the run, each later one the next.
    """
    decode = decoder(load_tokenizer(found.teacher.path))
    lacking = {prompt.id: settings.n for prompt in found.prompts}
    counts: list[dict[str, int]] = []
    chosen: list[Chosen] = []
    for number in range(settings.attempts):
        prompts = [prompt for prompt in found.prompts if lacking[prompt.id]]
        if not prompts:
            break
        part = replace(
            request,
            prompts=prompts,
            name=f"{settings.sampled}-{number + 1}",
            seed=request.seed + number,
        )
        rollout(part, progress=progress)
        accepted, reasons = _sorted(part.store, part.name, decode, lacking, settings.require)
        chosen += accepted
        kept = sum(len(each.sequences) for each in accepted)
        sampled = kept + sum(reasons.values())
        counts.append(
            {"sampled": sampled, "accepted": kept, **{each: reasons[each] for each in REASONS}}
        )
        if reasons[SURPLUS]:
            counts[-1][SURPLUS] = reasons[SURPLUS]
    return counts, chosen, sum(left == settings.n for left in lacking.values())


SURPLUS = "surplus"
"""Count of accepted responses of a later attempt beyond the n of their prompt."""


def _sorted(
    store: Store, name: str, decode: Decode, lacking: dict[str, int], require: str
) -> tuple[list[Chosen], Counter[str]]:
    """Return the accepted responses of an attempt, and the number of others of each reason.

    lacking: prompt id -> responses that it needs, which the accepted ones lower.
    """
    reasons: Counter[str] = Counter()
    chosen: list[Chosen] = []
    for segment in store.head().rollouts(name):
        rollouts = store.read_rollouts(segment)
        accepted: list[int] = []
        for place, of in enumerate(rollouts.seq_prompt.tolist()):
            rows = slice(int(rollouts.seq_off[place]), int(rollouts.seq_off[place + 1]))
            reason = rejection(
                decode(rollouts.tokens[rows].tolist()),
                truncated=int(rollouts.finish[place]) == LENGTH,
                require="" if require == OFF else require,
            )
            prompt = rollouts.prompts[of].id
            if not reason and not lacking[prompt]:
                reason = SURPLUS
            if reason:
                reasons[reason] += 1
                continue
            lacking[prompt] -= 1
            accepted.append(place)
        if accepted:
            prompts = len(set(rollouts.seq_prompt[accepted].tolist()))
            chosen.append(Chosen(segment=segment, sequences=tuple(accepted), prompts=prompts))
    return chosen, reasons


def fine_tune(
    config: RunConfig,
    settings: ColdStart,
    store: Store,
    progress: Progress,
    on_event: EventHandler,
) -> TrainReport:
    """Train the student on the accepted responses by cross-entropy on their tokens."""
    source = PackSource(store, store.head(), settings.name, config.teacher.name)
    plan = source.plan(
        seed=config.run.seed,
        epochs=settings.num_train_epochs,
        pack_length=settings.pack_length,
    )
    updates = math.ceil(len(plan) / settings.gradient_accumulation_steps)
    # As transformers rounds a share of the updates.
    warmup = math.ceil(settings.warmup_share * updates)
    train = train_config(config, settings, warmup)
    return run_train(train, progress=progress, on_event=on_event)


def train_config(config: RunConfig, settings: ColdStart, warmup_steps: int) -> TrainConfig:
    """Return the configuration of the fine-tuning: [train] with what the recipe sets."""
    train = config.train.model_copy(
        update={
            "teacher": config.teacher.name,
            "objective": "sft",
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": settings.lr_scheduler_type,
            "warmup_steps": warmup_steps,
            "num_train_epochs": settings.num_train_epochs,
            "pack_length": settings.pack_length,
            "gradient_accumulation_steps": settings.gradient_accumulation_steps,
            # Of the distillation alone.
            **dict.fromkeys(("teacher_field", "base", "snapshot", "loss_topk", "max_steps")),
            "staleness_action": "off",
            "partial": False,
            "args": {key: each for key, each in config.train.args.items() if key not in HUB},
        }
    )
    held_out = dict.fromkeys(("store", "rollouts", "teacher", "snapshot"))
    return TrainConfig(
        student=config.student,
        store=config.store.model_copy(update={"rollouts": settings.name}),
        train=train,
        lora=config.lora,
        eval=config.eval.model_copy(update=held_out),
        run=config.run.model_copy(update={"out": settings.out}),
    )


def prove_cold_start(
    config: RunConfig, settings: ColdStart, on_event: EventHandler = lambda line: None
) -> None:
    """Raise what would stop `run_cold_start` before its first response: reads the prompts and
    loads both models.
    """
    found = teacher_prompts(
        config, settings, settings.sampled, prompts=settings.prompts, on_event=on_event
    )
    prove(found.config)
    prove(train_config(config, settings, 0))


def next_sets(config: RunConfig, settings: ColdStart, found: TeacherPrompts) -> tuple[str, ...]:
    """Return the overrides by which the same file distils the student after its cold start."""
    sets = [
        f"student.model={settings.out.resolve()}",
        f"store.rollouts={config.store.rollouts}-{settings.name}",
    ]
    if config.student.revision:
        sets.append("student.revision=")
    if more := sorted({*found.teacher.stop_ids} - {*found.own_stop_ids}):
        stops = sorted({*config.rollout.stop_token_ids, *more})
        sets.append(f"rollout.stop_token_ids={stops}")
    return tuple(sets)


def _reasons(attempts: Sequence[Mapping[str, int]]) -> str:
    total: Counter[str] = Counter()
    for each in attempts:
        total.update({reason: each[reason] for reason in REASONS})
    return ", ".join(f"{count} {reason}" for reason, count in total.items() if count)


def shown(report: ColdStartReport) -> dict[str, Any]:
    """Return the report with one line for each attempt, for text."""
    values = asdict(report)
    del values["attempts"], values["overrides"]
    rows = {
        f"attempt {number}": ", ".join(f"{key} {count}" for key, count in each.items() if count)
        for number, each in enumerate(report.attempts, 1)
    }
    return {"prompts": values.pop("prompts"), **rows, **values}
