"""Tables of the workers of a run: the units that they claim, and what each process does."""

from collections.abc import Sequence

from logitcask.engine.report.panels import Axis, Panel, Table
from logitcask.engine.report.runs import RunFacts
from logitcask.engine.report.sections.state import utc
from logitcask.engine.store import Store
from logitcask.engine.store.log.claims import claimed_units
from logitcask.engine.workers.timeline import Span

WORK = ("unit", "update", "load", "measure", "publish")
"""Spans of the timeline in which a process works; in others it waits."""


def claims(facts: RunFacts, store: Store) -> list[Panel]:
    """Return the units that workers claim now; no panel where there are none."""
    held = claimed_units(store.storage)
    lease = facts.config.get("work", {}).get("lease_seconds")
    if not held:
        return []
    return [
        Table(
            id="live-claims",
            title="Units in work",
            how="Claims of workers in the store. A claim that is not renewed until its lease ends "
            "is of a dead worker, and another one takes the unit.",
            columns=(
                Axis(name="worker"),
                Axis(name="unit"),
                Axis(name="renewed (UTC)"),
                Axis(name="renewals"),
                Axis(name="lease ends (UTC)"),
            ),
            rows=tuple(
                (
                    each.worker or "unknown",
                    each.unit_key.removeprefix("sha256:")[:12],
                    utc(each.renewed),
                    float(each.renewals),
                    "-" if lease is None else utc(each.renewed + float(lease)),
                )
                for each in held
            ),
        )
    ]


def processes(spans: Sequence[Span]) -> Table:
    """Return the newest span of each process; spans: by their start."""
    found: dict[tuple[str, str], list[Span]] = {}
    for each in spans:
        found.setdefault((each.role, each.process), []).append(each)
    rows: list[tuple[str | float | None, ...]] = []
    for (role, process), own in sorted(found.items()):
        last = own[-1]
        begun, now = own[0].start, max(each.end or each.start for each in own)
        worked = sum((each.end or now) - each.start for each in own if each.kind in WORK)
        rows.append(
            (
                f"{role}-{process}",
                f"{last.kind}{_place(last)}" if last.end is None else f"ended {last.kind}",
                utc(last.start if last.end is None else last.end),
                min(1.0, worked / (now - begun)) if now > begun else None,
                float(len({each.pid for each in own}) - 1),
                f"{last.host}, process {last.pid}",
            )
        )
    return Table(
        id="live-processes",
        title="Processes",
        how="The newest line of each process in the timeline. A process that waits most of the "
        "time is not the one that sets the pace; give its machine to another role.",
        columns=(
            Axis(name="process"),
            Axis(name="does"),
            Axis(name="since (UTC)"),
            Axis(name="at work", form="percent"),
            Axis(name="restarts"),
            Axis(name="where"),
        ),
        rows=tuple(rows),
    )


def _place(span: Span) -> str:
    of = [] if span.round is None else [f"round {span.round}"]
    of += [] if span.version is None else [f"version {span.version}"]
    return f" ({', '.join(of)})" if of else ""
