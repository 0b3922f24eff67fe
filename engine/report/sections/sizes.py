"""Section of the store: its contents, the spans of other tokenizers, and the bytes of its arrays.

The sizes of whole segments come from the log. Those of arrays are read from the objects, so of a
large store some evenly chosen segments stand for all.
"""

import io
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from logitcask.engine.alignment.coverage import SPAN_KINDS, describe
from logitcask.engine.errors import LogitcaskError
from logitcask.engine.report.panels import Absent, Axis, Bar, Bars, Panel, Section, Table
from logitcask.engine.report.runs import RunFacts
from logitcask.engine.store import Segment, Snapshot, Store
from logitcask.engine.store.inspect import (
    bytes_per_position,
    committed_bytes,
    describe_request,
    rows_of,
    segment_rows,
)
from logitcask.engine.store.log.claims import failed_units
from logitcask.engine.store.spans.views import evenly, span_coverage

MOST_BYTES = 64 * 2**20
"""Of objects that are read for the sizes of arrays, of each kind."""
MOST_SEGMENTS = 50
"""Rows of the table of segments."""
ARRAY_FILE = "/c/0"
"""End of the file of an array's data in an object."""
KINDS = ("rollout", "score")

_BYTES = Axis(name="bytes", form="bytes")
_PER_POSITION = Axis(name="bytes per position", unit="bytes")
SHOWN_ARRAYS = 16
"""Bars of arrays; the others of a kind are one bar."""


def store_section(runs: Sequence[RunFacts], *, most: int = MOST_BYTES) -> Section:
    """Build totals of the store of each run, and names, arrays and segments of the first one's.

    A store alone is a run with an empty record. Reads `most` bytes of each kind of segment; what
    cannot be read is an Absent.
    """
    stores: dict[str, tuple[Store, Snapshot]] = {}
    absent: list[Absent] = []
    for facts in runs:
        if facts.store is None or facts.snapshot is None:
            absent.append(Absent(title=f"Store of {facts.name}", why=facts.store_missing))
        else:
            stores.setdefault(facts.store.uuid, (facts.store, facts.snapshot))
    panels: list[Panel] = []
    if stores:
        store, snapshot = next(iter(stores.values()))
        parts: dict[str, Callable[[], list[Panel]]] = {
            "Totals": lambda: [_totals(list(stores.values()))],
            "Rollouts and teachers": lambda: [_names(snapshot)],
            "Teachers with another tokenizer": lambda: _spans(store, snapshot),
            "Bytes by array": lambda: _arrays(store, snapshot, most),
            "Newest segments": lambda: [_segments(store, snapshot)],
        }
        for title, made in parts.items():
            try:
                panels += made()
            except LogitcaskError as error:
                absent.append(Absent(title=title, why=f"{error.cause}; {error.hint}"))
    return Section(id="store", title="Store", panels=tuple(panels), absent=tuple(absent))


def _totals(stores: Sequence[tuple[Store, Snapshot]]) -> Table:
    """Return one column of totals for each store."""
    columns, numbers = [_total(*each) for each in stores], range(1, len(stores) + 1)
    return Table(
        id="store-totals",
        title="Totals",
        how="Bytes are those of committed segments. Bytes per position are the cost of one "
        "response token: its rollout, and the scores of one teacher.",
        columns=(
            Axis(name="total"),
            *(Axis(name=f"store {n}" if len(stores) > 1 else "store") for n in numbers),
        ),
        rows=tuple((name, *(each[name] for each in columns)) for name in columns[0]),
    )


