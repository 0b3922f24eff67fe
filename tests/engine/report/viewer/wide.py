"""Rollouts of a vocabulary of 150,000 ids, with scores: what a language model's store weighs."""

from pathlib import Path

import numpy as np

from logitcask.engine.models.identity import digest
from logitcask.engine.store import Store, open_store
from logitcask.engine.types import STOP, Array, Prompt, Rollouts, Scores

VOCAB, TOP = 150_000, 16


def wide_store(path: Path, *, sequences: int, length: int, prompt: int = 60) -> Store:
    """Make responses of `length` tokens, two of each prompt; half of the rows are nearly sure.

    Low ids are frequent, and the teacher's list has half of the student's ids.
    """
    rng = np.random.default_rng(0)
    rows = sequences * length
    student_ids = _ids(rng, rows)
    sharpness = np.where(rng.random(rows) < 0.5, 6.0, rng.uniform(0.3, 2.0, rows))
    student_lp = _log_probs(rng, sharpness)
    keep = rng.random((rows, TOP)) < 0.5
    teacher_ids = np.where(keep, student_ids, _ids(rng, rows) + VOCAB // 2)
    teacher_lp = _log_probs(rng, sharpness * rng.uniform(0.7, 1.3, rows))
    drawn = (rng.random(rows) ** 4 * TOP).astype(int)
    at = np.where(keep, teacher_lp, teacher_lp[:, -1:] - 2.0)
    rows_at = np.arange(rows)
    rollouts = Rollouts(
        prompts=tuple(
            Prompt(id=f"prompt-{i}", token_ids=tuple(_ids(rng, -(-prompt // TOP)).ravel().tolist()))
            for i in range(sequences // 2)
        ),
        seq_prompt=np.repeat(np.arange(sequences // 2), 2).astype(np.uint32),
        seq_off=np.arange(0, rows + 1, length, dtype=np.int64),
        tokens=student_ids[rows_at, drawn].astype(np.uint32),
        loss_mask=np.ones(rows, np.uint16),
        b_lp=student_lp[rows_at, drawn].astype(np.float32),
        finish=np.full(sequences, STOP, np.uint16),
        version_start=np.zeros(sequences, np.int64),
        version_end=np.zeros(sequences, np.int64),
        student=_scores(student_ids, student_lp, student_lp[rows_at, drawn]),
        reward=rng.integers(0, 2, sequences).astype(np.float32),
    )
    provenance = {
        "set": {"digest": digest("set"), "units": 1, "student_topk": TOP},
        "student": {"base_weights": digest("root")},
    }
    store = open_store(path, create=True)
    base = store.commit_rollouts(
        rollouts,
        name="main",
        unit_key=digest("rollouts"),
        unit={"version": 0, "first": 0},
        provenance=provenance,
    )
    scores = _scores(teacher_ids, teacher_lp, at[rows_at, drawn], at.reshape(-1))
    store.commit_scores(
        scores,
        base=base,
        name="big",
        unit_key=digest("scores"),
        unit=dict(base.unit),
        provenance={
            "teacher": {"weights": digest("teacher")},
            "teacher_kind": "teacher",
            "context": "",
            "request": {
                "teacher_top_p": 0.999,
                "teacher_topk_min": TOP,
                "teacher_topk_max": TOP,
                "at_student": True,
            },
        },
    )
    return store


def _ids(rng: np.random.Generator, rows: int) -> Array:
    """Draw TOP distinct ids for each row below half of the vocabulary, one of each residue."""
    wide = (VOCAB // 2 // TOP) * rng.random((rows, TOP)) ** 3
    ids: Array = wide.astype(np.int64) * TOP + np.arange(TOP)
    return ids


def _log_probs(rng: np.random.Generator, sharpness: Array) -> Array:
    """Return [P, TOP] descending log-probs with 2 % of the mass elsewhere."""
    logits = -np.sort(rng.exponential(1.0, (len(sharpness), TOP)), 1).cumsum(1) / 4
    logits *= sharpness[:, None]
    shifted = logits - logits.max(1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True)) + np.log(0.98)
    return found


def _scores(ids: Array, lp: Array, token_lp: Array, at: Array | None = None) -> Scores:
    rows = len(ids)
    return Scores(
        lp=token_lp.astype(np.float32),
        entropy=-(np.exp(lp) * lp).sum(1).astype(np.float32),
        log_tail=np.full(rows, np.log(0.02), np.float32),
        cnt=np.full(rows, TOP, np.uint16),
        ids=ids.reshape(-1).astype(np.uint32),
        entry_lp=lp.reshape(-1).astype(np.float32),
        at_lp=None if at is None else at.astype(np.float32),
    )
