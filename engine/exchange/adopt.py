"""Adopt the rollouts of other programs: a student scores them, and they become rollouts of a store.

The student gives what training needs of a policy: its top-k, entropy and log-probs of every
position. It did not sample them, so the distribution of the draws stays unknown unless the file has
their log-probs, and ages are unknown.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np

from logitcask.engine.backends.base import Scorer
from logitcask.engine.errors import IdentityError, IntegrityError, PromptError
from logitcask.engine.exchange.files import Files
from logitcask.engine.exchange.imported import Imported
from logitcask.engine.exchange.scored.rows import TeacherCounts, TeacherScores
from logitcask.engine.models.identity import digest
from logitcask.engine.rollout.unit import LOGPROB, scored
from logitcask.engine.store import Segment, Store
from logitcask.engine.store.format.provenance import IMPORTED
from logitcask.engine.types import (
    LENGTH,
    STOP,
    Array,
    Detail,
    ModelRef,
    Progress,
    Prompt,
    Report,
    Rollouts,
    ScoreParams,
    no_progress,
    unit_report,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    units_total: int
    units_done_before: int
    units_new: int
    sequences: int
    """Of all units; the fields below too."""
    positions: int
    """Response tokens, those included that do not count."""
    counted: int
    """Response tokens that count in a loss."""
    left_out: int
    """Sequences without a token that counts, and repeated ones of a tap."""
    seconds: float
    positions_per_second: float
    """Of the new units, loading of the model excluded."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Units and counts of the sequences, found by a first pass, before a model is loaded."""

    units: list[tuple[int, int, str]] = field(default_factory=list)
    """(first prompt, prompts, digest of the sequences) of each unit."""
    sequences: int = 0
    positions: int = 0
    counted: int = 0
    longest: int = 0
    """Response tokens of the longest response."""
    samples: int = 0
    """Responses to each prompt; 0 where their numbers differ."""
    behavior: bool = True
    """All log-probs of the draws are known."""
    rewards: bool = True
    """All sequences have a reward."""
    teacher: TeacherCounts | None = None
    """Of formats that have a teacher's log-probs."""

    @property
    def digest(self) -> str:
        return digest([each for _, _, each in self.units])


def survey(
    files: Files, *, n_vocab: int, context: int, unit_positions: int, rewards: bool
) -> Contents:
    """Read all sequences once, and check them against a student.

    n_vocab, context: of the student, ids and tokens. unit_positions: response tokens of a unit,
    about. Raises PromptError for an id that the student does not know, a sequence beyond its
    context, a reward outside of [0, 1] (where `rewards` are kept), and a prompt id that has two
    prompts.
    """
    teacher: TeacherCounts | None = None
    prompts: dict[str, bytes] = {}
    units: list[tuple[int, int, str]] = []
    sequences = positions = counted = longest = first = 0
    samples: set[int] = set()
    behavior = rewarded = True
    for unit in in_units(files(), unit_positions):
        for group in unit:
            samples.add(len(group))
            for each in group:
                _check(each, prompts, n_vocab=n_vocab, context=context, rewards=rewards)
                sequences, positions = sequences + 1, positions + len(each.response)
                counted, longest = counted + sum(each.mask), max(longest, len(each.response))
                behavior = behavior and each.logprobs is not None
                rewarded = rewarded and each.reward is not None
                if each.teacher is not None:
                    (teacher := teacher or TeacherCounts(n_vocab)).add(each)
        units.append((first, len(unit), _digest(unit)))
        first += len(unit)
    if teacher is not None:
        teacher.check()
    return Contents(
        units=units,
        sequences=sequences,
        positions=positions,
        counted=counted,
        longest=longest,
        samples=samples.pop() if len(samples) == 1 else 0,
        behavior=behavior,
        rewards=rewarded and rewards,
        teacher=teacher,
    )


