"""From the names in a configuration to the objects that a stage works on."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from logitcask.engine.commands.load_teacher import live_backend
from logitcask.engine.config.sections import Prompts, Rollout, Run, Student
from logitcask.engine.config.training import Eval, Train
from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.models import identity
from logitcask.engine.objectives import PRESETS, Preset, parse_objective
from logitcask.engine.prompts.graders import Decode, Grader, open_grader
from logitcask.engine.prompts.prompts import chat_template_for, load_tokenizer, read_prompts
from logitcask.engine.store import Snapshot, Store, open_store
from logitcask.engine.store.inspect import choose, choose_teacher
from logitcask.engine.training.evaluation import EvalPlan
from logitcask.engine.training.held_out import HeldOutSet
from logitcask.engine.types import ModelRef, Prompt


def snapshot_of(store: Store, text: str) -> Snapshot:
    """Return the snapshot of a log number or a tag."""
    return store.snapshot(int(text) if text.isdecimal() else text)


def student_and_prompts(
    student: Student, prompts: Prompts, rollout: Rollout
) -> tuple[ModelRef, list[Prompt], bool]:
    """Return the student's reference, its prompts, and whether the chat template rendered them.

    Every prompt leaves room for max_new_tokens in the student's context.
    """
    path = identity.resolve_model(student.model, student.revision)
    tokenizer = load_tokenizer(path)
    template = chat_template_for(prompts.file, tokenizer, prompts.chat_template)
    model = identity.model_ref(
        student.model, revision=student.revision, chat_template=template, tokenizer=tokenizer
    )
    read = _read(prompts.file, tokenizer, path, template, rollout.max_new_tokens)
    return model, read, template


def eval_plan(settings: Eval, run: Run, model: ModelRef, template: bool) -> EvalPlan | None:
    """Return the evaluation of [eval] with the tokenizer of `model`; None if it names no prompts.

    Raises PromptError, and ConfigError for a grader that is not there.
    """
    if settings.prompts is None:
        return None
    tokenizer = load_tokenizer(model.path)
    prompts = _read(
        settings.prompts, tokenizer, model.path, template, settings.max_new_tokens, "eval."
    )
    return EvalPlan(
        prompts=prompts,
        sampling=settings,
        grader=open_grader(settings.grader, prompts),
        grader_name=settings.grader,
        decode=_decoder(tokenizer),
        sampler=lambda student: live_backend(student, model, run),
        seed=run.seed,
        every=settings.every,
    )


def held_out_set(settings: Eval, url: str, base: str | None = None) -> HeldOutSet | None:
    """Return the held-out rows that [eval] names, or None. `url` is the store of the training,
    `base` its scores of a base model, which are used here too if they have that name.

    Raises ConfigError where the choice is not clear, IncompleteError where there is none.
    """
    named = (settings.store, settings.rollouts, settings.teacher, settings.snapshot)
    if all(each is None for each in named):
        return None
    store = open_store(settings.store or url)
    snapshot = store.head() if settings.snapshot is None else snapshot_of(store, settings.snapshot)
    return HeldOutSet(
        store=store,
        rollouts=choose(
            snapshot.names("rollout"), settings.rollouts, what="eval-rollouts", where=store.url
        ),
        teacher=choose_teacher(snapshot, settings.teacher, what="eval-teacher", where=store.url),
        base=base if base in snapshot.names("score") else None,
        snapshot=None if settings.snapshot is None else snapshot,
        every=settings.every,
    )


def grader_of(rollout: Rollout, model: ModelRef, prompts: Sequence[Prompt]) -> Grader | None:
    """Return the grader of [rollout], or None.

    Raises as open_grader does.
    """
    if not rollout.grader:
        return None
    grader = open_grader(rollout.grader, prompts)
    decode = _decoder(load_tokenizer(model.path))
    return Grader(name=rollout.grader, grader=grader, decode=decode)


def _decoder(tokenizer: Any) -> Decode:
    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    return decode


def _read(
    file: Path, tokenizer: Any, folder: Path, template: bool, max_new_tokens: int, of: str = ""
) -> list[Prompt]:
    """Read prompts that leave room for the response in the context of the model in `folder`. `of`
    is the prefix of the key for its length.
    """
    context = identity.context_length(folder)
    if max_new_tokens >= context:
        raise ConfigError(
            f"{of}max_new_tokens = {max_new_tokens}: the student's context of {context} tokens "
            "leaves no room for a prompt",
            hint=f"give --{of.replace('.', '-')}max-new-tokens less than {context}",
        )
    return read_prompts(
        file, tokenizer, chat_template=template, max_prompt_tokens=context - max_new_tokens
    )


def student_of(student: Student, snapshot: Snapshot, rollouts: str) -> ModelRef:
    """Return the reference of a student for a training on these rollouts."""
    return identity.model_ref(
        student.model, revision=student.revision, chat_template=rendered(snapshot, rollouts)
    )


def rendered(snapshot: Snapshot, rollouts: str) -> bool:
    segments = snapshot.rollouts(rollouts)
    if not segments:
        known = ", ".join(snapshot.names("rollout")) or "none"
        raise IncompleteError(
            f"the store holds no rollouts named {rollouts!r}; it has: {known}",
            hint="run `logitcask rollout` first, or give --rollouts one of these",
        )
    # The digest is in the rollouts of every sampler, the plain field only in those of our commands.
    template: str = segments[0].lineage["student"]["template"]
    return template != identity.template_digest(None, False)


def find_objective(settings: Train) -> Preset:
    """Return the preset that [train] names; ConfigError names the nearest known one."""
    name = re.split(r"[(+]", settings.objective)[0].strip()
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"--objective {settings.objective}: no preset of this name",
            hint=f"the nearest is {near}; known: {', '.join(PRESETS)}",
        )
    return parse_objective(settings.objective, k=settings.loss_topk)
