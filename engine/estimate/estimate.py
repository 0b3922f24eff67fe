"""Cost of a store, and the KL that its truncation loses, measured on a sample before scoring all.

The student samples some responses, and the teacher scores them with more entries than any setting
keeps. Each setting is cut out of these scores and encoded as in a store. The KL of the two models,
coarsened to the stored entries and a tail, is compared with their full KL, or with the KL over
the entries that the teacher returns. Coarsening can only lower a KL (log-sum inequality), except
for the rounding of stored values.

Shapes: P rows, W entries of the full scores.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import logitcask.engine.store.format.archive as archive
import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.layouts as layout
import logitcask.engine.store.format.rollouts as rollout_arrays
import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.format.segment as segments
from logitcask.engine.backends.logprob_diff import select_sequences
from logitcask.engine.errors import IncompleteError
from logitcask.engine.estimate.full_scores import FullScores, full_scores
from logitcask.engine.estimate.requests import store_requests
from logitcask.engine.prompts.graders import Grader
from logitcask.engine.rollout.unit import UNIT_POSITIONS, default_unit, draw, mc_params
from logitcask.engine.teachers.token_maps import SharedVocabulary
from logitcask.engine.types import (
    NO_DETAIL,
    Array,
    Detail,
    IdLists,
    Progress,
    Prompt,
    Rollouts,
    SamplingParams,
    ScoreParams,
    Scores,
    no_progress,
)

TOP_P = (0.99, 0.999, 0.9999)
DEFAULT_K = ScoreParams().k_max


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    positions: int
    """Positions of the sample."""
    mean_length: float
    """Response tokens of a sequence."""
    sampling_s_per_million: float
    """Seconds per million positions, on this machine."""
    scoring_s_per_million: float
    overlap_ratio: float
    """Mean |S(p) & S(q)| / k, k the student's stored top-k."""
    forward_kl: float
    """Mean KL(q || p), nats."""
    reverse_kl: float
    """Mean KL(p || q), nats."""
    kl_over: str
    """Ids that both KL are over."""
    all_prompts: Mapping[str, float]
    """Cost of all prompts at the defaults of `score`: positions, bytes, sampling_seconds,
    scoring_seconds, and `store_requests` in an object store."""
    rows: tuple[Mapping[str, Any], ...]
    """One per profile, top_p and k_max: bytes per position, and lost shares of the KL."""
    costs: Mapping[str, Any] = field(default_factory=dict)
    """Hours of a device like this one and money, where prices are given; see cost.py."""

    def summary(self) -> dict[str, Any]:
        """Return all fields except the rows."""
        left_out = {"rows", *(() if self.costs else ("costs",))}
        return {name: getattr(self, name) for name in self.__slots__ if name not in left_out}


