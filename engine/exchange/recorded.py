"""Sequences that a tap recorded, and where their responses begin.

A sequence is left out if nothing gives its beginning, and if an earlier segment has it with the
scores of the same teachers.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from logitcask.engine.errors import IdentityError, PromptError, StoreError
from logitcask.engine.exchange.beginnings import after
from logitcask.engine.models.identity import digest
from logitcask.engine.store import Segment, Snapshot, Store
from logitcask.engine.store.format.provenance import IMPORTED
from logitcask.engine.store.format.schema import BOUNDS, FULL, PLAIN
from logitcask.engine.teachers.checks import check_stops
from logitcask.engine.types import (
    LENGTH,
    STOP,
    Array,
    ModelRef,
    Prompt,
    Rollouts,
)

TAP = "tap"
"""Format of rollouts that a tap recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedUnit:
    """The sequences of a recorded segment that are adopted."""

    segment: Segment
    scores: Mapping[str, Segment]
    """Name of the scores -> the teacher's segment."""
    sequences: tuple[int, ...]
    """Their places in the segment."""
    starts: tuple[int, ...]
    """Tokens of their prompts."""
    all_recorded: bool
    """The tap recorded all of these beginnings; else the ids of `after` gave some."""
    longest: int
    """Response tokens of the longest response."""
    positions: int
    digest: str
    """Of ids and beginnings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """The rollouts of a tap in a store."""

    name: str
    after: tuple[int, ...]
    units: tuple[RecordedUnit, ...]
    unknown: int
    """Sequences that are left out, as nothing says where their response begins."""
    repeated: int
    """Sequences that are left out, as an earlier segment has them."""
    unscored: int
    """Segments that are left for a later import, as no scores of them are in the store yet."""

    @property
    def sequences(self) -> int:
        return sum(len(unit.sequences) for unit in self.units)


def recorded_name(snapshot: Snapshot, url: str, name: str) -> str:
    """Return the name of the tap's rollouts, by default the only one.

    Raises StoreError where there is none, several without a name, or another kind of rollouts.
    """
    found = sorted({s.name for s in snapshot.segments if _is_recorded(s)})
    if name in found or (not name and len(found) == 1):
        return name or found[0]
    if not found:
        cause, hint = "no rollouts of a tap", "give the store of `logitcask tap`, after it sealed"
    elif name:
        cause, hint = f"no rollouts {name!r} of a tap", f"its taps wrote {', '.join(found)}"
    else:
        cause, hint = f"rollouts {', '.join(found)} of taps", "choose one with --tap-rollouts"
    raise StoreError(f"{url} has {cause}", hint=hint)


def _is_recorded(segment: Segment) -> bool:
    if segment.kind != "rollout" or segment.layout != PLAIN:
        return False
    imported = segment.provenance.get(IMPORTED)
    return isinstance(imported, Mapping) and imported.get("format") == TAP


def survey_recorded(
    store: Store,
    name: str,
    model: ModelRef,
    *,
    context: int,
    after_ids: Sequence[int],
    foreign_eos: str,
) -> Recorded:
    """Read all recorded sequences of a name once, and check them against a student.

    context: of the student, tokens. after_ids: a response of unknown beginning begins after their
    last occurrence. Raises IdentityError for a teacher with another tokenizer, and as
    `check_stops`; PromptError for an id that the student does not know, a sequence beyond its
    context, and where no sequence has a beginning; StoreError as `recorded_name`, and for scores
    that no tap writes.
    """
    snapshot = store.head()
    name = recorded_name(snapshot, store.url, name)
    by_teacher = {each: snapshot.scores(each) for each in snapshot.names("score")}
    units: list[RecordedUnit] = []
    seen: set[tuple[str, str]] = set()
    unknown = repeated = unscored = 0
    for segment in {s.seg_id: s for s in snapshot.rollouts(name)}.values():
        found = {
            n: each[segment.seg_id] for n, each in by_teacher.items() if segment.seg_id in each
        }
        if not found:
            unscored += 1
            continue
        scores = {n: _only(each, model) for n, each in found.items()}
        rollouts = store.read_rollouts(segment)
        chosen: list[tuple[int, int, int, str]] = []
        recorded = 0
        for number in range(len(rollouts.seq_prompt)):
            ids, start, known = _sequence(rollouts, number)
            start = start if known else after(ids, after_ids)
            key = hashlib.sha256(ids.tobytes()).hexdigest()
            if not start:
                unknown += 1
            elif all((key, teacher) in seen for teacher in scores):
                repeated += 1
            else:
                _check(ids, model, context)
                seen |= {(key, teacher) for teacher in scores}
                chosen.append((number, start, len(ids) - start, key))
                recorded += known
        if chosen:
            numbers, starts, lengths, keys = zip(*chosen, strict=True)
            unit = RecordedUnit(
                segment=segment,
                scores=scores,
                sequences=numbers,
                starts=starts,
                all_recorded=recorded == len(chosen),
                longest=max(lengths),
                positions=sum(lengths),
                digest=digest([*zip(keys, starts, strict=True)]),
            )
            _check_stops(cut(rollouts, unit, model)[0], unit, model, foreign_eos)
            units.append(unit)
    if not units:
        raise PromptError(_no_beginning(store.url, name, unknown, unscored, after_ids), hint=_AFTER)
    return Recorded(
        name=name,
        after=tuple(after_ids),
        units=tuple(units),
        unknown=unknown,
        repeated=repeated,
        unscored=unscored,
    )


_AFTER = (
    "give --after IDS, the ids after which a response begins, such as those of the template's "
    "beginning of an assistant turn; or record with the header X-Logitcask-Start"
)


def _no_beginning(url: str, name: str, unknown: int, unscored: int, ids: Sequence[int]) -> str:
    if not unknown:
        return f"rollouts {name!r} in {url}: {unscored} segments, and none has scores"
    given = f", and the ids {list(ids)} do not occur before its end" if ids else ""
    return (
        f"rollouts {name!r} in {url}: of none of {unknown} sequences it is known where its "
        f"response begins{given}"
    )


def _only(segments: Sequence[Segment], model: ModelRef) -> Segment:
    """Return a teacher's one segment, checked against the student's vocabulary."""
    first = segments[0]
    if len(segments) > 1 or first.layout not in (FULL, FULL + BOUNDS):
        raise StoreError(
            f"scores {first.name!r} of a tap's rollouts with layouts "
            f"{[each.layout for each in segments]}, which no tap writes",
            hint="give the store as the tap wrote it",
        )
    teacher = first.provenance["teacher"]
    pairs = (("tokenizer", model.tokenizer_digest), ("n_vocab", model.n_vocab))
    for key, ours in pairs:
        if teacher[key] != ours:
            raise IdentityError(
                f"the teacher {first.name!r} has {key} {teacher[key]}, and the student "
                f"{model.name} {ours}",
                hint="name a student with the tokenizer of the teacher: log-probs are read by id",
            )
    return first


def _sequence(rollouts: Rollouts, number: int) -> tuple[Array, int, bool]:
    """Return all ids of a sequence, the tokens of its prompt, and whether these are known."""
    rows = slice(int(rollouts.seq_off[number]), int(rollouts.seq_off[number + 1]))
    prompt = rollouts.prompts[int(rollouts.seq_prompt[number])].token_ids
    ids = np.concatenate([np.array(prompt, np.uint32), rollouts.tokens[rows]])
    return ids, len(prompt), bool(rollouts.loss_mask[rows].any())


def _check(ids: Array, model: ModelRef, context: int) -> None:
    cause = hint = ""
    if int(ids.max()) >= model.n_vocab:
        cause = f"the id {int(ids.max())}, and the student has ids below {model.n_vocab}"
        hint = "name the student whose tokenizer made these ids"
    elif len(ids) > context:
        cause = f"{len(ids)} tokens, and the student's context has {context}"
        hint = "name a student of a longer context"
    if cause:
        raise PromptError(f"a recorded sequence has {cause}", hint=hint)


def _check_stops(rollouts: Rollouts, unit: RecordedUnit, model: ModelRef, eos_rows: str) -> None:
    for each in unit.scores.values():
        check_stops(
            rollouts,
            eos_rows,
            name=unit.segment.name,
            student=model.stop_ids,
            teacher=each.name,
            stop_ids=each.provenance["teacher"]["stop_ids"],
        )


def cut(rollouts: Rollouts, unit: RecordedUnit, model: ModelRef) -> tuple[Rollouts, Array]:
    """Return the adopted sequences, every response position counted, and the marks [P] bool of
    their rows among those of the recorded segment.
    """
    marks = np.zeros(rollouts.positions, bool)
    prompts, parts = list[Prompt](), list[Array]()
    for number, start in zip(unit.sequences, unit.starts, strict=True):
        ids, before, _ = _sequence(rollouts, number)
        first, end = rollouts.seq_off[number : number + 2].tolist()
        marks[first + start - before : end] = True
        name = rollouts.prompts[int(rollouts.seq_prompt[number])].id
        prompts.append(Prompt(id=name, token_ids=tuple(ids[:start].tolist())))
        parts.append(ids[start:])
    count, lengths = len(parts), [len(each) for each in parts]
    ends = np.isin([each[-1] for each in parts], model.stop_ids)
    return (
        Rollouts(
            prompts=tuple(prompts),
            seq_prompt=np.arange(count, dtype=np.uint32),
            seq_off=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            tokens=np.concatenate(parts).astype(np.uint32),
            loss_mask=np.ones(sum(lengths), np.uint16),
            b_lp=np.full(sum(lengths), np.nan, np.float32),
            finish=np.where(ends, STOP, LENGTH).astype(np.uint16),
            version_start=np.zeros(count, np.int64),
            version_end=np.zeros(count, np.int64),
        ),
        marks,
    )
