"""Best of n: of several responses of the teacher to a prompt, one is kept to learn from.

arXiv 2605.09725 (BRTS), selection: a correct response first; among equal ones the most similar to
the student, by the overlap of the teacher's top-k and the student's. Deviations: where no response
is correct BRTS samples the teacher once more with the answer as a hint; here that prompt keeps its
most similar response, or is dropped. BRTS adds the loss on these responses to each update with
weight 0.05; here they are rollouts of their own, for a training before or after that on the
student's own.

    STORE   rollouts SAMPLED   all responses of the teacher, with rewards
            rollouts NAME      the chosen ones, with the scores of the teacher
"""

import shlex
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from logitcask.engine.backends.base import close_backend
from logitcask.engine.commands.load_teacher import backend
from logitcask.engine.commands.prove import prove
from logitcask.engine.commands.rollout import rollouts_left
from logitcask.engine.config.recipes import BestOfN
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.errors import IncompleteError
from logitcask.engine.estimate.left import Approve, refuse_full_disk
from logitcask.engine.events import EventHandler
from logitcask.engine.recipes.kept import Chosen
from logitcask.engine.recipes.teacher_text import keep_chosen, open_request, teacher_prompts
from logitcask.engine.rollout.plan import rollout
from logitcask.engine.store import Segment, Store
from logitcask.engine.store.format.ragged import starts
from logitcask.engine.types import Array, Progress, Rollouts, ScoreParams, Scores, no_progress

CORRECT = 1.0
"""Reward of a correct response."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BestOfNReport:
    prompts: int
    with_correct: int
    """Prompts with a correct response of the teacher."""
    ties: int
    """Prompts of which several responses have the largest reward."""
    kept: int
    """Responses, one of a prompt."""
    kept_correct: int
    dropped: int
    """Prompts that are left out."""
    positions: int
    """Tokens of the kept responses."""
    next: str
    """Command that trains on them."""


def run_best_of_n(
    config: RunConfig,
    settings: BestOfN,
    *,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
    approve: Approve = refuse_full_disk,
) -> BestOfNReport:
    """Sample the teacher of a distillation, choose, and keep the chosen responses as rollouts.

    Raises as `teacher_prompts`, IncompleteError where every prompt is dropped, GraderError, and the
    errors of rollout and import.
    """
    found = teacher_prompts(
        config,
        settings,
        settings.sampled,
        grader=settings.grader,
        on_event=on_event,
    )
    approve(replace(rollouts_left(found.config, len(found.prompts)), stage="best-of-n"))
    request = open_request(found)
    try:
        rollout(request, progress=progress)
    finally:
        close_backend(request.sampler)
    scorer = backend(found.student, config.run)
    try:
        counts = {"prompts": 0, "with_correct": 0, "ties": 0, "dropped": 0}
        chosen = [
            each
            for segment in request.store.head().rollouts(request.name)
            if (each := choose(request.store, segment, scorer, settings, counts)) is not None
        ]
        if not chosen:
            raise IncompleteError(
                f"none of {counts['prompts']} prompts has a correct response of the teacher",
                hint="give --incorrect keep, a larger --n, or prompts that the teacher can answer",
            )
        kept = keep_chosen(
            config,
            found,
            request,
            chosen,
            scorer,
            name=settings.name,
            rule={"recipe": "best-of-n", "ties": settings.ties, "incorrect": settings.incorrect},
            progress=progress,
        )
    finally:
        close_backend(scorer)
    words = ["logitcask", "train", "--model", config.student.model, "--store", config.store.url]
    words += ["--rollouts", settings.name, "--teacher", config.teacher.name]
    return BestOfNReport(
        **counts,
        kept=kept.sequences,
        kept_correct=counts["with_correct"],
        positions=kept.positions,
        next=shlex.join([*words, "--objective", "forward_kl", "--out", f"{settings.name}-student"]),
    )


def prove_best_of_n(
    config: RunConfig, settings: BestOfN, on_event: EventHandler = lambda line: None
) -> None:
    """Raise what would stop `run_best_of_n` before its first response: reads the prompts and loads
    both models.
    """
    found = teacher_prompts(
        config, settings, settings.sampled, grader=settings.grader, on_event=on_event
    )
    prove(found.config)
    close_backend(backend(found.student, config.run))


def choose(
    store: Store, segment: Segment, scorer: Any, settings: BestOfN, counts: dict[str, int]
) -> Chosen | None:
    """Choose one response to each prompt of a segment; None where all its prompts are dropped.

    scorer: the student, for ties by overlap. counts: of BestOfNReport, which grow.
    """
    rollouts = store.read_rollouts(segment)
    assert rollouts.reward is not None, "a grader"
    best = {
        prompt: _best(rollouts.reward, np.flatnonzero(rollouts.seq_prompt == prompt))
        for prompt in range(len(rollouts.prompts))
    }
    correct = {p: bool(rollouts.reward[places[0]] >= CORRECT) for p, places in best.items()}
    counts["prompts"] += len(best)
    counts["with_correct"] += sum(correct.values())
    if settings.incorrect == "drop":
        counts["dropped"] += len(best) - sum(correct.values())
        best = {prompt: places for prompt, places in best.items() if correct[prompt]}
    ties = sum(len(places) > 1 for places in best.values())
    counts["ties"] += ties
    similar = np.zeros(len(rollouts.seq_prompt))
    if ties and settings.ties == "overlap":
        similar = overlaps(rollouts, scorer)
    elif ties:
        similar = mean_logprobs(rollouts)
    # The first of those that are equal in this too.
    places = sorted(int(p[np.argmax(similar[p])]) for p in best.values())
    if not places:
        return None
    return Chosen(segment=segment, sequences=tuple(places), prompts=len(places))


def _best(reward: Array, places: Array) -> Array:
    """Return those of some places that have the largest reward."""
    found: Array = places[reward[places] == reward[places].max()]
    return found


def overlaps(rollouts: Rollouts, scorer: Any) -> Array:
    """Return [N], the mean over a response of |S(p) & S(q)| / k (Eq.6 of arXiv 2604.13016).

    rollouts: of the teacher, with its top-k; scorer: the student; k: ids of each row that the
    teacher has.
    """
    assert rollouts.student is not None, "a committed rollout unit holds these"
    k = int(rollouts.student.cnt.min())
    own = ScoreParams(top_p=1.0, k_min=k, k_max=k, at_student=False)
    p, q = _top(scorer.score(rollouts, own), k), _top(rollouts.student, k)
    shared = np.zeros(len(p))
    for column in range(k):  # [P, k] at a time, never [P, k, k]
        shared += (q == p[:, column : column + 1]).any(1)
    return _means(shared / k, rollouts)


def mean_logprobs(rollouts: Rollouts) -> Array:
    """Return [N], the teacher's mean log-prob of the tokens of a response, nats."""
    assert rollouts.student is not None, "a committed rollout unit holds these"
    return _means(rollouts.student.lp.astype(np.float64), rollouts)


def _top(scores: Scores, k: int) -> Array:
    """Return [P, k], the best k ids of every row."""
    ids: Array = scores.ids[starts(scores.cnt)[:-1, None] + np.arange(k)]
    return ids


def _means(values: Array, rollouts: Rollouts) -> Array:
    """Return [N], the mean of the values [P] of each sequence."""
    sequence = np.repeat(np.arange(len(rollouts.seq_prompt)), rollouts.lengths())
    sums = np.bincount(sequence, values, minlength=len(rollouts.seq_prompt))
    means: Array = sums / np.maximum(rollouts.lengths(), 1)
    return means
