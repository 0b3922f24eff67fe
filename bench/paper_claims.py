"""Claims of arXiv 2604.13016, their measures in the miniature, and the rule of the verdicts.

The rule, written before any seed was run. Each claim has one number a seed, positive if the paper
is right; with a margin, the absolute number must be below it instead. The mean over n seeds has the
standard error max(s, e) / sqrt(n): s is the spread of the seeds and e the sampling noise of a
seed's accuracies, which alone counts for one seed. A number without noise needs two seeds.

    agrees       mean - 2 se > 0, or |mean| + 2 se < margin
    does not     mean + 2 se < 0, or |mean| - 2 se > margin
    cannot tell  neither

An experiment agrees if all of its claims do, and does not if one does not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from paper_task import EVALUATION

AGREES, DIFFERS, UNCLEAR = "agrees", "does not", "cannot tell"
SAME = 0.05
"""Margin of accuracies that are nearly the same."""

Seed = Mapping[str, Any]
"""Results of a seed: a run's name -> its results; `accuracy`, `probes`."""
Number = tuple[float, float]
"""(value, sampling noise: one standard error)."""


@dataclass(frozen=True)
class Claim:
    """A claim of an experiment."""

    experiment: str
    text: str
    measure: Callable[[Seed], Number]
    margin: float | None = None


def outcome(numbers: Sequence[Number], margin: float | None = None) -> str:
    """Return the verdict on a claim from the numbers of its seeds, by the rule above."""
    value, error = mean(numbers)
    if math.isnan(error):
        return UNCLEAR
    if margin is None:
        return AGREES if value > 2 * error else DIFFERS if value < -2 * error else UNCLEAR
    if abs(value) + 2 * error < margin:
        return AGREES
    return DIFFERS if abs(value) - 2 * error > margin else UNCLEAR


def mean(numbers: Sequence[Number]) -> Number:
    """Return the mean over seeds and its standard error: NaN for one seed without noise."""
    values, noise = [v for v, _ in numbers], fmean(e for _, e in numbers)
    if len(values) == 1:
        return values[0], noise or math.nan
    return fmean(values), max(stdev(values), noise) / math.sqrt(len(values))


def together(verdicts: Sequence[str]) -> str:
    """Return the verdict on an experiment from those on its claims."""
    if DIFFERS in verdicts:
        return DIFFERS
    return UNCLEAR if UNCLEAR in verdicts else AGREES


def _noise(*shares: float) -> float:
    """Return the standard error of a sum or difference of accuracies."""
    return math.sqrt(sum(p * (1 - p) / EVALUATION for p in shares))


def _better(more: str, less: str) -> Callable[[Seed], Number]:
    """Measure the accuracy of one run minus that of another."""

    def measure(seed: Seed) -> Number:
        a, b = seed[more]["after"], seed[less]["after"]
        return a - b, _noise(a, b)

    return measure


def _gain(name: str, *, minus: str | None = None, sign: int = 1) -> Callable[[Seed], Number]:
    """Measure what a run adds to the accuracy, minus what another adds."""

    def measure(seed: Seed) -> Number:
        runs = [seed[each] for each in (name, minus) if each]
        gains = [each["after"] - each["before"] for each in runs]
        shares = [each[key] for each in runs for key in ("after", "before")]
        return sign * (gains[0] - sum(gains[1:])), _noise(*shares)

    return measure


def _recovery(name: str, least: float) -> Callable[[Seed], Number]:
    """Measure the share of the gap to the teacher that a run closes, minus `least`."""

    def measure(seed: Seed) -> Number:
        after, before, teacher = (seed[name][key] for key in ("after", "before", "teacher"))
        gap = teacher - before
        return (after - before) / gap - least, _noise(after, before) / abs(gap)

    return measure


def _change(name: str, key: str, *, minus: str | None = None) -> Callable[[Seed], Number]:
    """Measure the change of a metric in a run, minus its change in another."""

    def measure(seed: Seed) -> Number:
        changes = [seed[n]["last"][key] - seed[n]["first"][key] for n in (name, minus) if n]
        return changes[0] - sum(changes[1:]), 0.0

    return measure


def _minus(first: Callable[[Seed], Number]) -> Callable[[Seed], Number]:
    return lambda seed: (-first(seed)[0], first(seed)[1])


def _metric(more: str, less: str, key: str, when: str = "first") -> Callable[[Seed], Number]:
    """Measure a metric of one run minus that of another, before or after them."""
    return lambda seed: (seed[more][when][key] - seed[less][when][key], 0.0)


def _probe(key: str) -> Callable[[Seed], Number]:
    return lambda seed: (seed["probes"][key][0], seed["probes"][key][1])


