"""Section of the metrics over the updates, of one run or of several laid over each other."""

from collections.abc import Sequence
from dataclasses import dataclass

from logitcask.engine.report.change import Points, points_of
from logitcask.engine.report.panels import Absent, Axis, Lines, Section, Series
from logitcask.engine.report.runs import TEACHER_ACCURACY, RunFacts

MOST_POINTS, LEAST_POINTS = 500, 50
"""Points of a line: of one run, and of each of many. A longer line has a point for each part of it:
the mean, and a band from the smallest to the largest value, so no spike is lost."""
DIGITS = 6
"""Significant digits of a value."""
LOG_FROM = 100.0
"""Largest value over smallest, from which on an axis is logarithmic where a panel allows it."""
UPDATES = Axis(name="update")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """One panel: the metrics that it shows, and how."""

    id: str
    title: str
    how: str
    y: Axis
    keys: tuple[tuple[str, str], ...]
    """(metric, name of its line)."""
    log: bool = False
    """A logarithmic axis is allowed."""


def _one(key: str, title: str, how: str, unit: str, *, log: bool = False) -> Spec:
    y = Axis(name=title.lower(), unit=unit)
    return Spec(id=key.replace("/", "-"), title=title, how=how, y=y, keys=((key, ""),), log=log)


_SHARE = Axis(name="share of the positions", form="percent")
_MASS = Axis(name="probability", form="percent")

ACCURACY = Spec(
    id="accuracy",
    title="Accuracy",
    how="Mean reward of the graded responses to other prompts: of the first response, and of "
    "all responses to a prompt. The band is the standard error over prompts.",
    y=Axis(name="mean reward", form="percent"),
    keys=(
        ("eval/accuracy", "first response"),
        ("eval/avg_at_n", "all responses"),
        (TEACHER_ACCURACY, "teacher"),
    ),
)
_NOT_GRADED = (
    "no graded evaluation: `logitcask train --eval-prompts FILE` measures it before and after, and "
    "`logitcask evaluate RUN --worker --eval-prompts FILE` later"
)

