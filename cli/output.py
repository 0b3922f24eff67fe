"""Output of a verb: messages on stderr while it runs, its result on stdout at the end."""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

import rich_click as click

from logitcask.engine.quantities import memory_size

SIDE_BY_SIDE = 4
"""Columns of a text result with many rows, such as evaluations: the first and the newest."""
LEAST_WIDTH = 20
"""Characters of a wrapped column."""
Tree = tuple[str, "list[Tree]"]
"""A text, and the trees below it."""
REPEATED = ("layout", "request", "profile", "mean_reward")
"""Keys that often have one value for all segments of a name."""


def print_event(line: str) -> None:
    """Print a line of a running stage to stderr."""
    click.echo(visible_lines(line), err=True)


def print_result(result: Any, form: str) -> None:
    """Print a report (a dataclass or a mapping) as `name  value` lines, or as one JSON object.

    Rows of numbers inside it, such as evaluations, become columns.
    """
    values = result if isinstance(result, Mapping) else asdict(result)
    if form == "json":
        click.echo(json.dumps(values, default=str))
        return
    lines = list(_lines(values))
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        for at, line in enumerate(_wrapped(value, _columns() - width - 2)):
            click.echo(f"{name if at == 0 else '':<{width}}  {line}".rstrip())


def print_probe(name: str, report: Any) -> None:
    """Print the report of a probe as one JSON object with its name, for `report --probe`."""
    values = report if isinstance(report, Mapping) else asdict(report)
    print_result({"probe": name, **values}, "json")


def print_report(report: Any, form: str) -> None:
    """Print a stage's report; as text, with its notes, or one line if there was nothing to do."""
    values = asdict(report)
    if form == "text":
        for note in values.pop("notes", ()):
            print_event(f"note: {note}")
        if not values["units_new"]:
            click.echo(f"nothing to do: all {values['units_total']} units are there")
            return
    print_result(values, form)


def print_table(rows: Sequence[Mapping[str, Any]], form: str) -> None:
    """Print rows with the same keys as an aligned table, or as one JSON list.

    The widest column is wrapped where the terminal is too narrow.
    """
    if form == "json":
        click.echo(json.dumps(list(rows)))
        return
    if not rows:
        click.echo("nothing")
        return
    cells = [list(rows[0]), *[[_shown(value) for value in row.values()] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    widest = widths.index(max(widths))
    beyond = sum(widths) + 2 * (len(widths) - 1) - _columns()
    widths[widest] = min(widths[widest], max(LEAST_WIDTH, widths[widest] - max(0, beyond)))
    lines = []
    for row in cells:
        parts = (_wrapped(c, w) for c, w in zip(row, widths, strict=True))
        for line in zip_longest(*parts, fillvalue=""):
            lines.append("  ".join(map(str.ljust, line, widths)).rstrip())
    click.echo("\n".join(lines))


def print_tree(tree: Tree) -> None:
    """Print a text and, below it, the trees of its children with branches."""
    text, children = tree
    click.echo(visible(text))
    _print_branches(children, "")


def _print_branches(trees: Sequence[Tree], margin: str) -> None:
    for tree in trees:
        last = tree is trees[-1]
        click.echo(visible(f"{margin}{'└─ ' if last else '├─ '}{tree[0]}"))
        _print_branches(tree[1], margin + ("   " if last else "│  "))


def print_segments(rows: Sequence[Mapping[str, Any]], form: str) -> None:
    """Print segments as a table for each kind and name with short ids, or as one JSON list.

    Values that all segments of a name share stand once above its table.
    """
    if form == "json" or not rows:
        print_table(rows, form)
        return
    named: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        named.setdefault(f"{row['kind']} {row['name']}", []).append(row)
    for number, (name, group) in enumerate(named.items()):
        values = {key: {row[key] for row in group} for key in group[0]}
        common = {key: _shown(*values[key]) for key in REPEATED if len(values.get(key, ())) == 1}
        shared = ", ".join(f"{key} {value}" for key, value in common.items() if value != "-")
        empty = {key for key, each in values.items() if all(_shown(v) == "-" for v in each)}
        left_out = {"kind", "name", *common, *empty}
        if number:
            click.echo()
        click.echo("\n".join(_wrapped(f"{name}: {shared}", _columns())))
        print_table(
            [{k: _short(k, v) for k, v in row.items() if k not in left_out} for row in group], form
        )


def _short(key: str, value: Any) -> Any:
    return value[:8] if key in ("segment", "base") else value


def visible(text: str) -> str:
    """Return the text with control characters as escapes, safe for a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def visible_lines(text: str) -> str:
    """Return the text with each of its lines made visible."""
    return "\n".join(visible(line) for line in text.splitlines())


def _lines(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, value), large inner mappings below their name."""
    for name, value in values.items():
        if name.endswith("_bytes"):
            sizes = value if isinstance(value, Mapping) else {"": value}
            yield (
                name.removesuffix("_bytes"),
                ", ".join(f"{k} {memory_size(n)}" for k, n in sizes.items()),
            )
        elif isinstance(value, Mapping) and len(value) > 3:
            yield name, ""
            yield from ((f"  {inner}", _shown(v)) for inner, v in value.items())
        elif _is_table(value):
            yield name, ""
            yield from _side_by_side(value)
        else:
            yield name, _shown(value)


def _is_table(value: Any) -> bool:
    """Return True for mappings of the same keys, more than a line holds."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(each, Mapping) and each.keys() == value[0].keys() for each in value)
        and len(value[0]) > 3
    )


def _side_by_side(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield (name, its values in all rows): a column for each row."""
    if len(rows) > SIDE_BY_SIDE:
        rows = [rows[0], *rows[1 - SIDE_BY_SIDE :]]
    widths = [max(len(_shown(value)) for value in row.values()) for row in rows]
    for name in rows[0]:
        cells = (f"{_shown(row[name]):<{w}}" for row, w in zip(rows, widths, strict=True))
        yield f"  {name}", "  ".join(cells)


def _columns() -> int:
    """Return the terminal's width; output for a program is never wrapped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def _wrapped(text: str, width: int) -> list[str]:
    """Split into lines of at most `width` characters, where words and LEAST_WIDTH allow it."""
    width = max(LEAST_WIDTH, width)
    if len(text) <= width:
        return [text]
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if value in (None, "", (), [], {}):
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_shown(v) for v in value)
    return visible(str(value))
