"""Checks of a loop before anything is paid for, and the sizes that follow from its settings."""

from collections.abc import Mapping
from typing import Any

from logitcask.engine.config.runner import Work
from logitcask.engine.config.section import Section
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.config.teacher import Score, TeacherMix, is_file
from logitcask.engine.config.training import Train
from logitcask.engine.errors import ConfigError, IdentityError
from logitcask.engine.packing.plan import windows_at_most
from logitcask.engine.store import Store
from logitcask.engine.teachers.refreshes import LONGEST_NAME
from logitcask.engine.training.run_dir.files import check_same
from logitcask.engine.types import MC_IDS, PACK_LENGTH, ModelRef, Prompt

_NOT_IN_A_LOOP: tuple[tuple[str, type[Section], tuple[str, ...], str], ...] = (
    (
        "score",
        Score,
        ("selection",),
        "leave it out; a loop trains on the best ids of one teacher",
    ),
    (
        "train",
        Train,
        (
            *("gradient_accumulation_steps", "num_train_epochs", "teacher", "base", "snapshot"),
            *("partial", "allow_off_lineage", "teacher_field", *TeacherMix.model_fields),
        ),
        "leave it out; [loop] sets the data of an update, and [teacher] the scores",
    ),
    (
        "work",
        Work,
        ("worker", "idle_exit", "max_unscored", "prompts_per_version"),
        "leave it out; a role of a loop stays until its work is done, and "
        "loop.max_unscored_bytes bounds what waits for scores",
    ),
)
"""(section, its class, keys that a loop does not take, hint)."""


def check_loop(config: RunConfig, prompts: list[Prompt]) -> None:
    """Raise ConfigError for a configuration that no loop can run."""
    longest, budget = longest_of(config, prompts), pack_length(config.train)
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
    check_keys(config)


