"""Recorded answers as segments of a store: rollouts of an unknown sampler, and a teacher's scores.

The client does not say which model sampled a sequence, under which distribution and in which
version, so none of this is recorded: there is no student's list, no log-prob of the draws (NaN),
and version 0. Where the beginning of the response is unknown too, all tokens but the first are
rows, with loss mask 0: a training does not count them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.engine.backends.returned import ResponseAssembler, ReturnedTopK
from logitcask.engine.models.identity import digest
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.format.provenance import IMPORTED
from logitcask.engine.tap.journal import records
from logitcask.engine.tap.record import Record
from logitcask.engine.types import LENGTH, Prompt, Rollouts, ScoreParams, Scores

LOGPROB = "natural, temperature 1, ids [0, n_vocab)"


@dataclass(frozen=True, kw_only=True, slots=True)
class SealJob:
    """One file of records, and the store that gets them."""

    path: Path
    store: str
    rollouts: str
    profile: str
    teacher: str
    """Name of the scores."""
    model: Mapping[str, Any]
    """Provenance of the teacher."""
    backend: Mapping[str, Any]
    fingerprint: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sealed:
    """The result of a job."""

    sequences: int
    positions: int
    damaged: int
    """Records that are left out because their bytes have changed."""


def seal_file(job: SealJob) -> Sealed:
    """Commit the records of a file, once; a second call finds them committed.

    Raises StoreError and IdentityError as the commits, AnswerError for log-probs of no model.
    """
    store = open_store(job.store, create=True)
    newest: dict[bytes, Record] = {}
    damaged = 0
    for head, record in records(job.path):
        damaged += record is None
        # Of a sequence that a store has already, the longer lists serve the clients alone.
        if record is not None and not head.repeated:
            newest[head.key] = record
    for k in sorted({record.k for record in newest.values()}):
        _commit(store, job, k, {key: each for key, each in newest.items() if each.k == k})
    return Sealed(
        sequences=len(newest),
        positions=sum(len(each.lp) for each in newest.values()),
        damaged=damaged,
    )


def _commit(store: Store, job: SealJob, k: int, found: Mapping[bytes, Record]) -> None:
    params = ScoreParams(entry_kind="topk", top_p=1.0, k_min=k, k_max=k, at_student=False)
    n_vocab = int(job.model["n_vocab"])
    rollouts = rollouts_of(list(found.values()))
    scores = _scores(rollouts, list(found.values()), params, n_vocab)
    unit = {"version": 0, "first": 0, "records": digest([key.hex() for key in found]), "k": k}
    known = sum(each.boundary > 0 for each in found.values())
    segment = store.commit_rollouts(
        rollouts,
        name=job.rollouts,
        unit_key=digest({"recorded": unit, "teacher": job.teacher}),
        unit=unit,
        provenance={
            **rollouts_provenance(),
            IMPORTED: {"format": "tap", "behavior": False, "boundaries": known},
        },
        profile=job.profile,
    )
    store.commit_scores(
        scores,
        base=segment,
        name=job.teacher,
        unit_key=digest({"recorded": unit, "teacher": job.teacher, "scores": segment.seg_id}),
        unit=unit,
        provenance={**scores_provenance(job), "request": params.record()},
        profile=job.profile,
    )


def rollouts_provenance() -> dict[str, Any]:
    """Return the provenance that all rollouts of taps share: nothing is known of their student."""
    return {"set": {"digest": digest({"recorded": "tap"})}, "student": {"base_weights": "unknown"}}


def scores_provenance(job: SealJob) -> dict[str, Any]:
    """Return the provenance of the scores, as `score` writes it."""
    return {
        "teacher": dict(job.model),
        "teacher_kind": "teacher",
        "context": "",
        "rollouts": job.rollouts,
        "backend": dict(job.backend),
        "logprob": LOGPROB,
        "fingerprint": dict(job.fingerprint),
    }


def rollouts_of(found: Sequence[Record]) -> Rollouts:
    """Return records as rollouts, one prompt a sequence."""
    starts = [each.boundary or 1 for each in found]
    responses = [each.ids[start:] for each, start in zip(found, starts, strict=True)]
    lengths = np.array([len(each) for each in responses], np.int64)
    masks = [np.full(n, each.boundary > 0) for each, n in zip(found, lengths, strict=True)]
    count = len(found)
    return Rollouts(
        prompts=tuple(
            Prompt(id=f"recorded-{digest(each.ids.tolist())[7:23]}", token_ids=tuple(ids.tolist()))
            for each, ids in (
                (each, each.ids[:start]) for each, start in zip(found, starts, strict=True)
            )
        ),
        seq_prompt=np.arange(count, dtype=np.uint32),
        seq_off=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        tokens=np.concatenate(responses).astype(np.uint32),
        loss_mask=np.concatenate(masks).astype(np.uint16),
        b_lp=np.full(int(lengths.sum()), np.nan, np.float32),
        finish=np.full(count, LENGTH, np.uint16),
        version_start=np.zeros(count, np.int64),
        version_end=np.zeros(count, np.int64),
    )


def _scores(
    rollouts: Rollouts, found: Sequence[Record], params: ScoreParams, n_vocab: int
) -> Scores:
    assembler = ResponseAssembler(rollouts, params, None, n_vocab=n_vocab)
    for number, each in enumerate(found):
        first = (each.boundary or 1) - 1
        answer = ReturnedTopK(
            lp=each.lp[first:], ids=each.top[first:].astype(np.int64), top_lp=each.top_lp[first:]
        )
        assembler.write(number, answer)
    return assembler.scores()


def as_job(path: Path, store: str, rollouts: str, profile: str, identity: Any) -> SealJob:
    """Return the job of a file of an identity's records."""
    fields = {key: asdict(identity)[key] for key in ("model", "backend", "fingerprint")}
    return SealJob(
        path=path, store=store, rollouts=rollouts, profile=profile, teacher=identity.name, **fields
    )
