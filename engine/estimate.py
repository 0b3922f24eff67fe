"""What scoring a set of prompts would cost, and what a loss would miss: from a sample, before
anybody pays for the whole.

A sample is rolled out by the student and scored by the teacher for more than any setting keeps.
Each setting is then cut out of it and encoded as a store would encode it, and the KL of the two
models coarsened to what is stored is compared with their full KL. Coarsening can only lose: what is
missed is never negative (log-sum inequality), but for the rounding of stored values.

Shapes: P rows, W wide entries, S ids of the student's list.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import logitcask.engine.store.codecs as codecs
import logitcask.engine.store.layout as layout
import logitcask.engine.store.rollouts as rollout_arrays
import logitcask.engine.store.schema as schema
import logitcask.engine.store.segment as segments
from logitcask.engine.backends.scoring import Sheet, row_logits
from logitcask.engine.errors import IncompleteError
from logitcask.engine.grade import Grading
from logitcask.engine.rollout_unit import UNIT_POSITIONS, draw, mc_request
from logitcask.engine.types import (
    Array,
    IdLists,
    Progress,
    Prompt,
    Rollouts,
    SamplingParams,
    ScoreRequest,
    Scores,
    silent,
)

WIDE = 256
"""Entries of the teacher that are looked at: the largest k_max of the table."""
TOP_P = (0.99, 0.999, 0.9999)
K_MAX = (64, WIDE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    positions: int
    """Of the sample."""
    mean_length: float
    """Response tokens of a sequence."""
    sampling_s_per_million: float
    """Seconds per million positions, on this machine."""
    scoring_s_per_million: float
    overlap_ratio: float
    """Mean |S(p) & S(q)| / k, k the student's stored top-k."""
    forward_kl: float
    """Mean KL(q || p) over the full vocabulary, nats."""
    reverse_kl: float
    """Mean KL(p || q), nats."""
    all_prompts: Mapping[str, float]
    """What rolling out and scoring every prompt would cost at the defaults of `score`: positions,
    bytes, sampling_seconds, scoring_seconds."""
    rows: tuple[Mapping[str, Any], ...]
    """One for each profile, top_p and k_max: bytes a position, and shares of the KL missed."""

    def summary(self) -> dict[str, Any]:
        """All but the rows."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "rows"}


def estimate(
    *,
    teacher: Any,
    student: Any,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    sample: int = 4096,
    student_k: int = 16,
    mc_draws: int = 0,
    grading: Grading | None = None,
    k_min: int = 16,
    seed: int = 0,
    progress: Progress = silent,
) -> Estimate:
    """teacher, student: embedded backends, whose logits can be seen. sample: positions wanted.

    Raises IncompleteError where no response has a token.
    """
    progress("estimate", 0, 3)
    rolled, sampling_s = _roll(
        student, prompts, sampling, sample, student_k, mc_draws, grading, seed
    )
    progress("estimate", 1, 3)
    start = time.monotonic()
    teacher.score(rolled, ScoreRequest(k_min=k_min, k_max=max(k_min, 64)))
    scoring_s = time.monotonic() - start
    progress("estimate", 2, 3)
    seen = _look(teacher, student, rolled)
    each_s, mean_length = 1 / rolled.positions, rolled.positions / len(rolled.finish)
    total = mean_length * len(prompts) * sampling.n
    table = tuple(_rows(rolled, seen, k_min, total))
    progress("estimate", 3, 3)
    usual = ScoreRequest()
    (row,) = (
        each
        for each in table
        if (each["profile"], each["top_p"], each["k_max"]) == ("default", usual.top_p, usual.k_max)
    )
    return Estimate(
        positions=rolled.positions,
        mean_length=mean_length,
        sampling_s_per_million=1e6 * sampling_s * each_s,
        scoring_s_per_million=1e6 * scoring_s * each_s,
        overlap_ratio=float(seen.listed[:, :student_k].sum(1).mean() / student_k),
        forward_kl=float(seen.forward.mean()),
        reverse_kl=float(seen.reverse.mean()),
        all_prompts={
            "positions": round(total),
            "bytes": round(total * row["bytes"]),
            "sampling_seconds": total * sampling_s * each_s,
            "scoring_seconds": total * scoring_s * each_s,
        },
        rows=table,
    )


def _roll(
    student: Any,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    sample: int,
    student_k: int,
    mc_draws: int,
    grading: Grading | None,
    seed: int,
) -> tuple[Rollouts, float]:
    """(rollouts of about so many positions with the student's lists, seconds they took)."""
    drawn = [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))]

    def generate(count: int) -> Rollouts:
        rolled: Rollouts = student.generate(drawn[:count], sampling, seed=seed, version=0)
        return rolled

    first = generate(min(4, len(drawn)))
    each = max(1.0, first.positions / len(first.prompts))
    start = time.monotonic()
    rolled = generate(min(len(drawn), max(len(first.prompts), int(np.ceil(sample / each)))))
    if not rolled.positions:
        raise IncompleteError(
            "no response of the sample has a token", remedy="give other prompts or another student"
        )
    own = ScoreRequest(top_p=1.0, k_min=student_k, k_max=student_k, at_student=False)
    own_draws = draw(student, rolled, mc_request(mc_draws, seed)) if mc_draws else None
    rolled = replace(rolled, student=student.score(rolled, own), draws=own_draws)
    if grading is not None:
        rolled = replace(rolled, reward=grading.rewards(rolled).astype(np.float32))
    return rolled, time.monotonic() - start


