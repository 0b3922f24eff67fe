"""Scores of spans for commands that show a store, and the refusal of those that read tokens."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from logitcask.engine.alignment.by_sequence import Span
from logitcask.engine.alignment.coverage import SpanCoverage, coverage_of
from logitcask.engine.errors import ConfigError
from logitcask.engine.store.decoded_unit import has_spans
from logitcask.engine.store.format.entry import Segment
from logitcask.engine.store.log.snapshot import Snapshot
from logitcask.engine.store.reader import Reader

MOST_BYTES = 64 << 20
"""Of the segments of each teacher that are read for the coverage of its spans."""


def span_teachers(snapshot: Snapshot) -> list[str]:
    """Return the names of scores of teachers with another tokenizer."""
    return [
        name
        for name in snapshot.names("score")
        if any(has_spans(each) for each in snapshot.scores(name).values())
    ]


def check_tokens(snapshot: Snapshot, teacher: str) -> None:
    """Raise ConfigError for a teacher whose scores are of spans, not of the student's tokens."""
    if teacher in span_teachers(snapshot):
        raise ConfigError(
            f"teacher {teacher!r} has another tokenizer than the student: its scores are of spans, "
            "and this command reads scores of the student's tokens",
            hint="scores of spans serve `train` with an objective over spans (`logitcask "
            "objectives` lists them), `evaluate`, `probe metrics`, `probe reward`, `report` and "
            "`store show`",
        )


def span_coverage(
    store: Reader, snapshot: Snapshot, most: int = MOST_BYTES
) -> dict[str, tuple[SpanCoverage, bool]]:
    """Return teacher -> the coverage of its spans, and whether all of its segments were read.

    Reads segments of about `most` bytes of each, evenly chosen. Raises IntegrityError for damage.
    """
    found = {}
    for name in span_teachers(snapshot):
        segments = [first for first, *_ in snapshot.scores(name).values()]
        chosen = evenly(segments, most)
        sums = coverage_of(store.read_span_scores((each,)) for each in chosen)
        found[name] = sums, len(chosen) == len(segments)
    return found


def evenly(segments: Sequence[Segment], most: int) -> list[Segment]:
    """Choose evenly as many segments as have about `most` bytes, one at least."""
    if not segments:
        return []
    share = min(1.0, most / max(1, sum(each.size for each in segments)))
    count = max(1, int(len(segments) * share))
    return [segments[i] for i in np.linspace(0, len(segments) - 1, count).round().astype(int)]


def add_spans(table: list[dict[str, Any]], spans: Iterable[Span], top: int) -> None:
    """Add a teacher's values of spans to the rows of a response."""
    none = ("span", "teacher_lp", "teacher_tokens", "teacher_entropy", "kept")
    for row in table:
        row |= {**dict.fromkeys(none), "teacher_top": []}
    for number, span in enumerate(spans):
        for r in span.rows:
            table[r]["span"] = number
        table[span.rows[0]] |= {
            "teacher_lp": span.log_prob,
            "teacher_tokens": [{"id": i, "text": _text(piece)} for i, piece in span.tokens],
        }
        if span.at is not None:
            shown = [
                {"id": e.id, "twin": e.twin, "text": _text(e.text), "lp": e.log_prob}
                for e in span.entries[:top]
            ]
            table[span.at] |= {
                "teacher_entropy": span.entropy,
                "kept": len(span.entries),
                "teacher_top": shown,
            }


def _text(piece: bytes) -> str:
    return piece.decode(errors="backslashreplace")