def check_keys(config: RunConfig) -> None:
    """Raise ConfigError for keys that no loop can run with, whatever its prompts and models are."""
    sequences = config.loop.prompts_per_round * config.rollout.n
    if config.loop.updates_per_round > sequences:
        raise ConfigError(
            f"loop.updates_per_round = {config.loop.updates_per_round}: a round has {sequences} "
            "responses, so some updates would have none",
            hint=f"set loop.updates_per_round to {sequences} or less",
        )
    age, updates = config.loop.max_age, config.loop.updates_per_round
    if 0 < age < updates:
        raise ConfigError(
            f"loop.max_age = {age}: a version is published every {updates} updates "
            "(loop.updates_per_round), so no round could begin before the end of the one before it",
            hint=f"set loop.max_age to {updates} or more, or to 0",
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
    if config.score.same_texts:
        raise ConfigError(
            f"score.same_texts = {config.score.same_texts}: distill does not take it",
            hint="leave it out: every round of a loop has texts of its own",
        )
    if config.score.teacher_kind == "base":
        raise ConfigError(
            "score.teacher_kind = base: distill does not take it",
            hint="leave it out, or give context; a loop trains on the scores of one teacher",
        )
    if config.teacher.follow:
        _check_follow(config)
    for name, section, keys, hint in _NOT_IN_A_LOOP:
        for key in keys:
            value = getattr(getattr(config, name), key)
            if value != section.model_fields[key].default:
                raise ConfigError(f"{name}.{key} = {value}: distill does not take it", hint=hint)


def _check_follow(config: RunConfig) -> None:
    """Raise ConfigError for a teacher that cannot follow the student."""
    teacher, updates = config.teacher, config.loop.updates_per_round
    follow = f"teacher.follow = {teacher.follow}"
    student = (config.student.model, config.student.revision)
    if teacher.model and (teacher.model, teacher.revision) != student:
        raise ConfigError(
            f"{follow}: the teacher is the student, {student[0]}, and teacher.model is "
            f"{teacher.model}",
            hint="leave teacher.model and teacher.revision out",
        )
    if teacher.follow_every % updates:
        raise ConfigError(
            f"teacher.follow_every = {teacher.follow_every}: a version is published every "
            f"{updates} updates (loop.updates_per_round)",
            hint=f"set teacher.follow_every to a multiple of {updates}, or to 0",
        )
    if len(teacher.name) > LONGEST_NAME:
        raise ConfigError(
            f"teacher.name has {len(teacher.name)} characters, and each refresh adds its version",
            hint=f"give a name of at most {LONGEST_NAME} characters",
        )
    if config.run.backend == "server":
        raise ConfigError(
            f"run.backend = server with {follow}: a server does not load versions of the student",
            hint="leave run.backend out, or set it to hf or vllm",
        )
    if config.lora.load_in_4bit and (teacher.follow == "ema" or teacher.follow_every > updates):
        raise ConfigError(
            f"lora.load_in_4bit = true with {follow}: weights in 4 bits are not published",
            hint="leave it out, or set teacher.follow = student and leave follow_every out",
        )


def check_inline(config: RunConfig) -> None:
    """Raise ConfigError for what a loop in one process cannot do."""
    if config.loop.max_age:
        raise ConfigError(
            f"loop.max_age = {config.loop.max_age}: one process samples with its newest student",
            hint="run the loop with --runner processes, or set loop.max_age to 0",
        )
    if config.teacher.follow and config.run.backend == "vllm":
        raise ConfigError(
            f"run.backend = {config.run.backend} with teacher.follow = {config.teacher.follow}: in "
            "one process the model in training scores too",
            hint="run the loop with --runner processes, or set run.backend to hf",
        )


def follow_note(config: RunConfig) -> str:
    """Return a note on a teacher that has nothing to teach; empty for others."""
    if not config.teacher.follow or config.score.teacher_kind == "context":
        return ""
    same = "is the student" if config.teacher.follow == "student" else "is its average"
    return (
        f"warning: teacher.follow = {config.teacher.follow} without score.teacher_kind = context: "
        f"the teacher {same} and reads the same prompts, so the divergence from it is about 0"
    )


def packs_per_update(config: RunConfig, prompts: list[Prompt]) -> int:
    """Return the maximum number of packs of an update, for responses of any length.

    First-fit-decreasing leaves at most one pack of a window half empty, so twice the tokens and one
    pack per window are enough; the packs that are not needed are empty and cost almost nothing.
    """
    sequences = -(
        -config.loop.prompts_per_round * config.rollout.n // config.loop.updates_per_round
    )
    tokens = sequences * longest_of(config, prompts)
    # A row has 60 bytes of scalars and tokens, and 10 for each entry of the two lists.
    most = 60 + 10 * (config.rollout.student_topk + config.score.teacher_topk_max)
    windows = windows_at_most(tokens * most)
    return min(sequences, 2 * tokens // pack_length(config.train) + windows)


def longest_of(config: RunConfig, prompts: list[Prompt]) -> int:
    """Return the maximum number of tokens of a prompt with its response."""
    return max(len(p.token_ids) for p in prompts) + config.rollout.max_new_tokens


def check_name(store: Store, name: str, run: Mapping[str, Any], model: ModelRef) -> None:
    """Raise IdentityError if the rollouts `name` are not rounds of this run of this student."""
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
        ours = list(model.stop_ids)
        if (theirs := segment.provenance["student"].get("stop_ids", ours)) != ours:
            raise IdentityError(
                f"rollouts {name!r} in {store.url} end at the stop ids {theirs}, those of "
                f"{model.name} are {ours}",
                hint="restore the generation_config.json and config.json of that student, or set "
                "store.rollouts and run.out to new names",
            )


def pack_length(train: Train) -> int:
    """Return the tokens of a pack, one number for all rounds: their lengths are not known before.

    All packs of a share make one update, so a long one costs no update.
    """
    return train.pack_length or PACK_LENGTH
