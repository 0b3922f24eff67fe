"""Sequence mean reward against correctness: does the teacher prefer the right responses?

    r = 1/T sum_t [log q(y_t) - log p(y_t)]          nats a token (Sec. 6.2 of the paper)

over the T tokens of a response that count in a loss; p is the student that sampled, as stored. A
teacher with another tokenizer has log q of spans, whose sum over a response is the same quantity.
The area under the ROC curve is the probability that a correct response has a larger r than an
incorrect one, ties as one half. In the paper (Fig. 14) it is 0.73 for a teacher that helped and
0.75 for one that did not: such a reward is not sufficient.

Responses to one prompt are not independent, so standard errors are over prompts: of a mean by the
sums of each prompt's residuals, of the area by Obuchowski (Biometrics 53:567, 1997).
"""

from dataclasses import dataclass

import numpy as np

from logitcask.engine.alignment.span_scores import END, SpanScores
from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.events import counted
from logitcask.engine.exchange.positions import select
from logitcask.engine.store import Snapshot, Store
from logitcask.engine.store.decoded_unit import has_spans
from logitcask.engine.store.spans.checks import span_of
from logitcask.engine.types import Array


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRewards:
    """The responses with a score of every token that counts."""

    mean: Array
    """[N] float64, r of each response, nats a token."""
    reward: Array
    """[N] float32, the grader's."""
    prompt: Array
    """[N] int64, number of the prompt."""
    left_out: int
    """Responses without such a score, or without a token that counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardReport:
    """Mean rewards of correct and incorrect responses, ± standard errors over prompts."""

    correct: int
    incorrect: int
    left_out: int
    mean_correct: float
    mean_correct_se: float
    mean_incorrect: float
    mean_incorrect_se: float
    auroc: float
    auroc_se: float
    reading: str


def sequence_rewards(
    store: Store, snapshot: Snapshot, *, rollouts: str | None = None, teacher: str | None = None
) -> SequenceRewards:
    """Read r and the grader's reward of each response.

    Raises as `select`, and IncompleteError without scores, rewards or the student's log-probs.
    """
    selection = select(snapshot, rollouts=rollouts, teacher=teacher, spans=True)
    means, rewards, prompts = list[Array](), list[Array](), list[Array]()
    number_of: dict[str, int] = {}
    pairs = selection.segments
    for segment, score_segments in counted("read segments", pairs, len(pairs), "segments"):
        if not score_segments:
            raise IncompleteError(
                f"rollouts {segment.seg_id} have no scores of {selection.teacher!r}",
                hint="run `logitcask score` first",
            )
        data = store.read_rollouts(segment)
        if data.reward is None or data.student is None:
            what, hint = (
                ("rewards", "sample with --grader, on prompts with answers")
                if data.reward is None
                else ("log-probs of the student", "import them with a student that scores them")
            )
            raise IncompleteError(f"rollouts {selection.rollouts!r} have no {what}", hint=hint)
        lengths = data.lengths()
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        counts = data.loss_mask != 0
        if has_spans(score_segments):
            spans = store.read_span_scores(score_segments, base=data)
            gap, known = _of_spans(spans, data.student.lp, counts)
        else:
            scores = store.read_scores(score_segments, base=data)
            known = counts if scores.scored is None else counts & scores.scored
            gap = np.where(known, scores.lp.astype(np.float64) - data.student.lp, 0.0)
        total, count, scored = (
            np.bincount(sequence, weights, len(lengths)) for weights in (gap, counts, known)
        )
        whole = (count > 0) & (count == scored)
        means.append(total[whole] / count[whole])
        rewards.append(data.reward[whole])
        numbers = [number_of.setdefault(each.id, len(number_of)) for each in data.prompts]
        prompts.append(np.array(numbers, np.int64)[data.seq_prompt[whole]])
    mean = np.concatenate(means)
    return SequenceRewards(
        mean=mean,
        reward=np.concatenate(rewards),
        prompt=np.concatenate(prompts),
        left_out=sum(segment.counts["N"] for segment, _ in selection.segments) - len(mean),
    )


def _of_spans(scores: SpanScores, lp: Array, counts: Array) -> tuple[Array, Array]:
    """Return [P] log q - log p of the span that each token ends, else 0, and [P] bool: it has one.

    lp: [P] of the student's tokens; counts: [P] bool. A span with a token that does not count has
    no value.
    """
    own, of = span_of(scores.student_marks), span_of(scores.marks)
    of_q, of_p, left_out = (
        np.bincount(span[span >= 0], values[span >= 0].astype(np.float64), scores.spans)
        for span, values in ((of, scores.log_probs), (own, lp), (own, ~counts))
    )
    gap = np.zeros(len(lp))
    gap[(scores.student_marks & END) != 0] = np.where(left_out > 0, 0.0, of_q - of_p)
    return gap, (own >= 0) & ~np.append(left_out > 0, True)[own]


def reward_report(found: SequenceRewards, *, correct_from: float) -> RewardReport:
    """Compare responses with a reward of at least `correct_from` with all others.

    Raises ConfigError where one of the two groups is empty.
    """
    is_correct = found.reward >= correct_from
    n, all_of = int(is_correct.sum()), len(is_correct)
    if n in (0, all_of):
        raise ConfigError(
            f"{n} of {all_of} responses have a reward of {correct_from:g} or more, and two groups "
            "are compared",
            hint="give another --correct-from, or rollouts with correct and incorrect responses",
        )
    groups = [
        clustered_mean(found.mean[part], found.prompt[part]) for part in (is_correct, ~is_correct)
    ]
    area, area_se = auroc(found.mean, is_correct, found.prompt)
    return RewardReport(
        correct=n,
        incorrect=all_of - n,
        left_out=found.left_out,
        mean_correct=groups[0][0],
        mean_correct_se=groups[0][1],
        mean_incorrect=groups[1][0],
        mean_incorrect_se=groups[1][1],
        auroc=area,
        auroc_se=area_se,
        reading=_reading(area, area_se),
    )


def auroc(values: Array, is_positive: Array, cluster: Array) -> tuple[float, float]:
    """Return (area under the ROC curve, its standard error over clusters).

    values [N]; is_positive [N] bool, both kinds there; cluster [N] int64. The error is NaN with
    fewer than two clusters of either kind.
    """
    positive, negative = values[is_positive], values[~is_positive]
    wins = _share_below(positive, negative)
    losses = 1 - _share_below(negative, positive)
    area = float(wins.mean())
    clusters = int(cluster.max()) + 1
    kinds = (
        (wins, cluster[is_positive]),
        (losses, cluster[~is_positive]),
    )
    residuals, variances = [], []
    for share, of in kinds:
        # Of each cluster the sum of its shares less what the area lets expect.
        residual = np.bincount(of, share - area, clusters)
        residuals.append(residual / len(share))
        number = len(np.unique(of))
        scale = number / (number - 1) if number > 1 else np.nan
        variances.append(scale * float((residuals[-1] ** 2).sum()))
    number = len(np.unique(cluster))
    scale = number / (number - 1) if number > 1 else np.nan
    covariance = scale * float((residuals[0] * residuals[1]).sum())
    return area, float(np.sqrt(max(sum(variances) + 2 * covariance, 0.0)))


def _share_below(values: Array, others: Array) -> Array:
    """Return [N] the share of `others` below each value, those equal to it as one half."""
    ordered = np.sort(others)
    below, upto = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    share: Array = (below + upto) / (2 * len(others))
    return share


def clustered_mean(values: Array, cluster: Array) -> tuple[float, float]:
    """Return (mean, its standard error over clusters); NaN with one cluster."""
    mean = float(values.mean())
    sums = np.bincount(cluster, values - mean)[np.unique(cluster)]
    scale = len(sums) / (len(sums) - 1) if len(sums) > 1 else np.nan
    return mean, float(np.sqrt(scale * (sums**2).sum())) / len(values)


def _reading(area: float, error: float) -> str:
    if not abs(area - 0.5) > 2 * error:
        return (
            f"AUROC {area:.2f} is within two standard errors of 0.5: these responses do not show "
            "that the teacher's reward tells correct from incorrect"
        )
    if area < 0.5:
        return (
            f"AUROC {area:.2f}: the teacher prefers incorrect responses, so its reward pulls away "
            "from them"
        )
    return (
        f"AUROC {area:.2f}: the teacher's reward prefers correct responses; the paper found 0.73 "
        "for a teacher that helped and 0.75 for one that did not, so this alone is not sufficient"
    )