SPECS = (
    ACCURACY,
    Spec(
        id="loss",
        title="Loss",
        how="Mean loss of an update by the objective. Losses of different objectives do not "
        "compare, and a policy gradient has no lower bound: read its metrics instead.",
        y=Axis(name="loss", unit="nats"),
        keys=(
            ("loss", "loss"),
            ("loss/distill", "distillation alone"),
            ("loss/ce", "cross-entropy"),
            ("loss/reward", "reward"),
            ("loss/return_to_go", "return to go"),
            ("eval/loss", "held out"),
        ),
        log=True,
    ),
    Spec(
        id="overlap-ratio",
        title="Overlap ratio",
        how="Share of the 16 best ids of the student (fewer where fewer are stored) that are among "
        "the teacher's best too. It counts ids of almost no probability, so under reverse KL it "
        "may fall while the mass rises: read both.",
        y=Axis(name="overlap ratio", form="percent"),
        keys=(("overlap/ratio", ""), ("eval/overlap/ratio", "held out")),
    ),
    Spec(
        id="overlap-mass",
        title="Overlap mass",
        how="Probability of student and teacher on the ids that are among the 16 best of both. "
        "Near 100 % is healthy; a mass that falls means that the student looks elsewhere than "
        "the teacher.",
        y=_MASS,
        keys=(
            ("overlap/mass_student", "student"),
            ("overlap/mass_teacher", "teacher"),
            ("eval/overlap/mass_student", "student, held out"),
            ("eval/overlap/mass_teacher", "teacher, held out"),
        ),
    ),
    Spec(
        id="advantage",
        title="Overlap advantage",
        how="Mean of the renormalised student's probability times log q - log p on the common "
        "ids. It is 0 where both agree and negative else: rising towards 0 is good.",
        y=Axis(name="advantage", unit="nats"),
        keys=(("overlap/advantage", ""), ("eval/overlap/advantage", "held out")),
    ),
    Spec(
        id="entropy",
        title="Entropy",
        how="Entropy of the next token of both models. The student should come near the teacher; "
        "far below it, its samples lose their variety.",
        y=Axis(name="entropy", unit="nats"),
        keys=(
            ("entropy/student", "student"),
            ("entropy/teacher", "teacher"),
            ("eval/entropy/student", "student, held out"),
            ("eval/entropy/teacher", "teacher, held out"),
        ),
    ),
    Spec(
        id="entropy-gap",
        title="Entropy gap",
        how="Mean absolute difference of both entropies at a position; 0 where both are as sure.",
        y=Axis(name="entropy gap", unit="nats"),
        keys=(("entropy/gap", ""), ("eval/entropy/gap", "held out")),
    ),
    Spec(
        id="kl",
        title="KL divergence",
        how="Forward: KL(teacher || student), reverse: KL(student || teacher). Both are lower "
        "bounds, with all ids without a score in one bucket; compare them on the same scores only.",
        y=Axis(name="KL", unit="nats"),
        keys=(
            ("kl/forward_bound", "forward"),
            ("kl/reverse_bound", "reverse"),
            ("eval/kl/forward_bound", "forward, held out"),
            ("eval/kl/reverse_bound", "reverse, held out"),
        ),
        log=True,
    ),
    Spec(
        id="top1",
        title="Same best token",
        how="Share of the positions at which student and teacher have the same most likely token.",
        y=_SHARE,
        keys=(("top1/agreement", ""), ("eval/top1/agreement", "held out")),
    ),
    Spec(
        id="span-kl",
        title="Log-ratio of spans",
        how="Mean of log p - log q of the span of a position, for each of its tokens: of a teacher "
        "with another tokenizer. On policy its mean is a reverse KL, which falls towards 0.",
        y=Axis(name="log-ratio", unit="nats"),
        keys=(("span/reverse_kl", ""), ("eval/span/reverse_kl", "held out")),
    ),
    Spec(
        id="span-shares",
        title="Spans",
        how="Share of the positions in spans of one token on both sides, and in none; the "
        "teacher's mass on stored ids that the student has no token of, and outside all stored.",
        y=_SHARE,
        keys=(
            ("span/one_to_one", "one to one"),
            ("span/gap", "in no span"),
            ("span/unmapped", "no token of the student"),
            ("span/tail", "not stored"),
        ),
    ),
    Spec(
        id="nll",
        title="NLL of the stored tokens",
        how="Mean of -log p of the sampled tokens under the student in training.",
        y=Axis(name="NLL", unit="nats"),
        keys=(("nll/student", ""), ("eval/nll/student", "held out")),
    ),
    Spec(
        id="coverage",
        title="Coverage",
        how="Probability of the student on ids that have a stored score. Objectives on the "
        "student's own ids warn below 95 %: then sample and score again, or keep more ids.",
        y=_MASS,
        keys=(("cache/coverage", ""),),
    ),
    Spec(
        id="uncached",
        title="Uncached mass",
        how="Probability of the student on ids of its 16 best without a score: good near 0.",
        y=_MASS,
        keys=(("cache/uncached_mass", ""),),
    ),
    Spec(
        id="age",
        title="Age of the data",
        how="Mean updates between the student that sampled a position, or the refresh of a teacher "
        "that follows it, and the student in training. 0 is on policy.",
        y=Axis(name="age", unit="updates"),
        keys=(("cache/age", "rollouts"), ("cache/teacher_age", "teacher")),
    ),
    _one(
        "cache/approx_kl",
        "Drift",
        "Approximate KL (k3) from the student that sampled to the one in training. Above 0.05 "
        "drawn tokens are no longer draws of this student; fixed supports are exact at any drift.",
        "nats",
    ),
    Spec(
        id="skipped",
        title="Skipped positions",
        how="Share of the positions beyond the bounds of staleness, which gave no gradient.",
        y=_SHARE,
        keys=(("cache/skipped_share", ""),),
    ),
    _one(
        "cache/resampled",
        "Resampled units",
        "Units that were beyond the bounds of staleness and were sampled again.",
        "units",
    ),
    _one(
        "train/grad_norm",
        "Gradient norm",
        "Norm of the gradient before clipping. Spikes are single bad updates; a norm that grows "
        "is a sign of a learning rate that is too large.",
        "",
        log=True,
    ),
    _one("train/lr", "Learning rate", "Learning rate of each update, by the schedule.", ""),
    Spec(
        id="changed",
        title="Changed weights",
        how="Share of the saved weights that differ after an update, in their own type. Near 0 the "
        "update is lost in rounding: use a larger learning rate.",
        y=Axis(name="share of the weights", form="percent"),
        keys=(("train/changed_share", ""),),
    ),
    Spec(
        id="wait",
        title="Wait for data",
        how="Share of the time that the trainer waited for packs. In a loop it has the sampling "
        "and the scoring of a round in it.",
        y=Axis(name="share of the time", form="percent"),
        keys=(("train/data_wait", ""),),
    ),
)

