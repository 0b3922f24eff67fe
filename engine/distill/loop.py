"""The on-policy loop: in every round the current student samples, the teacher scores, and the
student is updated. All data pass through the store, so finished work is never repeated.

One call of the trainer spans all rounds, with one optimizer, schedule and metrics file. A round is
made right before its first update. Its rollouts record the digest of the student that sampled, so a
loop that was killed finds its own rollouts again and, on a CPU, ends with the same student.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from logitcask.engine.commands.load_teacher import LoadedTeacher, open_teacher
from logitcask.engine.commands.resolve import grader_of, student_and_prompts
from logitcask.engine.commands.train import eval_plan, find_objective, held_out_set
from logitcask.engine.config.section import Section
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.config.teacher import Score, is_file
from logitcask.engine.config.training import Train
from logitcask.engine.distill.on_policy_rows import OnPolicyRows, pack_length
from logitcask.engine.errors import ConfigError, IdentityError
from logitcask.engine.events import CancelToken, EventHandler, warn_once
from logitcask.engine.models.identity import digest
from logitcask.engine.objectives import (
    CacheInfo,
    ExactnessReport,
    Preset,
    check_exactness,
    warnings,
)
from logitcask.engine.packing.plan import windows_at_most
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.rollout.unit import prompt_set_digest
from logitcask.engine.store import Store, open_store
from logitcask.engine.training.evaluation.held_out import hold_out
from logitcask.engine.training.run import RunSpec, TrainReport, run_training
from logitcask.engine.training.run_dir.files import check_same, read_run
from logitcask.engine.training.run_dir.open import open_run_dir
from logitcask.engine.training.settings import settings_record, updates_at_most
from logitcask.engine.types import (
    ALL_POSITIONS,
    MC_IDS,
    ModelRef,
    Progress,
    Prompt,
    ScoreParams,
    no_progress,
)


def distill(
    config: RunConfig,
    *,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> TrainReport:
    """Run the rounds of `config`; the same call resumes.

    Raises ConfigError, IdentityError (another tokenizer; another run in the folder or under the
    name of the rollouts), and the errors of the stages.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: distill runs in one process",
            hint="start it without torchrun; `logitcask train` takes several processes",
        )
    preset = find_objective(config.train)
    model, prompts, rendering = student_and_prompts(
        config.student, config.prompts, config.rollout, on_event
    )
    check_loop(config, prompts)
    # Raises for an objective that no teacher could serve, before the weights of one are read.
    _exactness(config, preset, model, config.score.params(config.run.seed), bounds=False)
    teacher = open_teacher(
        config.teacher,
        config.run,
        model.provenance(),
        template=rendering.chat_template,
        exact=config.score.exact,
        k_max=config.score.teacher_topk_max,
        cancel=CancelToken(on_event),
    )
    try:
        # Every round scores, with the same notes.
        on_event = warn_once(on_event)
        return _run_loop(config, preset, model, prompts, rendering, teacher, progress, on_event)
    finally:
        teacher.close()


