"""A quick parser of the heads of a log: nearly all are of records of one segment, and alike.

A pattern for each kind, layout and profile has all rules that a pattern can say, so that a log of
tens of thousands of records opens at once. Any other head, valid or not, goes to
`record.parse_head`, whose errors name the fault.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from operator import gt, mul

import logitcask.engine.store.format.archive as archive
import logitcask.engine.store.format.schema as schema
from logitcask.engine.store.format.entry import content_address, new_segment, sha256
from logitcask.engine.store.format.segment import object_limit
from logitcask.engine.store.log.body import Bodies, RecordBody
from logitcask.engine.store.log.record import Record, bounds, parse_head

_COUNT, _SHA, _ID = "(0|[1-9][0-9]{0,14})", '(sha256:[^"]{64})', '([^"]{32})'
"""Not [0-9a-f]: half of the time went into looking at each digit."""
_HEX = b"0123456789abcdef"
_MOST_FORMS = 256


@dataclass(frozen=True, slots=True)
class _Form:
    """The usual heads of one kind, layout and profile."""

    fields: tuple[str, str, str]
    match: Callable[[str], re.Match[str] | None]
    """Matches such a head as `encode_record` writes it; each value that varies is a group."""
    names: list[str]
    """Of the counts, in the order of their groups."""
    most: list[int]
    each: list[int]
    rounding: int
    """Bytes of the arrays for each of a count, as of `bounds`."""
    spare: int
    """Bytes of an object without arrays, at most."""
    relations: tuple[tuple[str, tuple[str, ...], int], ...]
    """As of schema.relations."""


class HeadParser:
    """Parses the heads of a log, one after the other."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._forms: dict[bytes, _Form] = {}
        """A valid head without its hex digits -> its form. Another head that is equal without them
        has digests of hex digits too, where they have the length that its form matches."""
        self._texts: dict[str, str] = {}
        """Names and digests that many segments share, each kept once."""

    def parse(self, line: bytes, where: str, *, number: int, prev: str, name: str) -> Record:
        """Parse a head as `parse_head` does, in a quarter of the time where it is usual."""
        found = self._parse_usual(line, number, prev, name)
        if found is None:
            bodies = self._bodies
            found = parse_head(line, where, number=number, prev=prev, bodies=bodies, name=name)
            if len(found.adds) == 1 and len(self._forms) < _MOST_FORMS:
                add = found.adds[0]
                self._forms[line.translate(None, _HEX)] = _form(add.kind, add.layout, add.profile)
        return found

    def _parse_usual(self, line: bytes, number: int, prev: str, name: str) -> Record | None:
        """Parse a head of a form that was met; return None for any other head."""
        form = self._forms.get(line.translate(None, _HEX))
        found = None if form is None else form.match(line.decode("latin-1"))
        if form is None or found is None:
            return None
        (
            generation, unit_key, segment_name, base, extends, tokens, *numbers, size, digest,
            version, first, provenance, length, body_sha256, n, before, time,
        ) = found.groups()  # fmt: skip
        values = list(map(int, numbers))
        counts = dict(zip(form.names, values, strict=True))
        decoded = sum(map(mul, values, form.each)) + form.rounding
        n_bytes, n_body = int(size), int(length)
        if (
            int(n) != number
            or before != prev
            or decoded > schema.MAX_SEGMENT_BYTES
            or n_bytes > min(2 * decoded + form.spare, archive.MAX_BYTES)
            or n_body > schema.MAX_RECORD_BYTES
            or any(map(gt, values, form.most))
        ):
            return None
        for key, others, most in form.relations:
            if counts[key] > most * sum([counts[other] for other in others]):
                return None
        share = self._texts.setdefault
        kind, layout, profile = form.fields
        body = RecordBody(self._bodies, number, name, n_body, body_sha256, 1)
        add = new_segment(
            kind, content_address(digest), int(generation), unit_key,
            share(segment_name, segment_name), base, extends, tokens, layout, profile, counts,
            n_bytes, digest, int(version), int(first), share(provenance, provenance), number, 0,
            body,
        )  # fmt: skip
        return Record(number, sha256(line), time, (add,), (), (), {}, body)


@cache
def _form(kind: str, layout: str, profile: str) -> _Form:
    """Return the form of heads of such segments."""
    each, rounding = bounds(layout, profile)
    names = sorted(each)
    counts = ",".join(f'"{name}":{_COUNT}' for name in names)
    base, place = (_ID, "(0),(0)") if kind == schema.SCORE else ("()", f"{_COUNT},{_COUNT}")
    extends = _ID if layout == schema.EXTENSION else "()"
    if layout.endswith(schema.PARTIAL):
        extends = '([^"]{32}|)'
    line = (
        rf'\{{"adds":\[\["{kind}",{_COUNT},"{_SHA}","({schema.NAME.pattern})","{base}","{extends}",'
        rf'"{_SHA}","{re.escape(layout)}","{profile}",\{{{counts}\}},{_COUNT},"{_SHA}",{place},'
        rf'"{_SHA}"\]\],"body":\[{_COUNT},"{_SHA}"\],"deletes":\[\],"n":{_COUNT},'
        rf'"prev":"([^"]*)","removes":\[\],"tags":\{{\}},"time":"([0-9T:+-]*)"\}}'
    )
    return _Form(
        fields=(kind, layout, profile),
        match=re.compile(line).fullmatch,
        names=names,
        most=[schema.MAX_COUNT[name] for name in names],
        each=[each[name] for name in names],
        rounding=rounding,
        spare=object_limit(layout, 0),
        relations=schema.relations(layout),
    )
