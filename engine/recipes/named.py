"""Named settings: TOML files of this package that a configuration may begin with.

    settings/NAME.toml  an objective or a schedule, for any student and teacher
    pairs/NAME.toml     a whole configuration, with the models of a published run

A file has a table [recipe], and the keys of `logitcask distill` that it sets. With `settings` in
[recipe] it adds to another one. A recipe is the lowest layer: recipe < file < --set.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcask.engine.config.parse.other_names import suggest
from logitcask.engine.config.parse.toml import (
    keys_of,
    merge_tables,
    read_tables,
    resolve_paths,
    toml_value,
    validate,
)
from logitcask.engine.config.section import Section
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.errors import ConfigError

PAIRS = "pairs"
KINDS = ("settings", PAIRS)
"""Folders of recipes; one name stands in one of them."""
HEADER = "recipe"
"""Table of a recipe about itself."""

Tables = dict[str, Any]
"""Section -> key -> value."""


class Header(Section):
    """The table [recipe]."""

    about: str
    source: str
    """Paper and its table or equation, repository and file."""
    settings: str = ""
    """Recipe whose keys come first."""
    differs: tuple[str, ...] = ()
    """Every difference from the source."""
    unverified: tuple[str, ...] = ()
    """Facts that were not checked."""


class _File(Section):
    recipe: Header


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A named part of a configuration."""

    name: str
    kind: str
    header: Header
    tables: Tables
    """All keys that it sets, those of its `settings` too."""

    @property
    def keys(self) -> list[str]:
        """Return section.key of each key that it sets."""
        return [f"{section}.{key}" for section, keys in self.tables.items() for key in keys]


def recipe_names() -> dict[str, str]:
    """Return name -> kind of all recipes."""
    folder = Path(__file__).parent
    return {path.stem: kind for kind in KINDS for path in sorted((folder / kind).glob("*.toml"))}


def load_recipe(name: str) -> Recipe:
    """Read a recipe. Raises ConfigError for a name that there is not, with the nearest one."""
    names = recipe_names()
    if name not in names:
        near = suggest(name, names)
        raise ConfigError(
            f"there is no recipe {name!r}",
            hint=f"{near and f'{near}; '}`logitcask recipe list` shows all",
        )
    path = Path(__file__).parent / names[name] / f"{name}.toml"
    tables: Tables = tomllib.loads(path.read_text(encoding="utf-8"))
    header = validate(_File, {HEADER: tables.pop(HEADER, {})}, source=f"recipe {name}").recipe
    if header.settings:
        tables = merge_tables(load_recipe(header.settings).tables, tables)
    return Recipe(name=name, kind=names[name], header=header, tables=tables)


def read_recipe(name: str | None, path: Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration: a recipe, below a TOML file, below `section.key=value` overrides.

    Raises ConfigError.
    """
    below = {} if name is None else load_recipe(name).tables
    source = f"recipe {name}" if path is None else str(path)
    values = read_tables(path, overrides, below)
    if name is not None and (missing := missing_keys(values)):
        raise ConfigError(
            f"{source}: {missing[0]} is missing",
            hint=f"give {', '.join(missing)} in a file CONFIG, or with --set",
        )
    config = validate(RunConfig, values, source=source)
    return resolve_paths(config, Path.cwd() if path is None else path.parent)


def recipe_toml(recipe: Recipe) -> str:
    """Return the keys that a recipe sets as TOML, below comments on its source."""
    header = recipe.header
    lines = [f"# {recipe.name}: {header.about}", f"# source: {header.source}"]
    lines += [f"# differs: {each}" for each in header.differs]
    lines += [f"# not verified: {each}" for each in header.unverified]
    for section in RunConfig.model_fields:
        if keys := recipe.tables.get(section):
            lines += ["", f"[{section}]"]
            lines += [f"{key} = {toml_value(value)}" for key, value in keys.items()]
    return "\n".join(lines)


def missing_keys(values: Mapping[str, Any]) -> list[str]:
    """Return section.key of each key without a default that {section: {key: value}} lacks."""
    needed = [
        f"{section}.{key}"
        for section, field in RunConfig.model_fields.items()
        for key, inner in _fields(field.annotation)
        if inner.is_required()
    ]
    given = {f"{section}.{key}" for section, keys in values.items() for key in _names(keys)}
    # A teacher that follows the student has no model of its own.
    if not {"teacher.model", "teacher.follow"} & given:
        needed.append("teacher.model")
    order = list(keys_of(RunConfig))
    return sorted(set(needed) - given, key=order.index)


def with_stand_ins(values: Mapping[str, Any], missing: Iterable[str]) -> Tables:
    """Return the tables with a value for each missing key, so that the others can be checked."""
    for key in missing:
        section, _, name = key.partition(".")
        values = merge_tables(values, {section: {name: 1 if key == "loop.rounds" else "missing"}})
    return dict(values)


def _fields(section: Any) -> Iterable[tuple[str, Any]]:
    return section.model_fields.items() if issubclass(section, Section) else ()


def _names(keys: Any) -> Iterable[str]:
    """Return the keys of a section; a section that is none is refused later, by validate."""
    return keys if isinstance(keys, Mapping) else ()