NOT_MISSED = ("skipped", "cache-resampled", "span-kl", "span-shares")
"""Panels of what comes in some runs alone."""


def dynamics(runs: Sequence[RunFacts]) -> Section:
    """Return the panels of all metrics that some run has."""
    made = {spec: lines_of(spec, runs) for spec in SPECS}
    panels = [panel for panel in (*made.values(), _rate(runs)) if panel is not None]
    missed = [s for s, panel in made.items() if panel is None and s.id not in NOT_MISSED]
    absent = []
    if ACCURACY in missed:
        absent.append(Absent(title=ACCURACY.title, why=_NOT_GRADED))
    if others := ", ".join(spec.title for spec in missed if spec is not ACCURACY):
        absent.append(Absent(title=others, why="not logged yet, or of one tokenizer alone"))
    return Section(id="dynamics", title="Dynamics", panels=tuple(panels), absent=tuple(absent))


def lines_of(spec: Spec, runs: Sequence[RunFacts]) -> Lines | None:
    """Return a panel with a line for each run and metric that is there; None without any."""
    series, parts = [], 1
    for number, run in enumerate(runs):
        for key, name in spec.keys:
            lines = run.evaluated if key.startswith("eval/") else run.updates
            if points := points_of(lines, key):
                part = part_of(points, len(runs))
                parts = max(parts, part)
                series.append(series_of(name or spec.title.lower(), number, points, part))
    return _panel(spec, series, parts) if series else None


def _rate(runs: Sequence[RunFacts]) -> Lines | None:
    """Return positions per second of training between the logged updates."""
    spec = _one(
        "rate",
        "Speed",
        "Response positions trained per second between two logged updates. Pauses for saves and "
        "evaluations are in it.",
        "positions/s",
    )
    series, parts = [], 1
    for number, run in enumerate(runs):
        points, seconds, positions = [], 0.0, 0
        for line in run.updates:
            now, total = line.get("progress/seconds"), line.get("progress/positions")
            if now is None or total is None:
                continue
            # A resumed run may have lost seconds with its last lines.
            if now > seconds and total > positions:
                rate = (total - positions) / (now - seconds)
                points.append((int(line["progress/step"]), rate, None))
            seconds, positions = now, total
        if points:
            part = part_of(points, len(runs))
            parts = max(parts, part)
            series.append(series_of(spec.title.lower(), number, points, part))
    return _panel(spec, series, parts) if series else None


def _panel(spec: Spec, series: Sequence[Series], parts: int) -> Lines:
    how = spec.how
    if parts > 1:
        how += (
            f" The line is the mean of up to {parts} values in a row, the band goes from the "
            "smallest to the largest."
        )
    values = [value for each in series for value in each.y if value is not None]
    y = spec.y
    if spec.log and min(values) > 0 and max(values) / min(values) >= LOG_FROM:
        y = Axis(name=y.name, unit=y.unit, form="log")
    return Lines(id=spec.id, title=spec.title, how=how, x=UPDATES, y=y, series=tuple(series))


def part_of(points: Points, runs: int) -> int:
    """Return the number of values that a point of a line stands for."""
    return -(-len(points) // max(LEAST_POINTS, MOST_POINTS // runs))


def series_of(name: str, run: int, points: Points, part: int = 1) -> Series:
    """Return a line with a point for each `part` values in a row, at the last one's update.

    Single values have a band of one standard error where that is known.
    """
    parts = [points[start : start + part] for start in range(0, len(points), part)]
    y = [sum(value for _, value, _ in each) / len(each) for each in parts]
    if part > 1:
        low = [min(value for _, value, _ in each) for each in parts]
        high = [max(value for _, value, _ in each) for each in parts]
    elif any(error for _, _, error in points):
        low = [value - (error or 0.0) for _, value, error in points]
        high = [value + (error or 0.0) for _, value, error in points]
    else:
        low = high = []
    return Series(
        of=name,
        run=run,
        x=tuple(each[-1][0] for each in parts),
        y=tuple(map(_short, y)),
        low=tuple(map(_short, low)),
        high=tuple(map(_short, high)),
    )


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
