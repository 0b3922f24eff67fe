"""Stores as sources of the viewer: their responses, and the segments that are read.

A page is made in seconds, also of stores of millions of positions: about MOST_POSITIONS are read of
all sources together, as segments that are spread over the versions of the student.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from logitcask.engine.alignment.span_scores import SpanScores
from logitcask.engine.errors import IncompleteError
from logitcask.engine.exchange.positions import Block, Column, Selection, blocks, select
from logitcask.engine.probes.columns import column_of, counted_rows, numbers_of
from logitcask.engine.probes.positions import common_k
from logitcask.engine.store import Segment, Snapshot, Store
from logitcask.engine.store.format.provenance import ALIGNMENT
from logitcask.engine.store.format.ragged import starts
from logitcask.engine.store.inspect import choose
from logitcask.engine.store.spans.views import span_teachers

MOST_POSITIONS = 131_072
"""Response positions that are read, about: a second for each teacher."""
MOST_TEACHERS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Rollouts of one run or store."""

    name: str
    """Of the run, as the page writes it."""
    store: Store
    snapshot: Snapshot
    rollouts: str | None = None
    """None = those with the most scored segments."""
    teachers: tuple[str, ...] = ()
    """The first MOST_TEACHERS that scored some of them are shown; () = all but base models, in the
    order of their names."""
    folders: tuple[str, ...] = ()
    """Folders that may hold the tokenizer, after that of the recorded student: the run's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """All rows of a segment with the scores of a teacher."""

    teacher: str
    block: Block
    k: int
    """k of the overlap; 0 where the top-k of one side is not stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredSpans:
    """The scores of a whole segment by a teacher with another tokenizer."""

    teacher: str
    scores: SpanScores
    tokens: str
    """Digest of the bytes of its ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One segment of a source, read."""

    segment: Segment
    rows: Block
    """All rows; the columns of a teacher are those of scored[0]."""
    scored: tuple[Scored, ...]
    """One of each teacher that scored some position."""
    spans: tuple[ScoredSpans, ...] = ()
    """The same of teachers with another tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One response of a source that can be chosen."""

    part: int
    start: int
    end: int
    """Its rows in the part."""
    number: int
    """As `store show --sequence` counts."""
    prompt: str
    reward: float | None
    finish: str
    versions: tuple[int, int]
    """Of the student at its first and last token."""
    mean_kl: float | None
    """Mean of KL(p || q) over the rows that count, nats; None without scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """The part of a source that was read."""

    source: Source
    rollouts: str
    parts: tuple[Part, ...]
    responses: tuple[Response, ...]
    """In the order of the store; those without a token are left out."""
    positions: int
    """Of these rollouts in the store."""

    @property
    def read(self) -> int:
        """Return the positions that were read."""
        return sum(len(column_of(each.rows, "token")) for each in self.parts)


def load(source: Source, most: int) -> Loaded | None:
    """Read about `most` positions of a source; None where its snapshot has no rollouts.

    Raises ConfigError for unknown rollouts, IntegrityError for damage.
    """
    names = source.snapshot.names("rollout")
    if not names:
        return None
    first = source.rollouts or _most_scored(source.snapshot, names)
    name = choose(names, first, what="rollouts")
    tokens, spans = _teachers(source, name)
    selections = _selections(source.snapshot, name, tokens)
    scored = {each for of in (*tokens, *spans) for each in source.snapshot.scores(of)}
    chosen = _spread(selections[0], scored, most)
    parts = tuple(_part(source, selections, spans, index, most // len(chosen)) for index in chosen)
    return Loaded(
        source=source,
        rollouts=name,
        parts=parts,
        responses=tuple(
            each for number, part in enumerate(parts) for each in _responses(part, number)
        ),
        positions=sum(each.counts["P"] for each, _ in selections[0].segments),
    )


def _most_scored(snapshot: Snapshot, names: list[str]) -> str:
    """Return the name of the rollouts with the most scored segments, the first among equals."""
    scored = {each.base for each in snapshot.segments if each.kind == "score"}
    counts = [sum(each.seg_id in scored for each in snapshot.rollouts(name)) for name in names]
    return names[int(np.argmax(counts))]


def _teachers(source: Source, name: str) -> tuple[list[str], list[str]]:
    """Return the teachers that are shown: with scores of tokens, and of spans."""
    snapshot = source.snapshot
    teachers = source.teachers or tuple(
        each for each in snapshot.names("score") if snapshot.role(each) != "base"
    )
    of, others = {each.seg_id for each in snapshot.rollouts(name)}, span_teachers(snapshot)
    shown = [each for each in teachers if of & snapshot.scores(each).keys()][:MOST_TEACHERS]
    spans = [each for each in shown if each in others]
    return [each for each in shown if each not in others], spans


def _selections(snapshot: Snapshot, name: str, teachers: Sequence[str]) -> list[Selection]:
    """Return one selection for each teacher, or one without a teacher."""
    if teachers:
        return [select(snapshot, rollouts=name, teacher=each) for each in teachers]
    segments = snapshot.rollouts(name)
    counts = np.asarray([each.counts["N"] for each in segments], np.int64)
    return [
        Selection(
            rollouts=name,
            teacher=None,
            segments=tuple((each, ()) for each in segments),
            first=tuple(starts(counts)[:-1].tolist()),
        )
    ]


def _spread(selection: Selection, scored: Collection[str], most: int) -> list[int]:
    """Return the indices of segments of about `most` positions, spread from the first to the last.

    Segments in `scored` come before others.
    """
    segments = [each for each, _ in selection.segments]
    candidates = [i for i, each in enumerate(segments) if each.seg_id in scored]
    candidates = candidates or list(range(len(segments)))
    positions = sum(segments[i].counts["P"] for i in candidates)
    count = max(1, min(len(candidates), most * len(candidates) // max(1, positions)))
    chosen = np.linspace(0, len(candidates) - 1, count) if count > 1 else [len(candidates) - 1]
    return [candidates[int(i)] for i in np.unique(np.round(chosen).astype(int))]


def _part(
    source: Source, selections: list[Selection], spans: Sequence[str], index: int, most: int
) -> Part:
    """Read the blocks of a segment with its first `most` positions, and its scores of spans."""
    store, segment = source.store, selections[0].segments[index][0]
    scored = [
        Scored(
            teacher=each.teacher,
            block=_read(store, each, index, most),
            k=_k_of(each, index),
        )
        for each in selections
        if each.teacher is not None and each.segments[index][1]
    ]
    first = selections[0]
    rows = scored[0].block if scored else _read(store, first, index, most)
    return Part(
        segment=segment,
        rows=rows,
        scored=tuple(scored),
        spans=tuple(
            ScoredSpans(
                teacher=each,
                scores=store.read_span_scores(found),
                tokens=str(found[0].provenance[ALIGNMENT]["teacher"]),
            )
            for each in spans
            if (found := source.snapshot.scores(each).get(segment.seg_id))
        ),
    )


def _k_of(selection: Selection, index: int) -> int:
    """Return the k of one segment; 0 where the top-k of one side is not stored, which is no error:
    the page then leaves the overlap out."""
    try:
        return common_k(replace(selection, segments=(selection.segments[index],)))
    except IncompleteError:
        return 0


def _read(store: Store, selection: Selection, index: int, most: int) -> Block:
    """Return the first `most` rows, or all of the first response where it is longer."""
    found: list[Block] = []
    rows = 0
    for each in blocks(store, selection, index):
        found.append(each)
        sequence = column_of(each, "sequence")
        rows += len(sequence)
        if rows >= most and len(sequence) and sequence[-1] != column_of(found[0], "sequence")[0]:
            break
    return _joined(found)


def _joined(parts: list[Block]) -> Block:
    """Join the blocks of a segment."""
    if len(parts) == 1:
        return parts[0]
    made: Block = {}
    for name in parts[0]:
        columns = [each[name] for each in parts]
        known = [each for each in columns if each is not None]
        made[name] = _concatenated(known) if len(known) == len(columns) else None
    return made


def _concatenated(columns: list[Column]) -> Column:
    counts = [each.counts for each in columns if each.counts is not None]
    valid = [each.valid for each in columns if each.valid is not None]
    return Column(
        np.concatenate([each.values for each in columns]),
        np.concatenate(counts) if counts else None,
        np.concatenate(valid) if valid else None,
    )


def _responses(part: Part, number: int) -> Iterator[Response]:
    rows = part.rows
    sequence = column_of(rows, "sequence")
    if not len(sequence):
        return
    begins = np.flatnonzero(np.diff(sequence, prepend=-1))
    ends = np.append(begins[1:], len(sequence))
    if len(sequence) < part.segment.counts["P"]:
        # The last one may go on in the rows that were not read.
        begins, ends = begins[:-1], ends[:-1]
    means = np.full(len(begins), np.nan)
    if part.scored:
        kl = numbers_of(rows, "reverse_kl")
        counted = counted_rows(rows) & ~np.isnan(kl)
        total = np.add.reduceat(np.where(counted, kl, 0.0)[: ends[-1]], begins)
        count = np.add.reduceat(counted.astype(np.int64)[: ends[-1]], begins)
        np.divide(total, count, out=means, where=count > 0)
    rewards = rows["reward"]
    columns = ("sequence", "prompt", "finish_reason", "policy_version_start", "policy_version_end")
    found = zip(*(column_of(rows, name)[begins].tolist() for name in columns), strict=True)
    for i, (of, prompt, finish, start, end) in enumerate(found):
        yield Response(
            part=number,
            start=int(begins[i]),
            end=int(ends[i]),
            number=of,
            prompt=prompt,
            reward=None if rewards is None else float(rewards.values[begins[i]]),
            finish=finish,
            versions=(start, end),
            mean_kl=None if np.isnan(means[i]) else float(means[i]),
        )
