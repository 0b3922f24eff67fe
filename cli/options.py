"""Flags made from configuration fields: one default, one description, one name.

`--max-new-tokens` is `[rollout] max_new_tokens`; its help is the field's description. A flag that
is not given is not passed on, so the default lives in the sections alone.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import rich_click as click
from pydantic.fields import FieldInfo

from logitcask.engine.config.section import Section
from logitcask.engine.config.toml import Job, validate

F = TypeVar("F", bound=Callable[..., Any])

FLAGS = {
    ("prompts", "file"): "prompts",
    ("store", "url"): "store",
    ("teacher", "name"): "teacher",
    ("ablate", "teacher_accuracy"): "eval-teacher-accuracy",
    ("eval", "prompts"): "eval-prompts",
    ("eval", "store"): "eval-store",
    ("eval", "rollouts"): "eval-rollouts",
    ("eval", "teacher"): "eval-teacher",
    ("eval", "snapshot"): "eval-snapshot",
    ("eval", "n"): "eval-n",
    ("eval", "every"): "eval-every",
    ("eval", "temperature"): "eval-temperature",
    ("eval", "top_p"): "eval-top-p",
    ("eval", "max_new_tokens"): "eval-max-new-tokens",
}
"""Where a flag is not its key with dashes: the field is named by its section."""

PANELS = {
    "student": "Student",
    "teacher": "Teacher",
    "prompts": "Prompts",
    "store": "Store",
    "rollout": "Sampling",
    "score": "What is kept",
    "estimate": "Sample",
    "gc": "What stays",
    "train": "Training",
    "eval": "Evaluation",
    "ablate": "Ablation",
    "probe": "Measurement",
    "work": "Workers",
    "run": "Run",
}
"""Section -> heading of its flags in `--help`."""

MODEL_FLAGS = ["backend", "device", "dtype", "batch_tokens", "seed"]
"""Keys of [run] that every verb with a model shares."""
WORK_FLAGS = ["watch", "worker", "lease", "poll", "attempts", "idle_exit"]
"""Keys of [work] that every verb with workers shares."""


def job_options(kind: type[Section], keys: Mapping[str, list[str]]) -> Callable[[F], F]:
    """Adds a flag for each {section: [key]} of `kind`, in that order, grouped by section."""

    def decorate(function: F) -> F:
        for section, names in reversed(list(keys.items())):
            fields = kind.model_fields[section].annotation
            assert isinstance(fields, type)
            assert issubclass(fields, Section)
            for name in reversed(names):
                function = _option(section, name, fields.model_fields[name])(function)
        return function

    return decorate


def job_from_flags(kind: type[Job], flags: Mapping[str, Any]) -> Job:
    """The job that the given flags describe; ConfigError names key, value and rule."""
    values: dict[str, dict[str, Any]] = {}
    for dest, value in flags.items():
        section, _, name = dest.partition("__")
        if value is not None:
            values.setdefault(section, {})[name] = value
    return validate(kind, values, source="command line", spell=_flag_of)


def _flag_of(key: str) -> str:
    """'gc.keep_days' -> '--keep-days'."""
    section, _, name = key.partition(".")
    return "--" + FLAGS.get((section, name), name).replace("_", "-")


def format_option(function: F) -> F:
    """`--format`: how the result is printed on stdout."""
    return click.option(
        "--format",
        "form",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="How the result is printed; progress and messages go to stderr.",
    )(function)


def dry_run_option(function: F) -> F:
    return click.option(
        "--dry-run", is_flag=True, help="Print the resolved configuration as TOML and stop."
    )(function)


def _option(section: str, name: str, field: FieldInfo) -> Callable[[F], F]:
    flag = _flag_of(f"{section}.{name}").removeprefix("--")
    kind = _plain(field.annotation)
    text = field.description or ""
    if not field.is_required() and field.default not in (None, ""):
        text += f" [default: {str(field.default).lower()}]"
    # Said, because a pair of flags that is not given would be False, and None asks the engine; not
    # said of a required one, because click would take it as given.
    absent: dict[str, Any] = {"required": True} if field.is_required() else {"default": None}
    return click.option(
        f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}",
        f"{section}__{name}",
        type=_click_type(kind),
        **absent,
        help=text,
        show_default=False,
        panel=PANELS[section],
    )


def _plain(annotation: Any) -> Any:
    """int of `int | None`, of `Annotated[int, ...]`, and so on."""
    options = [a for a in get_args(annotation) if a is not NoneType]
    if get_origin(annotation) is Literal or not options:
        return annotation
    return _plain(options[0])


def _click_type(kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return click.Choice(list(get_args(kind)))
    if kind is Path:
        return click.Path(path_type=Path)
    return {int: click.INT, float: click.FLOAT, str: click.STRING, bool: None}[kind]
