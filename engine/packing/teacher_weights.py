"""Weights of several teachers that are computed from the store: w = softmax of a score over tau.

    entropy     minus the teacher's entropy, of each position. NeMo-RL takes its mean over the whole
                microbatch of all processes, so that a weight depends on its batch mates.
    agreement   minus its mean divergence from the other teachers, of each response: what the scores
                can say of the debate of MAD-OPD (arXiv 2605.01347). The divergence is the
                Jensen-Shannon divergence of both at the ids that both scored and one bucket, a
                lower bound of the full one; its mean is over the trained positions.
    accuracy    its mean reward on each prompt, from rollouts of its own. TGOPD (arXiv 2609.02998),
                as far as it is described, trusts a teacher per prompt by graded probes. Its
                GRPO on prompts that no teacher solves is not here: they have equal weights.
    confidence  a number from 0 to 100 of each prompt, over 100 (MAD-OPD, Eq.7).

The sum over the teachers of a position is 1, and every one of them has a score: a teacher without
one is an error, and not left out of the sum.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from logitcask.engine.config.teacher import TeacherMix
from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.packing.mixture import join
from logitcask.engine.packing.teachers import Teachers
from logitcask.engine.store import Segment, Snapshot, Store
from logitcask.engine.store.inspect import rewards_of
from logitcask.engine.types import Array

LEAST = 2.0**-24
"""Least weight of a teacher: with one of 0 a trained position would look like a masked one."""


_TEXTS = {
    "fixed": "",
    "entropy": "minus their entropy at each position",
    "agreement": "minus their mean divergence from the other teachers on each response",
    "accuracy": "their accuracy on each prompt",
    "confidence": "their confidence on each prompt",
}


def weighting_text(mix: TeacherMix) -> str:
    """Return the score of computed weights as text; empty for fixed ones."""
    text, temperature = _TEXTS[mix.teacher_weighting], mix.teacher_weighting_temperature
    return text if temperature == 1 or not text else f"{text}, over {temperature:g}"


def softmax_weights(scores: Array, temperature: float) -> Array:
    """Return the softmax of scores [T, ...] over T teachers, float64, each at least LEAST."""
    scaled = scores.astype(np.float64) / temperature
    weights = np.maximum(np.exp(scaled - scaled.max(0)), LEAST)
    normalised: Array = weights / weights.sum(0)
    return normalised


def weights_of_rows(
    teachers: Teachers, parts: Sequence[Mapping[str, Array]], of_prompt: Array | None
) -> Array:
    """Return the weights [T, R] of the rows of one sequence.

    parts: of each teacher, as of `DecodedUnit.sequence`. of_prompt: [T] scores of its prompt, where
    the weighting has such.
    """
    kind, rows = teachers.mix.teacher_weighting, len(parts[0]["token"])
    if kind == "fixed":
        return np.repeat(np.asarray(teachers.weights)[:, None], rows, 1)
    if kind == "entropy":
        scores = -np.stack([part["q_entropy"] for part in parts])
    elif kind == "agreement":
        scores = -mean_divergences(parts)[:, None]
    else:
        assert of_prompt is not None, "scores of the prompts"
        scores = of_prompt[:, None]
    weights = softmax_weights(scores, teachers.mix.teacher_weighting_temperature)
    return np.broadcast_to(weights, (len(parts), rows))


def mean_divergences(parts: Sequence[Mapping[str, Array]]) -> Array:
    """Return [T] nats: the mean divergence of each teacher from the others on one sequence.

    0 for a sequence without a trained row.
    """
    x = join(parts)
    trained = parts[0]["weight"] > 0
    found = np.zeros(len(parts))
    for i, j in combinations(range(len(parts)), 2):
        both = x.scored[i] & x.scored[j]
        row = x.row[both]
        sides = [x.q[each][both] for each in (i, j)]
        rest = [
            np.maximum(1 - np.bincount(row, side, minlength=len(trained)), 0.0) for side in sides
        ]
        inside = np.bincount(row, _js_terms(*sides), minlength=len(trained))
        rows = (inside + _js_terms(*rest))[trained]
        found[[i, j]] += rows.mean() if len(rows) else 0.0
    return found / (len(parts) - 1)


def _js_terms(p: Array, q: Array) -> Array:
    """Return the terms of the Jensen-Shannon divergence at each id, nats."""
    mean = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (np.where(x > 0, x * np.log(x / mean), 0.0) for x in (p, q))
    terms: Array = (first + second) / 2
    return terms


def scores_of_prompts(
    store: Store, snapshot: Snapshot, segments: Sequence[Segment], teachers: Teachers
) -> list[Array] | None:
    """Return [T, N] of each segment: the scores that come from the prompt of each sequence.

    None where the weighting has no such scores. Raises ConfigError for a prompt without a number,
    or another prompt of the same id, and IncompleteError for rollouts or rewards that are missing.
    """
    kind = teachers.mix.teacher_weighting
    if kind not in ("accuracy", "confidence"):
        return None
    graded = _accuracies(store, snapshot, teachers) if kind == "accuracy" else {}
    found = []
    for segment in segments:
        extent = store.read_extent(segment)
        prompts = list(zip(extent.prompt_ids, extent.prompt_extra, strict=True))
        if kind == "accuracy":
            scores = [[_accuracy(of, *each) for each in prompts] for of in graded.items()]
        else:
            key = teachers.mix.teacher_confidence or ""
            scores = [
                [_confidence(key, name, *each) for each in prompts] for name in teachers.names
            ]
        shape = len(teachers.names), len(prompts)
        found.append(np.asarray(scores, np.float64).reshape(shape)[:, extent.seq_prompt])
    return found


Graded = Mapping[str, tuple[float, Mapping[str, Any]]]
"""Id of a prompt -> (mean reward, its other keys)."""


def _accuracies(store: Store, snapshot: Snapshot, teachers: Teachers) -> dict[str, Graded]:
    """Read the mean reward of each teacher on each prompt of its own rollouts."""
    text = teachers.mix.teacher_rollouts or ""
    pairs = [part.partition("=") for part in text.split(",")]
    names = {name.strip(): rollouts.strip() for name, _, rollouts in pairs}
    if len(pairs) != len(names) or set(names) != set(teachers.names) or not all(names.values()):
        raise ConfigError(
            f"teacher_rollouts = {text}: not one name of rollouts for each of the teachers "
            f"{', '.join(teachers.names)}",
            hint=f"give --teacher-rollouts {','.join(f'{n}=ROLLOUTS' for n in teachers.names)}",
        )
    return {name: _graded(store, snapshot, name, names[name]) for name in teachers.names}


def _graded(store: Store, snapshot: Snapshot, teacher: str, rollouts: str) -> Graded:
    """Read the mean rewards of one name of rollouts. Raises IncompleteError for none."""
    segments = snapshot.rollouts(rollouts)
    rewards: dict[str, list[float]] = {}
    extras: dict[str, Mapping[str, Any]] = {}
    for segment in segments:
        of_sequence, extent = rewards_of(store, segment), store.read_extent(segment)
        if of_sequence is None:
            segments = ()
            break
        extras |= dict(zip(extent.prompt_ids, extent.prompt_extra, strict=True))
        for prompt, reward in zip(extent.seq_prompt, of_sequence, strict=True):
            rewards.setdefault(extent.prompt_ids[prompt], []).append(float(reward))
    if not segments:
        raise IncompleteError(
            f"the store has no rollouts {rollouts!r} with rewards, for the accuracy of {teacher!r}",
            hint=f"sample the same prompts: logitcask rollout --model TEACHER --rollouts "
            f"{rollouts} --grader exact; the store has {snapshot.names('rollout')}",
        )
    return {key: (sum(of) / len(of), extras[key]) for key, of in rewards.items()}


def _accuracy(of: tuple[str, Graded], prompt: str, extra: Mapping[str, Any]) -> float:
    """Return the accuracy of a teacher on a prompt. Raises IncompleteError or ConfigError."""
    teacher, graded = of
    if prompt not in graded:
        raise IncompleteError(
            f"teacher {teacher!r} has no graded response to prompt {prompt!r}, of "
            f"{len(graded)} prompts",
            hint="sample its rollouts from the prompts file of the student's",
        )
    accuracy, theirs = graded[prompt]
    if dict(theirs) != dict(extra):
        raise ConfigError(
            f"prompt {prompt!r} has other keys in the rollouts of teacher {teacher!r}, so it may "
            "be another prompt",
            hint="sample its rollouts from the prompts file of the student's",
        )
    return accuracy


def _confidence(key: str, teacher: str, prompt: str, extra: Mapping[str, Any]) -> float:
    """Return the confidence of a teacher on a prompt, in [0, 1]. Raises ConfigError."""
    values = extra.get(key)
    value = values.get(teacher) if isinstance(values, Mapping) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 100:
        raise ConfigError(
            f"prompt {prompt!r} has {key} = {values!r}: no number from 0 to 100 for teacher "
            f"{teacher!r}",
            hint=f'sample from prompts with "{key}": {{"{teacher}": 90, ...}}, or name another key '
            "with --teacher-confidence",
        )
    return value / 100
