"""What a verb shows: progress on stderr while it runs, its result on stdout at the end."""

import json
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

import rich_click as click

from logitcask.engine.types import Progress

PLAIN_EVERY_S = 30.0
SIDE_BY_SIDE = 4
"""Evaluations, say, that a text result shows of many: the first and the newest."""
LEAST_WIDTH = 20
"""Of what is wrapped, in characters."""
REPEATED = ("layout", "asked", "profile", "mean_reward")
"""What segments of a name often have in common."""


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress callable: bars with remaining time on a terminal, else a line per 30 s."""
    if sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _plain_lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    # rich takes a while to import, and most runs of the tests never draw a bar.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bars = RichProgress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    tasks: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    with bars:
        yield report


def _plain_lines() -> Progress:
    last: dict[str, float] = {}

    def report(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - last.setdefault(stage, now) >= PLAIN_EVERY_S:
            last[stage] = now
            click.echo(f"{stage}: {done}/{total}", err=True)

    return report


def print_result(result: Any, form: str) -> None:
    """A report (a dataclass or a mapping) as `name  value` lines, or as one JSON object. Rows of
    numbers inside, as of evaluations, stand side by side.
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


def print_report(report: Any, form: str) -> None:
    """A stage's report; in text, notes and a run that had nothing to do are said in words."""
    values = asdict(report)
    if form == "text":
        for note in values.pop("notes", ()):
            click.echo(f"note: {note}", err=True)
        if not values["units_new"]:
            click.echo(f"nothing to do: all {values['units_total']} units are there")
            return
    print_result(values, form)


def print_table(rows: Sequence[Mapping[str, Any]], form: str) -> None:
    """Rows with the same keys as an aligned table, or as one JSON list. On a terminal that is too
    narrow the widest column is wrapped.
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
    for row in cells:
        parts = (_wrapped(c, w) for c, w in zip(row, widths, strict=True))
        for line in zip_longest(*parts, fillvalue=""):
            click.echo("  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip())


def print_segments(rows: Sequence[Mapping[str, Any]], form: str) -> None:
    """Segments of a store as a table for each kind and name, above it once what all its rows have
    in common, and ids as far as they tell segments apart; or as one JSON list of all.
    """
    if form == "json" or not rows:
        print_table(rows, form)
        return
    named: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        named.setdefault(f"{row['kind']} {row['name']}", []).append(row)
    for number, (name, group) in enumerate(named.items()):
        values = {key: {_shown(row[key]) for row in group} for key in group[0]}
        common = {key: values[key].pop() for key in REPEATED if len(values.get(key, ())) == 1}
        told = ", ".join(f"{key} {value}" for key, value in common.items() if value != "-")
        empty = {key for key, shown in values.items() if shown == {"-"}}
        left_out = {"kind", "name", *common, *empty}
        if number:
            click.echo()
        click.echo("\n".join(_wrapped(f"{name}: {told}", _columns())))
        print_table(
            [{k: _short(k, v) for k, v in row.items() if k not in left_out} for row in group], form
        )


def _short(key: str, value: Any) -> Any:
    return value[:8] if key in ("segment", "base") else value


def visible(text: str) -> str:
    """Text of a model or a file with control characters shown as symbols, safe for a terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _lines(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) with large inner mappings spread out below their name."""
    for name, value in values.items():
        if isinstance(value, Mapping) and len(value) > 3:
            yield name, ""
            yield from ((f"  {inner}", _shown(v)) for inner, v in value.items())
        elif _is_table(value):
            yield name, ""
            yield from _side_by_side(value)
        else:
            yield name, _shown(value)


def _is_table(value: Any) -> bool:
    """Mappings of the same keys, more than a line holds."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(each, Mapping) and each.keys() == value[0].keys() for each in value)
        and len(value[0]) > 3
    )


def _side_by_side(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """(name, its values in all rows): a column for each row."""
    if len(rows) > SIDE_BY_SIDE:
        rows = [rows[0], *rows[1 - SIDE_BY_SIDE :]]
    widths = [max(len(_shown(value)) for value in row.values()) for row in rows]
    for name in rows[0]:
        cells = (f"{_shown(row[name]):<{w}}" for row, w in zip(rows, widths, strict=True))
        yield f"  {name}", "  ".join(cells)


def _columns() -> int:
    """Of the terminal; what is read by a program is never wrapped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many characters, as far as words and the least width allow."""
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