def _to_base(name: str) -> Callable[[Seed], Number]:
    def measure(seed: Seed) -> Number:
        after, base = seed[name]["after"], seed["accuracy"]["base"]
        return after - base, _noise(after, base)

    return measure


def _templates(more: str, less: str) -> Callable[[Seed], Number]:
    """Measure the mean accuracy on both templates of one run minus that of another."""

    def measure(seed: Seed) -> Number:
        shares = [seed[n][k] for n in (more, less) for k in ("after", "after_other_template")]
        return (shares[0] + shares[1] - shares[2] - shares[3]) / 2, _noise(*shares) / 2

    return measure


def _dynamics(number: str, works: str, fails: str) -> tuple[Claim, ...]:
    """Return the claims of E5, which E6 repeats with larger models."""
    return (
        Claim(number, "works: overlap ratio rises", _change(works, "ratio")),
        Claim(number, "works: overlap mass rises", _change(works, "mass")),
        Claim(number, "works: overlap advantage rises to 0", _change(works, "advantage")),
        Claim(number, "works: entropy gap falls", _minus(_change(works, "gap"))),
        Claim(number, "works: over 80 % of the gap closed", _recovery(works, 0.8)),
        Claim(number, "fails: adds less", _gain(works, minus=fails)),
        Claim(number, "fails: ratio rises less", _change(works, "ratio", minus=fails)),
        Claim(number, "fails: smaller first gradient", _metric(works, fails, "grad_norm")),
    )


CLAIMS = (
    Claim("E1", "same pattern: larger first overlap ratio", _metric("same", "other", "ratio")),
    Claim("E1", "same pattern: better student", _better("same", "other")),
    Claim("E3", "post-trained teacher adds more than a bigger one", _gain("same", minus="failure")),
    Claim("E4", "an earlier teacher pulls back", _gain("reverse", sign=-1)),
    Claim("E4", "a bigger one pulls back", _gain("reverse_big", sign=-1)),
    Claim("E4", "both to the same accuracy", _better("reverse", "reverse_big"), SAME),
    Claim("E4", "to that before post-training", _to_base("reverse"), SAME),
    *_dynamics("E5", "success", "failure"),
    *_dynamics("E6", "success_big", "failure_big"),
    Claim("E7", "overlap as good as student top-k", _better("overlap", "success"), SAME),
    Claim("E7", "overlap better than non-overlap", _better("overlap", "non_overlap")),
    Claim("E8", "cold start: larger first overlap ratio", _metric("cold", "other", "ratio")),
    Claim("E8", "cold start: better student", _better("cold", "other")),
    Claim("E9", "the teacher's template is better", _templates("success", "template")),
    Claim("E10", "the teacher's prompts are better", _better("content", "success")),
    Claim("E10", "smaller overlap ratio", _metric("success", "content", "ratio", "last")),
    Claim("E10", "larger overlap mass", _metric("content", "success", "mass", "last")),
    Claim("E10", "smaller entropy", _metric("success", "content", "entropy", "last")),
    Claim("E12", "entropy grows more at the end of responses", _probe("entropy_tail")),
    Claim("E13", "the teacher helps less from later prefixes", _probe("continuation_fall")),
    Claim("E14", "reward of the teacher that works: AUROC > 0.5", _probe("auroc_works")),
    Claim("E14", "reward of the one that fails: AUROC > 0.5", _probe("auroc_fails")),
    Claim("E14", "both as informative", _probe("auroc_difference"), 0.1),
    Claim("E15", "k = 16 better than k = 1", _better("k16", "k1")),
    Claim("E15", "k = 64 as good as k = 16", _better("k64", "k16"), SAME),
    Claim("E15", "sampled token as good as k = 16", _better("sampled", "k16"), SAME),
)

NEEDS = {
    "E1": ("same", "other"),
    "E3": ("same", "failure"),
    "E4": ("reverse", "reverse_big", "reverse_long", "reverse_big_long"),
    "E5": ("success", "failure"),
    "E6": ("success_big", "failure_big"),
    "E7": ("success", "overlap", "non_overlap"),
    "E8": ("other", "cold"),
    "E9": ("success", "template"),
    "E10": ("success", "content"),
    "E12": ("k1",),
    "E13": (),
    "E14": (),
    "E15": ("sampled", "k1", "k4", "k16", "k64"),
    "compatibility": ("success", "same", "other", "failure"),
}
"""Experiment -> its runs. The long runs of E4 were added afterwards, and no claim reads them. The
last is no experiment of the paper: it holds `probe compatibility` against what its teachers do."""