def estimate(
    *,
    teacher: Any,
    student: Any,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    sample: int,
    student_topk: int,
    mc_draws: int = 0,
    grader: Grader | None = None,
    teacher_topk_min: int,
    teacher_topk_max: int,
    shared: SharedVocabulary | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Estimate:
    """Measure the cost of scoring and the loss of truncation on a sample.

    teacher: a scorer; student: an embedded backend; over one vocabulary. sample: number of
    positions; teacher_topk_max: the largest of the table; shared: map between their tokenizers, if
    they differ.

    Raises IncompleteError where no response has a token, UnitError for an id that is not one token
    of both.
    """
    name = "the teacher"
    progress("estimate", 0, 3)
    rolled, sampling_s = _sample(
        student,
        prompts,
        sampling,
        sample,
        student_topk,
        mc_draws,
        grader,
        seed,
        _within(progress, 0, "sequences"),
    )
    progress("estimate", 1, 3)
    default = ScoreParams(
        k_min=min(teacher_topk_min, teacher_topk_max, DEFAULT_K),
        k_max=min(teacher_topk_max, DEFAULT_K),
        at_student="at_ids" in teacher.capabilities,
    )
    if shared is not None:
        shared.check_request(rolled, default, None, name)
    # Work done once, such as warming up or the check of a server, is not part of the rate.
    teacher.score(select_sequences(rolled, [0]), replace(default, at_student=False))
    start = time.monotonic()
    teacher.score(rolled, default, progress=_within(progress, 1, "positions scored"))
    scoring_s = time.monotonic() - start
    progress("estimate", 2, 3)
    full = full_scores(teacher, student, rolled, teacher_topk_max)
    if shared is not None:
        shared.check_scores(full.scores, default, name)
    each_s, mean_length = 1 / rolled.positions, rolled.positions / len(rolled.finish)
    total = mean_length * len(prompts) * sampling.n
    table = tuple(_rows(rolled, full, teacher_topk_min, teacher_topk_max, total))
    progress("estimate", 3, 3)
    setting = {"profile": "default", "top_p": default.top_p, "k_max": default.k_max}
    (row,) = (each for each in table if setting.items() <= each.items())
    return Estimate(
        positions=rolled.positions,
        mean_length=mean_length,
        sampling_s_per_million=1e6 * sampling_s * each_s,
        scoring_s_per_million=1e6 * scoring_s * each_s,
        overlap_ratio=float(full.listed[:, :student_topk].sum(1).mean() / student_topk),
        forward_kl=float(full.forward.mean()),
        reverse_kl=float(full.reverse.mean()),
        kl_over=full.kl_over,
        all_prompts={
            "positions": round(total),
            "bytes": round(total * row["bytes"]),
            "sampling_seconds": total * sampling_s * each_s,
            "scoring_seconds": total * scoring_s * each_s,
            **store_requests(-(-len(prompts) // default_unit(sampling))),
        },
        rows=table,
    )


def _within(progress: Progress, step: int, noun: str) -> Progress:
    """Return the progress of a sampler or scorer as that of one step of an estimate."""

    def within(stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
        share = (done + detail.share) / max(1, total)
        progress("estimate", step, 3, Detail(part=f"{done:,}/{total:,} {noun}", share=share))

    return within


def _sample(
    student: Any,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    sample: int,
    student_k: int,
    mc_draws: int,
    grader: Grader | None,
    seed: int,
    progress: Progress,
) -> tuple[Rollouts, float]:
    """Return (rollouts of about `sample` positions with the student's scores, their seconds)."""
    drawn = [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))]

    def generate(count: int) -> Rollouts:
        rolled: Rollouts = student.generate(
            drawn[:count], sampling, seed=seed, version=0, progress=progress
        )
        return rolled

    first = generate(min(4, len(drawn)))
    each = max(1.0, first.positions / len(first.prompts))
    start = time.monotonic()
    rolled = generate(min(len(drawn), max(len(first.prompts), int(np.ceil(sample / each)))))
    if not rolled.positions:
        raise IncompleteError(
            "no response of the sample has a token", hint="give other prompts or another student"
        )
    own = ScoreParams(top_p=1.0, k_min=student_k, k_max=student_k, at_student=False)
    own_draws = draw(student, rolled, mc_params(mc_draws, seed)) if mc_draws else None
    rolled = replace(rolled, student=student.score(rolled, own), draws=own_draws)
    if grader is not None:
        rolled = replace(rolled, reward=grader.rewards(rolled).astype(np.float32))
    return rolled, time.monotonic() - start


def _rows(
    rolled: Rollouts, full: FullScores, k_min: int, most: int, total: float
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table; most: the largest k_max; total: positions of all prompts."""
    student = IdLists(cnt=full.student.cnt, ids=full.student.ids)
    which = schema.DEDUP if full.at_student else schema.FULL
    which += "" if full.scores.entropy_hi is None else schema.BOUNDS
    for name, profile in codecs.PROFILES.items():
        arrays = rollout_arrays.encode(rolled, profile)
        rollout_bytes = _bytes(arrays, rollout_arrays.layout_of(rolled), profile, total)
        for k_max in sorted({min(DEFAULT_K, most), most}):
            for top_p in TOP_P:
                mask = _kept(full, top_p, min(k_min, k_max), k_max)
                arrays = layout.encode(_truncated(full, mask), profile, student)
                score_bytes = _bytes(arrays, which, profile, total)
                forward, reverse = _lost(full, mask, profile)
                yield {
                    "profile": name,
                    "top_p": top_p,
                    "k_max": k_max,
                    "entries": float(mask.sum(1).mean()),
                    "bytes_rollout": rollout_bytes / rolled.positions,
                    "bytes_score": score_bytes / rolled.positions,
                    "bytes": (rollout_bytes + score_bytes) / rolled.positions,
                    "forward_kl_missed": forward,
                    "reverse_kl_missed": reverse,
                }


def _kept(full: FullScores, top_p: float, k_min: int, k_max: int) -> Array:
    """Return [P, W] bool, the entries that a request keeps."""
    mass = np.exp(full.log_q, dtype=np.float64).cumsum(1)
    cnt = np.clip((mass < top_p).sum(1) + 1, k_min, k_max)
    mask: Array = (np.arange(full.ids.shape[1]) < cnt[:, None]) & np.isfinite(full.log_q)
    return mask


def _truncated(full: FullScores, mask: Array) -> Scores:
    """Return the scores as if requested with these entries [P, W] alone."""
    return replace(
        full.scores,
        cnt=mask.sum(1).astype(np.uint16),
        ids=full.ids[mask],
        entry_lp=full.log_q[mask],
        log_tail=full.log_tail(mask).astype(np.float32),
    )


def _lost(full: FullScores, mask: Array, profile: codecs.Profile) -> tuple[float, float]:
    """Return the shares of KL(q || p) and KL(p || q) that storage in this form loses."""

    def stored(values: Array) -> Array:
        return codecs.from_entry(codecs.to_entry(values, profile), profile)

    def lost(coarse: Array, whole: Array) -> float:
        # Two equal models lose nothing.
        return float(1 - coarse.mean() / whole.mean()) if whole.mean() > 0 else 0.0

    at_lp = full.scores.at_lp
    log_q = np.full(full.log_q.shape, -np.inf, np.float32)
    log_q[mask] = stored(full.log_q[mask])
    forward, reverse = full.coarse_kl(mask, log_q, None if at_lp is None else stored(at_lp))
    return lost(forward, full.forward), lost(reverse, full.reverse)


def _bytes(arrays: Mapping[str, Array], which: str, profile: codecs.Profile, total: float) -> float:
    """Return the bytes of a segment.

    Metadata is counted as in units of the default size, or in one unit of all `total` positions.
    """
    contents = segments.encode(arrays, layout=which, profile=profile, attributes={})
    data = sum(len(data) for name, data in contents.items() if not name.endswith("zarr.json"))
    metadata = len(archive.write(contents)) - data
    rows = len(next(arrays[name] for name in ("response_tokens", "topk_counts") if name in arrays))
    return data + metadata * min(1.0, rows / min(UNIT_POSITIONS, total))