def _total(store: Store, snapshot: Snapshot) -> dict[str, str | float]:
    rollouts, scores = (_of_kind(snapshot, kind) for kind in KINDS)
    per = bytes_per_position(snapshot)
    # Each unit with notes that no segment has made good.
    failed = failed_units(store.storage).keys() - snapshot.unit_keys()
    shared = sum(s.counts.get("S", 0) for s in scores)
    listed = shared + sum(s.counts.get("E", 0) for s in scores)
    return {
        "place": store.url,
        "id": store.uuid,
        "snapshot": snapshot.number,
        "tags": ", ".join(sorted(store.log.tags())) or "none",
        "segments": len(snapshot.segments),
        "rollout segments without scores": len(rollouts) - len({s.base for s in scores}),
        "failed units": len(failed),
        "responses": sum(s.counts["N"] for s in rollouts),
        "response positions": sum(s.counts["P"] for s in rollouts),
        "bytes": committed_bytes(snapshot.segments),
        "bytes of rollouts per position": round(per["rollout"], 2),
        "bytes of scores per position": round(per["score"], 2),
        "share of the teacher's ids that are stored once with the student's": (
            f"{shared / listed:.1%}" if listed else "no ids"
        ),
    }


def _of_kind(snapshot: Snapshot, kind: str) -> list[Segment]:
    return [each for each in snapshot.segments if each.kind == kind]


def _names(snapshot: Snapshot) -> Table:
    """Return one line for each name of rollouts and of scores."""
    rows = []
    for kind in KINDS:
        for name in snapshot.names(kind):
            found = [each for each in _of_kind(snapshot, kind) if each.name == name]
            positions, size = sum(each.rows for each in found), committed_bytes(found)
            versions = sorted({each.version for each in found})
            rows.append(
                (
                    kind if kind == "rollout" else f"scores ({snapshot.role(name) or 'teacher'})",
                    name,
                    len(found),
                    positions,
                    size,
                    size / max(1, positions),
                    _range(versions) if kind == "rollout" else None,
                    ", ".join(sorted({each.layout for each in found})),
                    ", ".join(sorted({each.profile for each in found})),
                    describe_request(found[-1]),
                )
            )
    return Table(
        id="store-names",
        title="Rollouts and teachers",
        how="One line for each name; the request is that of its newest segment. A layout with "
        "dedup stores the ids of the student's list once, with the rollouts.",
        columns=(
            *(Axis(name="kind"), Axis(name="name"), Axis(name="segments")),
            *(Axis(name="positions"), _BYTES, _PER_POSITION),
            *(Axis(name="versions of the student"), Axis(name="layout"), Axis(name="profile")),
            Axis(name="request"),
        ),
        rows=tuple(rows),
    )


def _spans(store: Store, snapshot: Snapshot) -> list[Panel]:
    """Return the coverage of spans of teachers with another tokenizer; nothing without one."""
    found = span_coverage(store, snapshot)
    if not found:
        return []
    kinds = {name: dict(zip(SPAN_KINDS, of.kinds, strict=True)) for name, (of, _) in found.items()}
    words = {name: describe(of) for name, (of, _) in found.items()}
    some = "" if all(whole for _, whole in found.values()) else " Of some evenly chosen segments."
    return [
        Bars(
            id="store-span-kinds",
            title="Spans of two tokenizers",
            how="Shares of the spans by their tokens, the student's first. The more are 1:1, the "
            f"more of the teacher's ids say something about a token of the student.{some}",
            value=Axis(name="share of the spans", form="percent"),
            bars=tuple(
                Bar(name=name, value=count / max(1, sum(of.values())), group=kind)
                for name, of in kinds.items()
                for kind, count in of.items()
            ),
        ),
        Table(
            id="store-spans",
            title="Teachers with another tokenizer",
            how="Log-probs of spans are exact for the teacher's own tokens. Its best ids are "
            "conditioned on a boundary of its tokens: a loss on them has a floor that is no error "
            f"of the student.{some}",
            columns=(Axis(name="word"), *(Axis(name=name) for name in found)),
            rows=tuple(
                (word, *(of.get(word, "") for of in words.values()))
                for word in dict.fromkeys(word for of in words.values() for word in of)
            ),
        ),
    ]


def _range(versions: Sequence[int]) -> str:
    first, last = versions[0], versions[-1]
    if first == last:
        return str(first)
    some = "" if last - first + 1 == len(versions) else f" ({len(versions)} of them)"
    return f"{first}-{last}{some}"