def _run_loop(
    config: RunConfig,
    preset: Preset,
    model: ModelRef,
    prompts: list[Prompt],
    rendering: Rendering,
    teacher: LoadedTeacher,
    progress: Progress,
    on_event: EventHandler,
) -> TrainReport:
    params, notes = teacher.score_params(config.score, config.run.seed)
    bounds = "bounds" in teacher.scorer.capabilities
    exactness = _exactness(config, preset, model, params, bounds)
    for line in (*teacher.notes, *notes, *exactness.lines()):
        on_event(line)
    grader = grader_of(config.rollout, model, prompts)
    evaluation = eval_plan(config.eval, config.run, model, rendering, on_event)
    held_out = None
    if (data := held_out_set(config.eval, config.store.url, config.train)) is not None:
        earlier = None if config.run.overwrite else read_run(config.run.out)
        held_out = hold_out(data, model, preset, config.train.pack_length, earlier)
        for line in held_out.exactness.lines():
            on_event(f"held out: {line}")
    store = open_store(config.store.url, create=True)
    loop, width = config.loop, packs_per_update(config, prompts)
    # A checkpoint inside a round would not have the student that sampled the round.
    save_steps = -(-config.train.save_steps // loop.updates_per_round) * loop.updates_per_round
    settings = config.train.model_copy(
        update={
            "gradient_accumulation_steps": width,
            "save_steps": save_steps,
            "pack_length": pack_length(config.train),
        }
    )
    partial = config.score.positions != ALL_POSITIONS
    identity = {
        "rollouts": config.store.rollouts,
        "prompts": prompt_set_digest(
            prompts,
            model,
            config.rollout,
            seed=config.run.seed,
            student_k=config.rollout.student_topk,
            mc_draws=config.rollout.mc_draws,
            grader=config.rollout.grader,
            stop_token_ids=config.rollout.stop_token_ids,
        ),
        "unit_prompts": config.rollout.unit_prompts,
        "teacher": teacher.model.digest,
        "teacher_name": config.teacher.name,
        "request": asdict(params),
        **({"at": config.score.extra_ids} if config.score.extra_ids else {}),
        **({"positions": config.score.positions} if partial else {}),
        "loop": loop.model_dump(),
    }
    # Rounds of two runs under one name would mix students that share only their version numbers.
    record = settings_record(settings, config.lora, config.run)
    run = {"settings": record, "objective": preset.objective.record(), **identity}
    check_name(store, config.store.rollouts, run)
    with open_run_dir(model, settings, config.run, on_event) as run_dir:
        identity["store"] = store.uuid
        spec = RunSpec(
            model=model,
            packs=lambda student: OnPolicyRows(
                student=student,
                config=config,
                store=store,
                model=model,
                prompts=prompts,
                rendering=rendering,
                teacher=teacher,
                params=params,
                width=width,
                run=run,
                grader=grader,
                progress=progress,
                on_event=on_event,
            ),
            updates=updates_at_most(settings, loop.rounds * loop.updates_per_round),
            longest=_longest(config, prompts),
            objective=preset,
            same_base_weights=True,
            identity=identity,
            plan=digest(identity),
            exactness=exactness,
            settings=settings,
            lora=config.lora,
            run=config.run,
            evaluation=evaluation,
            held_out=held_out,
        )
        report = run_training(
            spec,
            run_dir,
            config=config.model_dump(mode="json"),
            on_event=on_event,
            progress=progress,
        )
    for line in warnings(preset.objective, report.last):
        on_event(f"warning: {line}")
    return report


def _exactness(
    config: RunConfig, preset: Preset, model: ModelRef, params: ScoreParams, bounds: bool
) -> ExactnessReport:
    """Check the objective against the scores of a round; bounds: entropies are intervals."""
    return check_exactness(
        preset,
        CacheInfo(
            student_k=config.rollout.student_topk,
            k_min=config.score.teacher_topk_min,
            k_max=config.score.teacher_topk_max,
            n_vocab=model.n_vocab,
            at_student=params.at_student,
            at_mc=config.score.extra_ids == MC_IDS,
            q_draws=config.score.draws,
            versions=(),  # a new one every round
            student_version=model.version,
            same_base_weights=True,
            same_template=True,
            plain_sampling=config.rollout.is_plain(),
            rewards=config.rollout.grader != "",
            samples=config.rollout.n,
            entropy_bounds=bounds,
            scored="" if config.score.positions == ALL_POSITIONS else config.score.positions,
        ),
    )


_NOT_IN_A_LOOP: tuple[tuple[str, type[Section], tuple[str, ...], str], ...] = (
    (
        "score",
        Score,
        ("teacher_kind", "selection"),
        "leave it out; a loop trains on the best ids of one teacher",
    ),
    (
        "train",
        Train,
        (
            *("gradient_accumulation_steps", "num_train_epochs", "teacher", "base", "snapshot"),
            *("partial", "allow_off_lineage", "teacher_field"),
        ),
        "leave it out; [loop] sets the data of an update, and [teacher] the scores",
    ),
)
"""(section, its class, keys that a loop does not take, hint)."""


def check_loop(config: RunConfig, prompts: list[Prompt]) -> None:
    """Raise ConfigError for a configuration that no loop can run."""
    longest, budget = _longest(config, prompts), pack_length(config.train)
    sequences = config.loop.prompts_per_round * config.rollout.n
    if config.loop.prompts_per_round > len(prompts):
        raise ConfigError(
            f"loop.prompts_per_round = {config.loop.prompts_per_round}: the file has "
            f"{len(prompts)} prompts",
            hint=f"set loop.prompts_per_round to {len(prompts)} or less",
        )
    if longest > budget:
        raise ConfigError(
            f"train.pack_length = {budget} is less than the longest prompt with its response, "
            f"{longest} tokens, and a sequence never spans packs",
            hint=f"set train.pack_length to {longest} or more, or lower rollout.max_new_tokens",
        )
    if config.loop.updates_per_round > sequences:
        raise ConfigError(
            f"loop.updates_per_round = {config.loop.updates_per_round}: a round has {sequences} "
            "responses, so some updates would have none",
            hint=f"set loop.updates_per_round to {sequences} or less",
        )
    if config.score.extra_ids not in ("", MC_IDS):
        raise ConfigError(
            f"score.extra_ids = {config.score.extra_ids}: distill does not take it",
            hint="leave it out, or give mc; every round is scored once, at the student's own ids",
        )
    if is_file(config.score.positions):
        raise ConfigError(
            f"score.positions = {config.score.positions}: a file lists positions of responses that "
            "are stored already",
            hint="choose positions by a rule in a loop, such as first:100",
        )
    for name, section, keys, hint in _NOT_IN_A_LOOP:
        for key in keys:
            value = getattr(getattr(config, name), key)
            if value != section.model_fields[key].default:
                raise ConfigError(f"{name}.{key} = {value}: distill does not take it", hint=hint)


def packs_per_update(config: RunConfig, prompts: list[Prompt]) -> int:
    """Return the maximum number of packs of an update, for responses of any length.

    First-fit-decreasing leaves at most one pack of a window half empty, so twice the tokens and one
    pack per window are enough; the packs that are not needed are empty and cost almost nothing.
    """
    sequences = -(
        -config.loop.prompts_per_round * config.rollout.n // config.loop.updates_per_round
    )
    tokens = sequences * _longest(config, prompts)
    # A row has 60 bytes of scalars and tokens, and 10 for each entry of the two lists.
    most = 60 + 10 * (config.rollout.student_topk + config.score.teacher_topk_max)
    windows = windows_at_most(tokens * most)
    return min(sequences, 2 * tokens // pack_length(config.train) + windows)


def _longest(config: RunConfig, prompts: list[Prompt]) -> int:
    """Return the maximum number of tokens of a prompt with its response."""
    return max(len(p.token_ids) for p in prompts) + config.rollout.max_new_tokens


def check_name(store: Store, name: str, run: Mapping[str, Any]) -> None:
    """Raise IdentityError if the rollouts `name` are not rounds of this run."""
    for segment in store.head().rollouts(name)[:1]:
        if "run" not in segment.provenance:
            raise IdentityError(
                f"rollouts {name!r} in {store.url} were not made by distill",
                hint="set store.rollouts and run.out to new names",
            )
        check_same(
            f"rollouts {name!r} in {store.url}",
            segment.provenance["run"],
            run,
            hint="resume with the settings of these rollouts, or set store.rollouts and run.out to "
            "new names",
        )
