"""What a verb shows: progress on stderr while it runs, its result on stdout at the end."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import rich_click as click

from logitcask.engine.types import Progress

PLAIN_EVERY_S = 30.0


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
    """A report (a dataclass or a mapping) as `name  value` lines, or as one JSON object."""
    values = result if isinstance(result, Mapping) else asdict(result)
    if form == "json":
        click.echo(json.dumps(values, default=str))
        return
    lines = list(_lines(values))
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        click.echo(f"{name:<{width}}  {value}".rstrip())


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
    """Rows with the same keys as an aligned table, or as one JSON list."""
    if form == "json":
        click.echo(json.dumps(list(rows)))
        return
    if not rows:
        click.echo("nothing")
        return
    cells = [list(rows[0]), *[[_shown(value) for value in row.values()] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        click.echo("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip())


def visible(text: str) -> str:
    """Text of a model or a file with control characters shown as symbols, safe for a terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _lines(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) with large inner mappings spread out below their name."""
    for name, value in values.items():
        if isinstance(value, Mapping) and len(value) > 3:
            yield name, ""
            yield from ((f"  {inner}", _shown(v)) for inner, v in value.items())
        else:
            yield name, _shown(value)


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
