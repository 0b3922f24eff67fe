"""The values of a first configuration, checked as far as nothing has to be downloaded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcask.engine.commands.resolve import read_fitting
from logitcask.engine.config.parse.toml import merge_tables, read_tables, resolve_paths, validate
from logitcask.engine.config.prompts import Columns, is_hub
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.config.training import Train
from logitcask.engine.errors import ConfigError, ModelError, PromptError
from logitcask.engine.estimate.sizes import find_size
from logitcask.engine.models.identity import HUB_ID, context_length, local_folder, resolve_model
from logitcask.engine.models.weight_files import check_own_files
from logitcask.engine.prompts.lines import FORM
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.prompts.source import Source, no_file, open_source
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.recipes.named import PAIRS, load_recipe, recipe_names
from logitcask.engine.teachers.remote import is_remote
from logitcask.engine.teachers.token_maps import OtherVocabulary, compare_folders

Tables = dict[str, Any]
"""Section -> key -> value."""

STORE = "store"
ROUNDS, PROMPTS_PER_ROUND = 100, 64
MAX_NEW_TOKENS = 2048

OVER_SPANS = "span_advantage"
"""Objective for a teacher with another tokenizer."""

RATES = (
    (1e7, 1e-3, "make demo, with 0.4 million parameters"),
    (5e8, 1e-4, "bench/bench_real.py, with SmolLM2-135M"),
)
"""(parameters of the student at most, learning rate, its source). Larger ones have the default of
the configuration, which is that of arXiv 2604.13016."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """The choices of a user; a recipe for a pair replaces those that are empty."""

    student: str = ""
    teacher: str = ""
    prompts: str = ""
    chat_template: bool | None = None
    recipe: str = ""

    @property
    def tables(self) -> Tables:
        """Return section -> key -> value of the recipe."""
        return load_recipe(self.recipe).tables if self.recipe else {}

    def with_recipe(self) -> "Answers":
        """Return the answers with those of the recipe in place of empty ones."""
        tables = self.tables
        template = tables.get("prompts", {}).get("chat_template")
        return Answers(
            student=self.student or tables.get("student", {}).get("model", ""),
            teacher=self.teacher or tables.get("teacher", {}).get("model", ""),
            prompts=self.prompts or tables.get("prompts", {}).get("file", ""),
            chat_template=template if self.chat_template is None else self.chat_template,
            recipe=self.recipe,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """Checked values of a configuration."""

    values: Tables
    notes: tuple[str, ...]
    """Choices that were made, and things that were not looked at."""


def draft(answers: Answers, base: Path, overrides: Sequence[str] = ()) -> Draft:
    """Choose the values of a configuration, and check them as far as nothing is downloaded.

    base: folder of the file, to which its paths are relative. overrides: texts section.key=value,
    above a recipe, which is above the values that follow from the pair. Raises ConfigError,
    ModelError, PromptError, and IdentityError for tokenizers that do not fit.
    """
    answers = answers.with_recipe()
    student, teacher = find_model(answers.student), find_model(answers.teacher, remote=True)
    section = answers.tables.get("prompts", {})
    columns = {key: value for key, value in section.items() if key in Columns.model_fields}
    source = find_prompts(answers.prompts, Columns(**columns))
    own, notes = _of_pair(answers, student, teacher)
    own["run"]["out"], own["store"]["rollouts"] = _free(base)
    if source is not None:
        count = sum(1 for _ in source.texts())
        own["loop"]["prompts_per_round"] = min(PROMPTS_PER_ROUND, count)
    chosen = {
        "student": {"model": _placed(answers.student, base)},
        "teacher": {"model": _placed(answers.teacher, base)},
        "prompts": {
            "file": _placed(answers.prompts, base),
            "chat_template": _template(answers, source, student),
        },
    }
    values = read_tables(None, overrides, merge_tables(merge_tables(own, answers.tables), chosen))
    config = resolve_paths(validate(RunConfig, values, source="the new configuration"), base)
    if overrides:  # the rest is known to train; this check loads torch
        from logitcask.engine.recipes.dry_run import check_settings

        check_settings(config)
    if source is not None and config.loop.prompts_per_round > count:
        raise ConfigError(
            f"loop.prompts_per_round = {config.loop.prompts_per_round}: {answers.prompts} has "
            f"{count} prompts",
            hint=f"give --set loop.prompts_per_round={count}, or more prompts",
        )
    if source is not None and student is not None:
        rendering = Rendering(
            chat_template=bool(config.prompts.chat_template),
            drop_last_assistant=config.prompts.drop_last_assistant,
            system_prompt=config.prompts.system_prompt,
        )
        # The first shows the form; `distill --dry-run` reads all of them.
        new = config.rollout.max_new_tokens
        read_fitting(source, load_tokenizer(student), student, rendering, new, limit=1)
    return Draft(values=values, notes=tuple(notes))


def _of_pair(
    answers: Answers, student: Path | None, teacher: Path | None
) -> tuple[Tables, list[str]]:
    """Return the values that follow from the models, and notes."""
    rate, rate_source = learning_rate(answers.student)
    names = {"teacher": {"name": score_name(answers.teacher)}}
    new, notes = MAX_NEW_TOKENS, []
    for name, folder in ((answers.student, student), (answers.teacher, teacher)):
        if folder is None and not is_remote(name):
            notes.append(f"{name} is not on this machine yet: `distill` downloads it")
    if student is not None:
        new = min(new, max(1, context_length(student) // 2))
    objective = Train().objective
    if student is not None and teacher is not None:
        try:
            shared = compare_folders(student, teacher, answers.teacher)
        except OtherVocabulary as other:
            shared, objective = None, OVER_SPANS
            notes.append(
                f"{other.cause}, so its scores are of spans, and the objective is {OVER_SPANS}"
            )
        if shared is not None:
            names["teacher"]["student_tokenizer"] = answers.student
            notes.append(shared.note(answers.teacher))
    if rate_source and not answers.recipe:
        notes.append(f"learning_rate = {rate:g} is that of {rate_source}: a value to begin with")
    if not answers.recipe and (pair := known_pair(answers)):
        notes.append(f"--recipe {pair} has published settings of this pair")
    return {
        **names,
        "store": {"url": STORE},
        "rollout": {"n": 4, "max_new_tokens": new},
        "eval": {"max_new_tokens": new},
        "train": {"objective": objective, "learning_rate": rate},
        "loop": {"rounds": ROUNDS, "prompts_per_round": PROMPTS_PER_ROUND},
        "run": {},
    }, notes


def find_model(name: str, *, remote: bool = False) -> Path | None:
    """Return the folder of a model that is on this machine; None for a hub id or URL that is not.

    remote: a URL is right too. Raises ModelError for other text, and for a folder that is no model.
    """
    if remote and is_remote(name):
        return None
    folder = local_folder(name)
    if folder is None and HUB_ID.fullmatch(name):
        try:
            folder = resolve_model(name, weights=False, download=False)
        except ModelError:  # not in the cache
            return None
    # Raises for a text that is no name.
    folder = resolve_model(name, weights=False) if folder is None else folder
    check_own_files(folder)
    load_tokenizer(folder)
    context_length(folder)
    return folder


def find_prompts(file: str, columns: Columns | None = None) -> Source | None:
    """Open the prompts, and check the first; None for a data set on the Hub.

    Raises PromptError.
    """
    if is_hub(Path(file)):
        return None
    source = open_source(Path(file).expanduser(), columns)
    try:
        first = next(source.lines(), None)
    except OSError as error:
        raise no_file(source.file, error) from error
    if first is None:
        raise PromptError(f"{file} holds no prompt", hint=FORM)
    first.content(drop_last_assistant=False)
    return source


def needs_template(source: Source | None, student: Path | None) -> bool | None:
    """Return whether prompts are rendered by the chat template; None where only the user knows."""
    if source is None:
        return None
    first = next(source.lines())
    if student is None:
        return True if first.is_chat else None
    has = bool(load_tokenizer(student).chat_template)
    return has if first.is_chat or not has else None


def _free(base: Path) -> tuple[str, str]:
    """Return names of a run and of its rollouts that no earlier run in this folder has."""
    number = 1
    while (base / (name := "run" if number == 1 else f"run-{number}")).exists():
        number += 1
    return name, "main" if number == 1 else name


def _template(answers: Answers, source: Source | None, student: Path | None) -> bool:
    chosen = answers.chat_template
    chosen = needs_template(source, student) if chosen is None else chosen
    if chosen is None:
        raise ConfigError(
            f"{answers.prompts}: its prompts may be turns of a chat, or texts to continue",
            hint="give --chat-template (each prompt becomes a user turn) or --no-chat-template",
        )
    return chosen


def learning_rate(student: str) -> tuple[float, str]:
    """Return the learning rate for a student of its size, and its source, empty for the default."""
    try:
        parameters = find_size(student, "student", parameters=None).parameters
    except ModelError:  # a size that is not known
        parameters = float("inf")
    for most, rate, source in RATES:
        if parameters <= most:
            return rate, source
    return Train().learning_rate, ""


def score_name(teacher: str) -> str:
    """Return a name for the scores of a teacher: the last part of its own, in allowed letters."""
    if is_remote(teacher):
        return "teacher"
    last = teacher.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", last).lstrip("._-")[:128] or "teacher"


def known_pair(answers: Answers) -> str:
    """Return the recipe of these two models, or ""."""
    for name in (name for name, kind in recipe_names().items() if kind == PAIRS):
        tables = load_recipe(name).tables
        pair = (tables["student"]["model"], tables["teacher"]["model"])
        if pair == (answers.student, answers.teacher):
            return name
    return ""


def _placed(name: str, base: Path) -> str:
    """Return a path as the file in `base` writes it; a hub id or a URL stays as it is."""
    path = Path(name).expanduser()
    if is_remote(name) or is_hub(Path(name)) or not path.exists():
        return name
    same = base.resolve() == Path.cwd() and not name.startswith("~")
    return name if same else str(path.resolve())