def _arrays(store: Store, snapshot: Snapshot, most: int) -> list[Panel]:
    """Return the bars of the arrays, largest first, and of a position by name and array."""
    sizes: dict[str, dict[str, float]] = {}
    whole = True
    for kind in KINDS:
        found = _of_kind(snapshot, kind)
        chosen = evenly(found, most)
        whole &= len(chosen) == len(found)
        # Of segments of different layouts each is scaled alike.
        scale = committed_bytes(found) / max(1, committed_bytes(chosen))
        sizes[kind] = {name: n * scale for name, n in array_bytes(store, chosen).items()}
    some = "" if whole else " Estimated from some evenly chosen segments."
    per = bytes_per_position(snapshot)
    bars = [
        Bar(name=name, value=n, group=kind)
        for kind, named in sizes.items()
        for name, n in _largest(named, SHOWN_ARRAYS // 2).items()
    ]
    stacked = [
        Bar(name=f"{kind}: {per[kind]:.1f}", value=n / max(1, sum(named.values())) * per[kind],
            group=name)
        for kind, named in sizes.items()
        for name, n in _largest(named, 4).items()
    ]  # fmt: skip
    return [
        Bars(
            id="store-arrays",
            title="Bytes by array",
            how="Encoded bytes: student_topk_* are the student's lists, at_student_* the teacher's "
            "log-probs at these ids, topk_* the rest of the teacher's list. `logitcask store "
            f"estimate` shows the cost of another top-k or profile.{some}",
            value=_BYTES,
            bars=tuple(sorted(bars, key=lambda bar: -bar.value)),
        ),
        Bars(
            id="store-position",
            title="Bytes of one position",
            how="Bytes of a response token in rollouts and in the scores of one teacher, stacked "
            f"by array.{some}",
            value=_PER_POSITION,
            bars=tuple(stacked),
        ),
    ]


def array_bytes(store: Store, segments: Iterable[Segment]) -> dict[str, int]:
    """Return array -> bytes of its data in the objects, and `headers` for all else in them.

    Raises as `Store.read_object`.
    """
    found: dict[str, int] = defaultdict(int)
    for each in segments:
        data = store.read_object(each)
        found["headers"] += len(data)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                if info.filename.endswith(ARRAY_FILE):
                    found[info.filename.removesuffix(ARRAY_FILE)] += info.file_size
                    found["headers"] -= info.file_size
    return dict(found)


def _largest(sizes: Mapping[str, float], count: int) -> dict[str, float]:
    """Return the largest arrays, and the sum of all others under one name."""
    ordered = sorted(sizes.items(), key=lambda each: -each[1])
    found, others = dict(ordered[:count]), ordered[count:]
    return found | ({"others": sum(n for _, n in others)} if others else {})


def _segments(store: Store, snapshot: Snapshot) -> Table:
    """Return the newest segments."""
    newest = snapshot.segments[-MOST_SEGMENTS:][::-1]
    left = len(snapshot.segments) - len(newest)
    rows = [
        (
            row["log"],
            store.log.time(each.number),
            row["kind"],
            row["name"],
            each.seg_id[:8],
            each.version if each.kind == "rollout" else None,
            row["sequences"],
            rows_of(each),
            each.size,
            row["bytes_per_position"],
            each.seconds,
            row["layout"],
            row["request"],
        )
        for each, row in zip(newest, segment_rows(newest), strict=True)
    ]
    return Table(
        id="store-segments",
        title="Newest segments",
        how="One line for each commit, the newest first."
        + (f" {left:,} older ones are not shown: `logitcask store ls` shows all." if left else ""),
        columns=(
            *(Axis(name="log"), Axis(name="committed, UTC"), Axis(name="kind")),
            *(Axis(name="name"), Axis(name="segment"), Axis(name="version")),
            *(Axis(name="responses"), Axis(name="positions"), _BYTES, _PER_POSITION),
            *(Axis(name="time of the models", unit="seconds"), Axis(name="layout")),
            Axis(name="request"),
        ),
        rows=tuple(rows),
    )