def in_units(read: Iterator[Imported], positions: int) -> Iterator[list[list[Imported]]]:
    """Yield units: lists of prompts, each a list of the responses that follow one another."""
    unit: list[list[Imported]] = []
    held = 0
    for _, found in groupby(read, key=lambda each: (each.id, each.prompt)):
        group = list(found)
        length = sum(len(each.response) for each in group)
        if unit and held + length > positions:
            yield unit
            unit, held = [], 0
        unit.append(group)
        held += length
    if unit:
        yield unit


def _digest(unit: Sequence[Sequence[Imported]]) -> str:
    return digest([each.digest() for group in unit for each in group])


def _check(
    found: Imported, prompts: dict[str, bytes], *, n_vocab: int, context: int, rewards: bool
) -> None:
    highest, length = max(*found.prompt, *found.response), len(found.prompt) + len(found.response)
    of = hashlib.sha256(repr(found.prompt).encode()).digest()[:16]
    cause = hint = ""
    if highest >= n_vocab:
        cause = f"the id {highest}, and the student has ids below {n_vocab}"
        hint = "give the student whose tokenizer made these ids"
    elif length > context:
        cause = f"{length} tokens, and the student's context has {context}"
        hint = "remove this sequence, or give a student of a longer context"
    elif prompts.setdefault(found.id, of) != of:
        cause, hint = "two different prompts", "give every prompt an id of its own"
    elif rewards and found.reward is not None and not 0 <= found.reward <= 1:
        cause = f"the reward {found.reward:g}, and rewards lie in [0, 1]"
        hint = "rescale them, or leave them out: --no-rewards"
    if cause:
        raise PromptError(f"prompt {found.id!r} has {cause}", hint=hint)


def adopt(
    files: Files,
    contents: Contents,
    store: Store,
    scorer: Scorer,
    model: ModelRef,
    *,
    name: str,
    student_k: int,
    unit_positions: int,
    profile: str,
    source: Mapping[str, Any],
    extra: Mapping[str, Any],
    teacher: TeacherScores | None = None,
    progress: Progress = no_progress,
) -> ImportReport:
    """Score the sequences with the student, and commit the units that the store does not hold yet.

    contents: of `survey`. source: format and file, recorded. extra: more provenance. teacher: of
    the log-probs that the files have; each unit's are committed as its scores. Raises
    IdentityError where the name holds other rollouts, IntegrityError where the files have changed
    since `survey`.
    """
    begun_s = time.monotonic()
    provenance = import_provenance(
        scorer,
        model,
        student_k,
        set_digest=digest({"imported": contents.digest, "student_topk": student_k}),
        prompts=sum(count for _, count, _ in contents.units),
        units=len(contents.units),
        longest=contents.longest,
        samples=contents.samples,
        imported={**source, "behavior": contents.behavior},
        extra=extra,
    )
    store.check_name("rollout", name, provenance, drawn=False)
    keys = [_key(contents, model, first, count, student_k) for first, count, _ in contents.units]
    committed = set(committed_units(store, keys, name))
    if teacher is not None:
        known = store.head().unit_keys()
        committed &= {key for key in keys if teacher.key(key) in known}
    done_before = len(committed)
    done, new_positions = done_before, 0
    for number, unit in enumerate(in_units(files(), unit_positions)):
        if number >= len(keys) or _digest(unit) != contents.units[number][2]:
            raise IntegrityError(
                "the file has changed while it was imported",
                hint="run the same command again when no program writes to it",
            )
        if keys[number] in committed:
            continue
        first, count, _ = contents.units[number]
        rollouts = _rollouts(unit, model, contents)
        report = unit_report(progress, "import", done, len(keys), new_positions)
        segment = store.commit_rollouts(
            with_student(rollouts, scorer, student_k, report),
            name=name,
            unit_key=keys[number],
            unit={"version": model.version, "first": first, "count": count},
            provenance=provenance,
            profile=profile,
        )
        if teacher is not None:
            sequences = [each for group in unit for each in group]
            teacher.commit(store, segment, sequences, key=keys[number], profile=profile)
        done, new_positions = done + 1, new_positions + rollouts.positions
    progress("import", len(keys), len(keys), Detail(new_positions))
    took_s = time.monotonic() - begun_s
    return ImportReport(
        units_total=len(keys),
        units_done_before=done_before,
        units_new=len(keys) - done_before,
        sequences=contents.sequences,
        positions=contents.positions,
        counted=contents.counted,
        left_out=files.left_out,
        seconds=took_s,
        positions_per_second=new_positions / max(took_s, 1e-9),
    )


