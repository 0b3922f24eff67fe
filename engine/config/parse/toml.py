"""Configuration from TOML and from flags, and back. An unknown key is an error that names the
nearest known one.
"""

import json
import reprlib
import tomllib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from logitcask.engine.config.parse.other_names import keys_named, suggest
from logitcask.engine.config.prompts import is_hub
from logitcask.engine.config.section import Section, parse_value
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.config.teacher import FILE, is_file
from logitcask.engine.errors import ConfigError

Job = TypeVar("Job", bound=Section)


def validate(
    kind: type[Job],
    values: Mapping[str, Any],
    *,
    source: str,
    spell: Callable[[str], str] = str,
) -> Job:
    """Validate {section: {key: value}} as a frozen `kind`; ConfigError names key, value and rule.

    source: where the values are from; spell: section.key -> how it is written there.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = list(keys_of(kind))
            # A key of a known section is misspelt itself, so its section is no suggestion.
            section, _, name = key.rpartition(".")
            keys = [each for each in known if section and each.startswith(f"{section}.")]
            keys = keys or [each for each in known if "." not in each]
            # One of the same section first, else any: `train.output_dir` is `run.out`.
            same = [each for each in keys_named(name) if each in known]
            same.sort(key=lambda each: each not in keys)
            raise ConfigError(
                f"{source}: unknown key {key}",
                hint=suggest(key, [*keys, *same], same[:1]) or f"known keys: {', '.join(keys)}",
            ) from None
        if first["type"] == "missing":
            raise ConfigError(
                f"{source}: {key} is missing", hint=f"give {key}: {_describe(kind, first['loc'])}"
            ) from None
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):  # of a validator that knows the way out
            raise ConfigError(f"{source}: {spell(key)}: {cause.cause}", hint=cause.hint) from None
        rule = _RULES.get(first["type"]) or first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"{source}: {spell(key)} = {_shown(first['input'])}: {rule}",
            hint=f"{spell(key)}: {_describe(kind, first['loc'])}",
        ) from None


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200


def _shown(value: Any) -> str:
    """Format a value of any size and depth."""
    try:
        return _REPR.repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes
        return f"a value of type {type(value).__name__}"


_RULES = {
    "string_pattern_mismatch": "names have 1 to 128 of a-z 0-9 . _ -, the first a letter or digit, "
    "as qwen3-4b",
}
"""Kinds of errors whose own words are for programmers."""


def read_toml(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a RunConfig from a TOML file and `section.key=value` overrides, paths relative to it."""
    return read_job(RunConfig, path, overrides)


def read_job(kind: type[Job], path: Path, overrides: Iterable[str] = ()) -> Job:
    """Read any configuration from a TOML file and overrides."""
    values = read_tables(path, overrides)
    return resolve_paths(validate(kind, values, source=str(path)), path.parent)


def read_tables(
    path: Path | None, overrides: Iterable[str] = (), below: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return section -> key -> value of a TOML file with overrides, not validated.

    path: None for no file; below: tables whose keys the file may override.
    """
    values: dict[str, Any] = {} if path is None else _load(path)
    if below is not None:
        values = merge_tables(below, values)
    for text in overrides:
        _override(values, text)
    return values


def merge_tables(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables with all keys of both; where both have a key, that of `above`."""
    merged = {name: dict(keys) for name, keys in below.items()}
    for name, keys in above.items():
        # A section that is none is refused by validate.
        merged[name] = {**merged.get(name, {}), **keys} if isinstance(keys, Mapping) else keys
    return merged


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}", hint="give the path of a TOML file"
        ) from error
    except (ValueError, RecursionError) as error:
        # Also bytes that are not UTF-8, and numbers and nesting beyond what Python reads.
        raise ConfigError(f"{path}: not TOML: {error}", hint="repair the file there") from error


def to_toml(config: Section, missing: Container[str] = ()) -> str:
    """Return the configuration as TOML that `read_toml` reads from any folder to the same.

    missing: section.key of each key whose value is only a stand-in: it becomes a comment.
    """
    lines: list[str] = []
    for section, content in resolve_paths(config, Path.cwd()).model_dump(mode="json").items():
        lines.append(f"[{section}]")
        for key, value in content.items():
            if f"{section}.{key}" in missing:
                lines.append(f"# {key} = ")
            # JSON's strings, numbers and booleans are TOML's too; one without a value is left out.
            elif value not in (None, {}):
                lines.append(f"{key} = {toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """Return a value of JSON as TOML, which differs in its tables alone."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_value(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    # TOML takes no escapes of halves of a character, and no DEL as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        raise ConfigError(
            f"--set {text}: not section.key=value", hint="e.g. --set train.learning_rate=1e-5"
        )
    *tables, last = f"{section}.{name}".split(".")
    content: Any = values
    for table in tables:
        content = content.setdefault(table, {})
        if not isinstance(content, dict):
            raise ConfigError(
                f"--set {text}: {table} is not a section", hint=f"write [{table}] in the file"
            )
    content[last] = parse_value(value)


_MODELS = ("model", "tokenizer", "student_tokenizer")
_STORES = (("store", "url"), ("eval", "store"))


def resolve_paths(config: Job, base: Path) -> Job:
    """Return the configuration with `base` before its relative paths."""
    update = {}
    for name in type(config).model_fields:
        section: Section = getattr(config, name)
        changed: dict[str, Any] = {}
        for key, value in section:
            if isinstance(value, Path):
                changed[key] = value if is_hub(value) else base / value
            elif not isinstance(value, str) or not value:
                continue
            elif key == "positions" and is_file(value):
                changed[key] = f"{FILE}{base / value.removeprefix(FILE)}"
            # A hub id and a relative folder look alike: it is a folder if there is one.
            elif (key in _MODELS and (base / value).is_dir()) or (
                (name, key) in _STORES and "://" not in value
            ):
                changed[key] = str(base / value)
        update[name] = section.model_copy(update=changed)
    return config.model_copy(update=update)


def keys_of(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the sections, and section.key of each."""
    for name, field in kind.model_fields.items():
        yield prefix + name
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys_of(inner, f"{prefix}{name}.")


def fields_of(section: str) -> dict[str, FieldInfo]:
    """Return the keys of a section of RunConfig, each with its default and its help."""
    kind = RunConfig.model_fields[section].annotation
    assert isinstance(kind, type)
    assert issubclass(kind, BaseModel)
    return kind.model_fields


def _describe(kind: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    field = kind.model_fields[str(loc[0])]
    inner = field.annotation
    if isinstance(inner, type) and issubclass(inner, BaseModel):
        if len(loc) > 1:
            return _describe(inner, loc[1:])
        return "a section with " + ", ".join(inner.model_fields)
    return field.description or str(loc[0])