@dataclass(frozen=True, slots=True)
class _Seen:
    """Both models on the P rows, wider than any setting keeps."""

    wide: Scores
    """The teacher: W entries in every row, and the student's ids."""
    log_p: Array
    """[P, W] float64, the student's log-probs at the teacher's wide entries."""
    listed: Array
    """[P, W] bool, the student's list names it too."""
    forward: Array
    """[P] float64, KL(q || p) over the full vocabulary."""
    reverse: Array


def _look(teacher: Any, student: Any, rolled: Rollouts) -> _Seen:
    own = rolled.student
    assert own is not None, "the student has scored its rollouts"
    width = min(WIDE, teacher.n_vocab)
    at = IdLists(cnt=own.cnt, ids=own.ids)
    request = ScoreRequest(entry_kind="topk", top_p=1.0, k_min=width, k_max=width)
    sheet = Sheet(rolled, request, at)
    log_p = np.empty((rolled.positions, width))
    forward, reverse = np.empty((2, rolled.positions))
    tokens = min(teacher.batch_tokens, student.batch_tokens)
    both = zip(
        row_logits(teacher, rolled, batch_tokens=tokens),
        row_logits(student, rolled, batch_tokens=tokens),
        strict=True,
    )
    for (rows, q_logits), (_, p_logits) in both:
        q, p = (
            q_logits.double().log_softmax(1),
            p_logits.double().log_softmax(1).to(q_logits.device),
        )
        forward[rows] = (q.exp() * (q - p)).sum(1).cpu()
        reverse[rows] = (p.exp() * (p - q)).sum(1).cpu()
        sheet.write(rows, q_logits)
        wide_ids = sheet.ids[rows].astype(np.int64)
        log_p[rows] = np.take_along_axis(p.cpu().numpy(), wide_ids, 1)
    wide = sheet.scores()
    student_ids = own.ids.reshape(rolled.positions, -1)
    listed = np.zeros((rolled.positions, width), bool)
    for column in student_ids.T:
        listed |= wide.ids.reshape(-1, width) == column[:, None]
    return _Seen(wide, log_p, listed, forward, reverse)


def _rows(rolled: Rollouts, seen: _Seen, k_min: int, total: float) -> Iterator[dict[str, Any]]:
    own = rolled.student
    assert own is not None, "the student has scored its rollouts"
    student = IdLists(cnt=own.cnt, ids=own.ids)
    for name, profile in codecs.PROFILES.items():
        arrays = rollout_arrays.encode(rolled, profile)
        rollout_bytes = _bytes(arrays, rollout_arrays.layout_of(rolled), profile, total)
        for k_max in K_MAX:
            for top_p in TOP_P:
                kept = _kept(seen, top_p, min(k_min, k_max), k_max)
                arrays = layout.encode(_cut(seen, kept), profile, student)
                score_bytes = _bytes(arrays, schema.ONCE, profile, total)
                forward, reverse = _missed(seen, own, kept, profile)
                yield {
                    "profile": name,
                    "top_p": top_p,
                    "k_max": k_max,
                    "entries": float(kept.sum(1).mean()),
                    "bytes_rollout": rollout_bytes / rolled.positions,
                    "bytes_score": score_bytes / rolled.positions,
                    "bytes": (rollout_bytes + score_bytes) / rolled.positions,
                    "forward_kl_missed": forward,
                    "reverse_kl_missed": reverse,
                }