def _key(contents: Contents, model: ModelRef, first: int, count: int, student_k: int) -> str:
    student = {"student": model.digest, "student_topk": student_k}
    return digest({"imported": contents.digest, **student, "first": first, "count": count})


def committed_units(store: Store, keys: Iterable[str], name: str) -> dict[str, Segment]:
    """Return the units that a store holds, by their keys.

    Raises IdentityError where they are under another name than `name`.
    """
    store.log.refresh()
    found = {key: unit for key in keys if (unit := store.log.winner(key)) is not None}
    if others := sorted({unit.name for unit in found.values()} - {name}):
        raise IdentityError(
            f"these sequences of this student are in the store already, as rollouts {others[0]!r}",
            hint=f"use --rollouts {others[0]}, or another store",
        )
    return found


def with_student(rollouts: Rollouts, scorer: Scorer, student_k: int, report: Report) -> Rollouts:
    """Return rollouts with the student's own scores of every position."""
    scores = scorer.score(
        rollouts,
        ScoreParams(top_p=1.0, k_min=student_k, k_max=student_k, at_student=False),
        progress=scored(report, rollouts.positions, "scored", 0.0, 1.0),
    )
    return replace(rollouts, student=scores)


def import_provenance(
    scorer: Scorer,
    model: ModelRef,
    student_k: int,
    *,
    set_digest: str,
    prompts: int,
    units: int,
    longest: int,
    samples: int = 0,
    imported: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the provenance of imported rollouts.

    set_digest: of the set, on which all rollouts of the name agree; prompts, units: of the set;
    longest: response tokens; samples: responses to each prompt, 0 = unknown; imported: format and
    origin; extra: more entries.
    """
    return {
        "set": {
            "digest": set_digest,
            "prompts": prompts,
            "units": units,
            "student_topk": student_k,
            "max_new_tokens": longest,
            "template": model.template_digest,
            **({"n": samples} if samples else {}),
        },
        "student": model.provenance(),
        "backend": scorer.describe(),
        "scorer": scorer.describe(),
        "logprob": LOGPROB,
        IMPORTED: dict(imported),
        **extra,
    }


def _rollouts(unit: Sequence[Sequence[Imported]], model: ModelRef, contents: Contents) -> Rollouts:
    """Return a unit as rollouts without the student's scores."""
    sequences = [each for group in unit for each in group]
    lengths = [len(each.response) for each in sequences]
    stops = [STOP if each.response[-1] in model.stop_ids else LENGTH for each in sequences]
    versions = np.array([each.version or 0 for each in sequences], np.int64)
    reward: Array | None = None
    if contents.rewards:
        reward = np.array([each.reward for each in sequences], np.float32)
    positions = sum(lengths)
    return Rollouts(
        prompts=tuple(
            Prompt(id=g[0].id, token_ids=g[0].prompt, answer=g[0].answer, extra=g[0].extra)
            for g in unit
        ),
        seq_prompt=np.repeat(np.arange(len(unit), dtype=np.uint32), [len(g) for g in unit]),
        seq_off=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        tokens=_flat((each.response for each in sequences), np.uint32, positions),
        loss_mask=_flat((each.mask for each in sequences), np.uint16, positions),
        b_lp=_flat((each.logprobs for each in sequences), np.float32, positions)
        if contents.behavior
        else np.full(positions, np.nan, np.float32),
        finish=np.array(stops, np.uint16),
        version_start=versions,
        version_end=versions,
        reward=reward,
    )


def _flat(parts: Iterator[Any], dtype: Any, count: int) -> Array:
    return np.fromiter((value for part in parts for value in part), dtype, count)
