"""What scoring a set of prompts would cost, and what a loss would miss: from a sample, before
anybody pays for the whole.

A sample is rolled out by the student and scored by the teacher for more than any setting keeps.
Each setting is then cut out of it and encoded as a store would encode it, and the KL of the two
models coarsened to what is stored is compared with their full KL, or with as much of it as the
teacher shows. Coarsening can only lose: what is missed is never negative (log-sum inequality), but
for the rounding of stored values.

Shapes: P rows, W wide entries.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.layouts as layout
import logitcask.engine.store.format.rollouts as rollout_arrays
import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.format.segment as segments
from logitcask.engine.backends.logprob_diff import select_sequences
from logitcask.engine.errors import IncompleteError
from logitcask.engine.probes.full_scores import FullScores, WideScores, full_scores
from logitcask.engine.prompts.graders import Grader
from logitcask.engine.rollout.unit import UNIT_POSITIONS, draw, mc_params
from logitcask.engine.teachers.token_maps import SharedVocabulary
from logitcask.engine.types import (
    Array,
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
USUAL = ScoreParams().k_max


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
    """Mean KL(q || p), nats."""
    reverse_kl: float
    """Mean KL(p || q), nats."""
    kl_over: str
    """What these two are over, and what is missed is a share of."""
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
    """Sample and score a few rollouts, and estimate bytes, times and losses of the whole.

    teacher: a scorer; student: an embedded backend; over one vocabulary. sample: positions, about;
    teacher_topk_max: the largest of the table; shared: how their tokenizers differ, if they do.

    Raises IncompleteError where no response has a token, UnitError where an id occurs that is
    not one token to both.
    """
    name = "the teacher"
    progress("estimate", 0, 3)
    rolled, sampling_s = _roll(
        student, prompts, sampling, sample, student_topk, mc_draws, grader, seed
    )
    progress("estimate", 1, 3)
    usual = ScoreParams(
        k_min=min(teacher_topk_min, teacher_topk_max, USUAL),
        k_max=min(teacher_topk_max, USUAL),
        at_student="at_ids" in teacher.capabilities,
    )
    if shared is not None:
        shared.check_request(rolled, usual, None, name)
    # What comes once, warming up or a control of a server, is no part of the rate.
    teacher.score(select_sequences(rolled, [0]), replace(usual, at_student=False))
    start = time.monotonic()
    teacher.score(rolled, usual)
    scoring_s = time.monotonic() - start
    progress("estimate", 2, 3)
    looked = full_scores(teacher, student, rolled, teacher_topk_max)
    if shared is not None:
        shared.check_scores(looked.rows.scores, usual, name)
    each_s, mean_length = 1 / rolled.positions, rolled.positions / len(rolled.finish)
    total = mean_length * len(prompts) * sampling.n
    table = tuple(_rows(rolled, looked, teacher_topk_min, teacher_topk_max, total))
    progress("estimate", 3, 3)
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
        overlap_ratio=float(looked.rows.listed[:, :student_topk].sum(1).mean() / student_topk),
        forward_kl=float(looked.forward.mean()),
        reverse_kl=float(looked.reverse.mean()),
        kl_over=looked.over,
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
    grader: Grader | None,
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
            "no response of the sample has a token", hint="give other prompts or another student"
        )
    own = ScoreParams(top_p=1.0, k_min=student_k, k_max=student_k, at_student=False)
    own_draws = draw(student, rolled, mc_params(mc_draws, seed)) if mc_draws else None
    rolled = replace(rolled, student=student.score(rolled, own), draws=own_draws)
    if grader is not None:
        rolled = replace(rolled, reward=grader.rewards(rolled).astype(np.float32))
    return rolled, time.monotonic() - start


def _rows(
    rolled: Rollouts, looked: FullScores, k_min: int, most: int, total: float
) -> Iterator[dict[str, Any]]:
    seen = looked.rows
    student = IdLists(cnt=seen.own.cnt, ids=seen.own.ids)
    which = schema.DEDUP if seen.asked else schema.FULL
    which += "" if seen.scores.entropy_hi is None else schema.BOUNDS
    for name, profile in codecs.PROFILES.items():
        arrays = rollout_arrays.encode(rolled, profile)
        rollout_bytes = _bytes(arrays, rollout_arrays.layout_of(rolled), profile, total)
        for k_max in sorted({min(USUAL, most), most}):
            for top_p in TOP_P:
                kept = _kept(seen, top_p, min(k_min, k_max), k_max)
                arrays = layout.encode(_cut(seen, kept), profile, student)
                score_bytes = _bytes(arrays, which, profile, total)
                forward, reverse = _missed(looked, kept, profile)
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


def _kept(seen: WideScores, top_p: float, k_min: int, k_max: int) -> Array:
    """[P, W] bool: what a request would keep."""
    mass = np.exp(seen.log_q, dtype=np.float64).cumsum(1)
    cnt = np.clip((mass < top_p).sum(1) + 1, k_min, k_max)
    kept: Array = (np.arange(seen.ids.shape[1]) < cnt[:, None]) & np.isfinite(seen.log_q)
    return kept


def _cut(seen: WideScores, kept: Array) -> Scores:
    """The wide scores as a smaller request would have made them."""
    return replace(
        seen.scores,
        cnt=kept.sum(1).astype(np.uint16),
        ids=seen.ids[kept],
        entry_lp=seen.log_q[kept],
        log_tail=seen.log_tail(kept).astype(np.float32),
    )


def _missed(looked: FullScores, kept: Array, profile: codecs.Profile) -> tuple[float, float]:
    """Shares of KL(q || p) and KL(p || q) that are lost by coarsening both to what is stored."""

    def stored(values: Array) -> Array:
        return codecs.from_entry(codecs.to_entry(values, profile), profile)

    seen = looked.rows
    at_lp = seen.scores.at_lp
    log_q = np.full(seen.log_q.shape, -np.inf, np.float32)
    log_q[kept] = stored(seen.log_q[kept])
    forward, reverse = seen.coarse(kept, log_q, None if at_lp is None else stored(at_lp))
    return _lost(forward, looked.forward), _lost(reverse, looked.reverse)


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