def _kept(seen: _Seen, top_p: float, k_min: int, k_max: int) -> Array:
    """[P, W] bool: what a request would keep."""
    lp = seen.wide.entry_lp.reshape(seen.log_p.shape)
    mass = np.exp(lp, dtype=np.float64).cumsum(1)
    cnt = np.clip((mass < top_p).sum(1) + 1, k_min, k_max)
    kept: Array = np.arange(seen.log_p.shape[1]) < cnt[:, None]
    return kept


def _cut(seen: _Seen, kept: Array) -> Scores:
    """The wide scores as a smaller request would have made them."""
    lp = seen.wide.entry_lp.reshape(kept.shape)
    dropped = np.where(kept | seen.listed, -np.inf, lp)
    tail = np.logaddexp(np.logaddexp.reduce(dropped, axis=1), seen.wide.log_tail)
    return replace(
        seen.wide,
        cnt=kept.sum(1).astype(np.uint16),
        ids=seen.wide.ids.reshape(kept.shape)[kept],
        entry_lp=lp[kept],
        log_tail=tail.astype(np.float32),
    )


def _missed(seen: _Seen, own: Scores, kept: Array, profile: codecs.Profile) -> tuple[float, float]:
    """Shares of KL(q || p) and KL(p || q) that are lost by coarsening both to what is stored."""
    rows = len(kept)
    assert seen.wide.at_lp is not None, "the teacher was asked at the student's ids"

    def stored(values: Array) -> Array:
        return codecs.from_entry(codecs.to_entry(values, profile), profile).astype(np.float64)

    on = kept & ~seen.listed
    wide_q = np.where(on, stored(seen.wide.entry_lp).reshape(kept.shape), -np.inf)
    wide_p = np.where(on, seen.log_p, -np.inf)
    log_q = np.concatenate([stored(seen.wide.at_lp).reshape(rows, -1), wide_q], 1)
    log_p = np.concatenate([own.entry_lp.reshape(rows, -1).astype(np.float64), wide_p], 1)
    tail_q = _cut(seen, kept).log_tail.astype(np.float64)
    with np.errstate(divide="ignore"):
        tail_p = np.log(np.maximum(1 - np.exp(log_p).sum(1), 0))
    log_q = np.concatenate([log_q, tail_q[:, None]], 1)
    log_p = np.concatenate([log_p, tail_p[:, None]], 1)
    # What is stored is rounded, and a loss renormalises it.
    log_q -= np.logaddexp.reduce(log_q, axis=1, keepdims=True)
    there = np.isfinite(log_q) & np.isfinite(log_p)
    gap = np.where(there, log_q - np.where(there, log_p, 0), 0)
    forward = (np.exp(log_q) * gap).sum(1)
    reverse = -(np.exp(log_p) * gap).sum(1)
    return _lost(forward, seen.forward), _lost(reverse, seen.reverse)


def _lost(coarse: Array, full: Array) -> float:
    """Share of the mean; two models that are the same lose nothing."""
    return float(1 - coarse.mean() / full.mean()) if full.mean() > 0 else 0.0


def _bytes(arrays: Mapping[str, Array], which: str, profile: codecs.Profile, total: float) -> float:
    """Of the files of a segment; metadata counts as in units of the usual size, or in one of all
    that there is.
    """
    contents = segments.encode(arrays, layout=which, profile=profile, attributes={})
    metadata = sum(len(data) for name, data in contents.items() if name.endswith("zarr.json"))
    data = sum(map(len, contents.values())) - metadata
    rows = len(next(arrays[name] for name in ("tokens", "cnt") if name in arrays))
    return data + metadata * min(1.0, rows / min(UNIT_POSITIONS, total))
