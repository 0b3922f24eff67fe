"""A store in which every number follows from known distributions."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from logitcask.engine.models.identity import digest
from logitcask.engine.store import Store, open_store
from logitcask.engine.types import (
    LENGTH,
    Array,
    Draws,
    ModelRef,
    Prompt,
    Rollouts,
    SamplingParams,
    Scores,
)

GRADED_LENGTHS = [5, 3, 0, 4, 6, 2]
REWARDS = np.array([1, 0, 1, 0.5, 1, 0], np.float32)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Rollouts and scores, and the full distributions [P, V] that they were cut from."""

    rollouts: Rollouts
    scores: Scores
    log_p: Array
    log_q: Array


def make_unit(
    seed: int,
    *,
    prompts: int = 3,
    n: int = 2,
    vocab: int = 40,
    student_k: int = 4,
    top_p: float = 0.6,
    k_min: int = 4,
    k_max: int = 7,
    lengths: list[int] | None = None,
    prompt_tokens: int = 5,
    at_student: bool = True,
    version: int = 0,
    mc_draws: int = 0,
) -> Unit:
    """Make random sequences; `lengths` are those of the responses, by default drawn from 0..9.

    `mc_draws` ids of every response position are drawn from the student's distribution.
    """
    rng = np.random.default_rng(seed)
    count = prompts * n
    response = rng.integers(0, 10, count) if lengths is None else np.array(lengths)
    positions = int(response.sum())
    log_p, log_q = (_log_softmax(rng.normal(size=(positions, vocab)) * 2) for _ in range(2))
    tokens = rng.integers(0, vocab, positions)
    student = _scores(log_p, tokens, np.full(positions, student_k))
    mass = np.cumsum(-np.sort(-np.exp(log_q)), 1)
    kept = np.clip((mass < top_p).sum(1) + 1, k_min, k_max)
    scores = _scores(log_q, tokens, kept)
    outside = np.ones((positions, vocab), bool)
    _drop(outside, scores)
    if at_student:
        row = np.repeat(np.arange(positions), student.cnt)
        scores = replace(scores, at_lp=log_q[row, student.ids].astype(np.float32))
        _drop(outside, student)
    with np.errstate(divide="ignore"):
        tail = np.log((np.exp(log_q) * outside).sum(1)).astype(np.float32)
    texts = [
        Prompt(
            id=f"p{seed}-{i}",
            token_ids=tuple(rng.integers(0, vocab, 1 + rng.integers(prompt_tokens)).tolist()),
        )
        for i in range(prompts)
    ]
    rollouts = Rollouts(
        prompts=tuple(texts),
        seq_prompt=np.repeat(np.arange(prompts), n).astype(np.uint32),
        seq_off=np.concatenate([[0], np.cumsum(response)]).astype(np.int64),
        tokens=tokens.astype(np.uint32),
        loss_mask=np.ones(positions, np.uint16),
        b_lp=(student.lp - 0.25).astype(np.float32),
        finish=np.full(count, LENGTH, np.uint16),
        version_start=np.full(count, version, np.int64),
        version_end=np.full(count, version, np.int64),
        student=student,
        draws=_draws(log_p, mc_draws, seed) if mc_draws else None,
    )
    return Unit(rollouts=rollouts, scores=replace(scores, log_tail=tail), log_p=log_p, log_q=log_q)


def make_store(
    path: Path,
    units: list[Unit],
    *,
    planned: int | None = None,
    scored: int | None = None,
    student: ModelRef | None = None,
    seconds: list[float] | None = None,
) -> Store:
    """Commit units as rollouts `main` of `student`, the first `scored` with scores of `big`."""
    store = open_store(path, create=True)
    sampler = {"base_weights": digest("root")} if student is None else student.provenance()
    provenance = {
        "set": {
            "digest": digest("set"),
            "units": len(units) if planned is None else planned,
            **SamplingParams().record(),
            "student_topk": 4,
        },
        "student": sampler,
    }
    for i, unit in enumerate(units):
        segment = store.commit_rollouts(
            unit.rollouts,
            name="main",
            unit_key=digest({"rollout": i}),
            unit={"version": 0, "first": i * len(unit.rollouts.prompts)},
            provenance=provenance,
        )
        if scored is None or i < scored:
            store.commit_scores(
                unit.scores,
                base=segment,
                name="big",
                unit_key=digest({"score": i}),
                unit=dict(segment.unit),
                provenance={
                    "teacher": {"weights": digest("teacher")},
                    "teacher_kind": "teacher",
                    "context": "",
                    "request": {
                        "teacher_top_p": 0.6,
                        "teacher_topk_min": 4,
                        "teacher_topk_max": 7,
                        "at_student": unit.scores.at_lp is not None,
                    },
                },
                seconds=None if seconds is None else seconds[i],
            )
    return store


def _scores(log_probs: Array, tokens: Array, kept: Array) -> Scores:
    order = np.argsort(-log_probs, 1, kind="stable")
    listed = np.arange(log_probs.shape[1]) < kept[:, None]
    return Scores(
        lp=log_probs[np.arange(len(tokens)), tokens].astype(np.float32),
        entropy=-(np.exp(log_probs) * log_probs).sum(1).astype(np.float32),
        log_tail=np.log1p(
            -np.minimum((np.exp(np.take_along_axis(log_probs, order, 1)) * listed).sum(1), 1 - 1e-9)
        ).astype(np.float32),
        cnt=kept.astype(np.uint16),
        ids=order[listed].astype(np.uint32),
        entry_lp=np.take_along_axis(log_probs, order, 1)[listed].astype(np.float32),
    )


def _draws(log_p: Array, draws: int, seed: int) -> Draws:
    rng = np.random.default_rng([seed, 1])
    counts = np.stack([rng.multinomial(draws, row) for row in np.exp(log_p)])
    row, ids = counts.nonzero()
    return Draws(
        cnt=np.bincount(row, minlength=len(log_p)).astype(np.uint16),
        ids=ids.astype(np.uint32),
        mult=counts[row, ids].astype(np.uint16),
        lp=log_p[row, ids].astype(np.float32),
    )


def _drop(outside: Array, scores: Scores) -> None:
    outside[np.repeat(np.arange(len(scores.cnt)), scores.cnt), scores.ids.astype(np.int64)] = False


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(1, keepdims=True) if len(logits) else logits
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def make_graded_unit(seed: int) -> Unit:
    """Make six responses with rewards; each fourth token does not count in a loss."""
    unit = make_unit(seed, lengths=GRADED_LENGTHS)
    mask = unit.rollouts.loss_mask.copy()
    mask[1::4] = 0
    rollouts = replace(unit.rollouts, reward=np.roll(REWARDS, seed), loss_mask=mask)
    return replace(unit, rollouts=rollouts)
