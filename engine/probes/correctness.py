"""Teacher and student on correct and on incorrect responses: where does the signal point?

"Unmasking On-Policy Distillation" (arXiv 2605.10889) compares the teacher's gradient with the one
that raises the probability of success, and finds that they agree more on incorrect rollouts than on
correct ones, where the teacher is noisy. That gradient needs many rollouts of each prefix. The
store alone shows what the signal does in each group, as means over the rows that count in a loss:
the measures of positions.py, and of the sampled token y

    token/advantage        log q(y) - log p(y), nats; below 0 the teacher wants y less
    token/advantage_size   its absolute value
    token/negative_share   share of the tokens with an advantage below 0
    token/disagree_share   share of the tokens that are not the teacher's most likely id

Standard errors are over prompts, as in reward.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.events import counted
from logitcask.engine.exchange.positions import Block, blocks, select
from logitcask.engine.probes.columns import column_of
from logitcask.engine.probes.positions import MEASURES, common_k, row_values
from logitcask.engine.probes.reward import clustered_mean
from logitcask.engine.store import Snapshot, Store
from logitcask.engine.store.format.ragged import matrix
from logitcask.engine.types import Array

SIZE = "token/advantage_size"
SIGNALS = ("token/advantage", SIZE, "token/negative_share", "token/disagree_share")


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """A measure in both groups, ± standard errors; None where a group has no value or one prompt.

    `difference` is correct less incorrect.
    """

    correct: float | None
    correct_se: float | None
    incorrect: float | None
    incorrect_se: float | None
    difference: float | None
    difference_se: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectnessReport:
    k: int
    correct: int
    """Responses."""
    incorrect: int
    correct_rows: int
    incorrect_rows: int
    measures: Mapping[str, Split]
    """Name of MEASURES or SIGNALS -> its means."""
    reading: str


def correctness_report(
    store: Store,
    snapshot: Snapshot,
    *,
    rollouts: str | None = None,
    teacher: str | None = None,
    correct_from: float,
) -> CorrectnessReport:
    """Compare responses with a reward of at least `correct_from` with all others.

    Raises as `select` and `common_k`, IncompleteError without rewards, ConfigError where one of the
    two groups has no row.
    """
    selection = select(snapshot, rollouts=rollouts, teacher=teacher)
    k = common_k(selection)
    number_of: dict[str, int] = {}
    found: list[tuple[Array, ...]] = []
    count = len(selection.segments)
    for index in counted("read segments", range(count), count, "segments"):
        for block in blocks(store, selection, index):
            if block["reward"] is None:
                raise IncompleteError(
                    f"rollouts {selection.rollouts!r} have no rewards",
                    hint="sample with --grader, on prompts with answers",
                )
            found.append(_rows(block, k, number_of))
    prompt, sequence, reward, values = (np.concatenate(each) for each in zip(*found, strict=True))
    is_correct = reward >= correct_from
    if is_correct.all() or not is_correct.any():
        raise ConfigError(
            f"{int(is_correct.sum())} of {len(is_correct)} rows are of responses with a reward of "
            f"{correct_from:g} or more, and two groups are compared",
            hint="give another --correct-from, or rollouts with correct and incorrect responses",
        )
    measures = {
        name: split(values[:, i], is_correct, prompt)
        for i, name in enumerate((*MEASURES, *SIGNALS))
    }
    return CorrectnessReport(
        k=k,
        correct=len(np.unique(sequence[is_correct])),
        incorrect=len(np.unique(sequence[~is_correct])),
        correct_rows=int(is_correct.sum()),
        incorrect_rows=int((~is_correct).sum()),
        measures=measures,
        reading=_reading(measures[SIZE]),
    )


def split(values: Array, is_first: Array, cluster: Array) -> Split:
    """Return means and their difference, with standard errors over clusters.

    values [R], NaN = none; is_first [R] bool; cluster [R] int64. A cluster may have rows of both.
    """
    known = ~np.isnan(values)
    values, is_first, cluster = values[known], is_first[known], cluster[known]
    none = (np.nan, np.nan)
    groups = [
        clustered_mean(values[part], cluster[part]) if part.any() else none
        for part in (is_first, ~is_first)
    ]
    if is_first.all() or not is_first.any():
        return Split(**_named(*groups, none))
    (first, _), (second, _) = groups
    weights = np.where(is_first, 1 / is_first.sum(), -1 / (~is_first).sum())
    sums = np.bincount(cluster, weights * (values - np.where(is_first, first, second)))
    number = len(np.unique(cluster))
    scale = number / (number - 1) if number > 1 else np.nan
    error = float(np.sqrt(scale * (sums**2).sum()))
    return Split(**_named(*groups, (first - second, error)))


def _named(*pairs: tuple[float, float]) -> dict[str, float | None]:
    keys = [
        f"{name}{end}" for name in ("correct", "incorrect", "difference") for end in ("", "_se")
    ]
    values = [float(value) for pair in pairs for value in pair]
    found = zip(keys, values, strict=True)
    return {key: None if np.isnan(value) else value for key, value in found}


def _rows(block: Block, k: int, number_of: dict[str, int]) -> tuple[Array, ...]:
    """Return prompt, sequence, reward [R] and values [R, M] of the rows that count."""
    counts, values = row_values(block, k)
    numbers = [number_of.setdefault(name, len(number_of)) for name in column_of(block, "prompt")]
    signals = np.stack(list(_signals(block)), 1)
    return (
        np.array(numbers, np.int64)[counts],
        column_of(block, "sequence")[counts],
        column_of(block, "reward")[counts],
        np.concatenate([values, signals], 1)[counts],
    )


def _signals(block: Block) -> Iterator[Array]:
    """Yield SIGNALS, each [P] float64."""
    gap = column_of(block, "teacher_logprob").astype(np.float64) - column_of(
        block, "student_logprob"
    )
    yield gap
    yield np.abs(gap)
    yield (gap < 0).astype(np.float64)
    ids = block["teacher_ids"]
    assert ids is not None, "scored rows"
    assert ids.counts is not None, "a column of lists"
    best = matrix(ids.values, ids.counts, 0)[0][:, :1]
    yield (best != column_of(block, "token")[:, None]).any(1).astype(np.float64)


def _reading(size: Split) -> str:
    if size.difference is None or size.difference_se is None:
        return "too few prompts to compare correct and incorrect responses"
    where = f"{size.correct:.3g} nats a token on correct responses, {size.incorrect:.3g} on others"
    if not abs(size.difference) > 2 * size.difference_se:
        return (
            f"the signal is about as large on correct as on incorrect responses ({where}): the "
            "difference is within two standard errors"
        )
    if size.difference < 0:
        return (
            f"the signal is larger on incorrect responses ({where}), where arXiv 2605.10889 finds "
            "that it helps most"
        )
    return (
        f"the signal is larger on correct responses ({where}), where arXiv 2605.10889 finds that "
        "it is noise more often: look at token/advantage there"
    )
