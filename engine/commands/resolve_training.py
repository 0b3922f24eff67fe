"""Resolve the names in a configuration to the objective and the evaluations of a training.

Apart from resolve.py, because transformers' Trainer takes seconds to import.
"""

import re
from difflib import get_close_matches

from logitcask.engine.commands.load_teacher import live_backend
from logitcask.engine.commands.resolve import decoder, read_fitting, snapshot_of
from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Eval, Train
from logitcask.engine.errors import ConfigError
from logitcask.engine.objectives import PRESETS, Preset, parse_objective
from logitcask.engine.prompts.graders import open_grader
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.store import open_store
from logitcask.engine.store.inspect import choose, choose_teacher
from logitcask.engine.training.evaluation import EvalPlan
from logitcask.engine.training.held_out import HeldOutSet
from logitcask.engine.types import ModelRef


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


def eval_plan(settings: Eval, run: Run, model: ModelRef, template: bool) -> EvalPlan | None:
    """Return the evaluation of [eval] with the tokenizer of `model`; None if it names no prompts.

    Raises PromptError, and ConfigError for a grader that is not there.
    """
    if settings.prompts is None:
        return None
    tokenizer = load_tokenizer(model.path)
    prompts = read_fitting(
        settings.prompts, tokenizer, model.path, template, settings.max_new_tokens, "eval."
    )
    return EvalPlan(
        prompts=prompts,
        sampling=settings,
        grader=open_grader(settings.grader, prompts),
        grader_name=settings.grader,
        decode=decoder(tokenizer),
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
