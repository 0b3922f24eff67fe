"""Flags made from configuration fields: one name, one default and one description for both.

`--max-new-tokens` is `[rollout] max_new_tokens`, and its help is the field's description. A flag
that is absent is not passed on, so the default lives in the sections alone.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import rich_click as click
from pydantic.fields import FieldInfo

from logitcask.cli.completion import COMPLETE
from logitcask.engine.config.parse.other_names import keys_named, suggest
from logitcask.engine.config.parse.toml import Job, validate
from logitcask.engine.config.section import Section
from logitcask.engine.config.training import Lora

F = TypeVar("F", bound=Callable[..., Any])

FLAGS = {
    ("prompts", "file"): "prompts",
    ("store", "url"): "store",
    ("teacher", "name"): "teacher",
    ("train", "args"): "train-arg",
    ("imported", "format"): "from",
    ("runner", "kind"): "runner",
    **{("runner", stage): "actors" for stage in ("rollout", "score")},
    **{("runner", f"{stage}_resources"): "resources" for stage in ("rollout", "score")},
    **{("lora", key): f"lora-{key}" for key in Lora.model_fields},
    ("ablate", "teacher_accuracy"): "eval-teacher-accuracy",
}
"""Flags that are neither their key with dashes nor `--eval-` and the key of [eval]."""

ALIASES = {"learning-rate": "lr"}
"""A second, shorter spelling of a flag."""

PANELS = {
    "student": "Student",
    "teacher": "Teacher",
    "prompts": "Prompts",
    "imported": "Import",
    "store": "Store",
    "rollout": "Sampling",
    "score": "Stored scores",
    "tap": "Tap",
    "estimate": "Sample",
    "cost": "Costs",
    "gc": "Retention",
    "train": "Training",
    "lora": "LoRA",
    "eval": "Evaluation",
    "ablate": "Ablation",
    "probe": "Measurement",
    "reward": "Measurement",
    "positions": "Measurement",
    "correctness": "Measurement",
    "regions": "Measurement",
    "topk": "Measurement",
    "drift": "Measurement",
    "cold_start": "Cold start",
    "best_of_n": "Best of n",
    "prompt_recipe": "Prompts",
    "compatibility": "Measurement",
    "continuation": "Measurement",
    "work": "Workers",
    "runner": "Runner",
    "run": "Run",
}
"""Section -> heading of its flags in `--help`."""

MODEL_KEYS = ["backend", "device", "dtype", "batch_tokens", "seed"]
"""Keys of [run] that every verb with a model shares."""
WORKER_KEYS = ["worker", "worker_name", "lease_seconds", "poll", "max_attempts", "idle_exit"]
"""Keys of [work] that every verb with workers shares."""
RAY_KEYS = ["max_actors", "ray_address", "restarts"]
"""Keys of [runner] that every verb with workers shares, besides those of its own stage."""


def config_options(kind: type[Section], keys: Mapping[str, list[str]]) -> Callable[[F], F]:
    """Add a flag for each {section: [key]} of `kind`, in that order, grouped by section."""

    def decorate(function: F) -> F:
        for section, names in reversed(list(keys.items())):
            fields = kind.model_fields[section].annotation
            assert isinstance(fields, type)
            assert issubclass(fields, Section)
            for name in reversed(names):
                function = _option(section, name, fields.model_fields[name])(function)
        return function

    return decorate


def config_from_flags(kind: type[Job], flags: Mapping[str, Any]) -> Job:
    """Build the configuration from the flags; ConfigError names key, value and rule."""
    return validate(kind, flag_values(flags), source="command line", spell=_flag_of)


def flag_values(flags: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return section -> key -> value of the flags that are there."""
    values: dict[str, dict[str, Any]] = {}
    for dest, value in flags.items():
        section, _, name = dest.partition("__")
        if value not in (None, ()):
            values.setdefault(section, {})[name] = value
    return values


def flags_of(config: Section) -> list[str]:
    """Return the words of a command line with this configuration: what `config_from_flags` reads.

    Values that are the defaults are left out.
    """
    words = []
    for section, content in config:
        for key, field in type(content).model_fields.items():
            value = getattr(content, key)
            if value == field.get_default(call_default_factory=True):
                continue
            flag = _flag_of(f"{section}.{key}")
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            elif isinstance(value, Mapping):
                words += [word for name in value for word in (flag, f"{name}={value[name]}")]
            else:
                text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                words += [flag, text]
    return words


def _flag_of(key: str) -> str:
    """Return the flag of a key: 'gc.keep_days' -> '--keep-days'."""
    section, name = key.split(".")[:2] if "." in key else (key, "")  # a list's place is third
    # `rollout` has a flag --grader too, and both mean the same function.
    prefix = "eval-" if section == "eval" and name != "grader" else ""
    return "--" + FLAGS.get((section, name), prefix + name).replace("_", "-")


def flag_hint(error: click.NoSuchOption) -> str:
    """Return the flags that an unknown one may mean, as the text of a hint; empty without any."""
    name = error.option_name
    params = error.ctx.command.params if error.ctx else []
    known: list[str] = [flag for each in params for flag in (*each.opts, *each.secondary_opts)]
    same = [name.replace("_", "-").lower(), *map(_flag_of, keys_named(name.lstrip("-")))]
    return suggest(name, known, same)


format_option = click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Format of the result on stdout; progress and messages go to stderr.",
)

dry_run_option = click.option(
    "--dry-run",
    is_flag=True,
    help="Check prompts and models, print the resolved configuration as TOML, and stop.",
)


set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a key of the file; repeatable.",
)


def config_file_arguments(function: F) -> F:
    """Add the argument CONFIG, a TOML file, and `--set` to override its keys."""
    return click.argument("config", type=click.Path(path_type=Path))(set_option(function))


def _option(section: str, name: str, field: FieldInfo) -> Callable[[F], F]:
    flag = _flag_of(f"{section}.{name}").removeprefix("--")
    kind = _base_type(field.annotation)
    text = field.description or ""
    if not field.is_required() and field.default not in (None, "", (), {}):
        text += f" [default: {_default(field.default)}]"
    # A pair of flags that is absent would be False without this, and None leaves it to the section.
    # click takes a required flag with a default for a flag that is present.
    absent: dict[str, Any] = {"required": True} if field.is_required() else {"default": None}
    spellings = [f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"]
    if flag in ALIASES:
        spellings.append(f"--{ALIASES[flag]}")
    if kind is dict:
        absent |= {"multiple": True, "metavar": "NAME=VALUE"}
    return click.option(
        *spellings,
        f"{section}__{name}",
        type=_click_type(kind),
        **absent,
        help=text,
        show_default=False,
        panel=PANELS[section],
        shell_complete=COMPLETE.get((section, name)),
    )


def _default(value: Any) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ",".join(map(str, value))
    return str(value).lower()


def _base_type(annotation: Any) -> Any:
    """Return int for `int | None`, `Annotated[int, ...]`, and so on; str for a list."""
    if get_origin(annotation) is tuple:
        return str  # its section splits it
    if get_origin(annotation) is dict:
        return dict  # its section takes NAME=VALUE texts
    options = [a for a in get_args(annotation) if a is not NoneType]
    if get_origin(annotation) is Literal or not options:
        return annotation
    return _base_type(options[0])


def _click_type(kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return click.Choice(list(get_args(kind)))
    if kind is Path:
        return click.Path(path_type=Path)
    return {int: click.INT, float: click.FLOAT, dict: click.STRING, str: click.STRING, bool: None}[
        kind
    ]
