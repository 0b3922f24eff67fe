"""The entry of a segment in the log: its short part, and its body that is read when it is needed.

The short part has all that the fold of the log and the opening of a store use. The body has the
work unit, the provenance and the offsets of arrays that are read alone: most bytes of a log, of
which most commands need few.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import logitcask.engine.store.format.schema as schema
from logitcask.engine.store.format.provenance import ORIGINAL_ID
from logitcask.engine.types import Array

Entry = tuple[int, int, str]
"""Bytes of an object: (the offset of the first, their number, their sha256)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentBody:
    """The part of a segment's entry that is read when it is first used."""

    unit: Mapping[str, Any]
    provenance: Mapping[str, Any]
    entries: Mapping[str, Entry] = field(default_factory=dict)
    """Array of schema.READ_ALONE, unless it is empty -> its data in the object."""
    seconds: float | None = None
    """Time of the models for it, by the writer's clock; None = not recorded."""


class BodySource(Protocol):
    """The stored bodies of one record."""

    def of(self, segment: "Segment") -> SegmentBody:
        """Read and check the body of a segment. Raises IntegrityError."""

    def provenance(self, segment: "Segment") -> Mapping[str, Any]:
        """Return the provenance of a segment, which others may share. Raises IntegrityError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """The entry of a segment in the log; the defaults are those of one that is not yet encoded."""

    kind: str
    """'rollout' or 'score'."""
    seg_id: str = ""
    """The first 32 hex digits of `sha256`."""
    generation: int = 0
    """Number of times that gc had removed this content before."""
    unit_key: str
    name: str
    """Of the rollouts or of the teacher."""
    base: str = ""
    """seg_id of the rollouts that were scored; empty for rollouts."""
    extends: str = ""
    """seg_id of the scores that an extension follows; else empty."""
    tokens_sha256: str = ""
    """sha256 over tokens and seq_off, equal in a score segment and its base."""
    layout: str
    profile: str
    counts: Mapping[str, int] = field(default_factory=dict)
    size: int = 0
    """Bytes of the object."""
    sha256: str = ""
    """Of the object."""
    version: int = 0
    first: int = 0
    """Student version and first prompt of rollouts; 0 of scores."""
    provenance_sha256: str = ""
    """Of the canonical JSON of the provenance, as the log has it: most segments share a few."""
    number: int = -1
    """Of the log record that published it."""
    index: int = field(default=0, compare=False)
    """Its place among the adds of that record."""
    source: SegmentBody | BodySource = field(compare=False, repr=False)
    """The body, or where it is read; the sha256 of the record covers it."""

    def __hash__(self) -> int:
        return hash((self.kind, self.seg_id, self.number))

    @property
    def body(self) -> SegmentBody:
        """Return the body, read and checked. Raises IntegrityError."""
        return self.source if isinstance(self.source, SegmentBody) else self.source.of(self)

    @property
    def what(self) -> str:
        """Return the segment in words, for messages."""
        return f"segment {self.seg_id} of {self.kind} {self.name!r}"

    @property
    def unit(self) -> Mapping[str, Any]:
        return self.body.unit

    @property
    def provenance(self) -> Mapping[str, Any]:
        if isinstance(self.source, SegmentBody):
            return self.source.provenance
        return self.source.provenance(self)

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self.body.entries

    @property
    def seconds(self) -> float | None:
        return self.body.seconds

    @property
    def path(self) -> str:
        """Return the name of the object, relative to the store."""
        return path_of(self.kind, self.seg_id, self.generation)

    @property
    def key_id(self) -> str:
        """Return the id from which the keys of score units are made.

        An upgrade from format 1 changes seg_id, but the command that made the scores finds them.
        """
        return str(self.provenance.get(ORIGINAL_ID, self.seg_id))

    @property
    def rows(self) -> int:
        """Return the response positions that it holds, or whose scores it adds."""
        return 0 if self.layout == schema.EXTENSION else self.counts.get("R", self.counts["P"])

    @property
    def is_partial(self) -> bool:
        """Return whether it holds the scores of some positions of its base only."""
        return self.layout.endswith(schema.PARTIAL)


class _Draft:
    """A segment that gets its fields: setting those of a frozen one takes three times as long."""

    __slots__ = tuple(Segment.__dataclass_fields__)

    def __init__(self, *values: Any) -> None:
        (
            self.kind, self.seg_id, self.generation, self.unit_key, self.name, self.base,
            self.extends, self.tokens_sha256, self.layout, self.profile, self.counts, self.size,
            self.sha256, self.version, self.first, self.provenance_sha256, self.number, self.index,
            self.source,
        ) = values  # fmt: skip


def new_segment(*values: Any) -> Segment:
    """Return the segment with these values of its fields, in their order."""
    draft: Any = _Draft(*values)
    draft.__class__ = Segment
    return cast("Segment", draft)


def path_of(kind: str, seg_id: str, generation: int) -> str:
    behind = f".{generation}" if generation else ""
    return f"seg/{kind}/{seg_id[:2]}/{seg_id}{behind}.zip"


def sha256(data: bytes | memoryview) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def tokens_sha256(tokens: Array, seq_off: Array) -> str:
    """Return the sha256 of the little-endian bytes of tokens (uint32), then seq_off (int64)."""
    return sha256(tokens.astype("<u4").tobytes() + seq_off.astype("<i8").tobytes())


def content_address(digest: str) -> str:
    """Return the seg_id of an object with this sha256: the same bytes have the same id."""
    return digest.removeprefix("sha256:")[:32]
