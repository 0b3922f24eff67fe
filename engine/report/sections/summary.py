"""The summary on top of a page: sentences in plain language, each computed from what is there.

A change is called one only beyond two standard errors, see change.py. Sources of what is healthy:
arXiv 2604.13016, section 4.1 (overlap, entropy gap, advantage) and 5.1 (read the mass too), and the
bounds of engine/objectives/bounds.py.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from logitcask.engine.objectives import warnings
from logitcask.engine.quantities import data_size, duration
from logitcask.engine.report.change import Change, change
from logitcask.engine.report.panels import Sentence
from logitcask.engine.report.runs import TEACHER_ACCURACY, RunFacts, step_of
from logitcask.engine.report.sections.provenance import preset_of
from logitcask.engine.report.sections.state import FINISHED, RUNNING, STOPPED, run_state
from logitcask.engine.report.sections.stored import names_of
from logitcask.engine.store.log.claims import failed_units

RECOVERED = 0.8
"""Share of the gap from which on the paper calls a distillation a success (section 4.1)."""
COLLAPSED = 0.5
"""Entropy of the student over that of the teacher, below which a warning is due."""


def summary(
    runs: Sequence[RunFacts], *, own: int = 1, teacher_accuracy: float | None = None
) -> tuple[Sentence, ...]:
    """Return the sentences on the first run, those on its store, and on the runs after the `own`.

    A store alone is a run with an empty record. own: runs of an ablation, which have a table;
    teacher_accuracy: the teacher's mean reward on the prompts of the evaluation, where no line has
    it.
    """
    first = runs[0]
    found: list[Sentence] = []
    if first.record:
        name = first.name if len(runs) > 1 else ""
        found += _what(first, name)
        found += accuracy(first, teacher_accuracy, name)
        found += held_out(first, name)
        found += learned(first)
        found += trouble(first)
    found += stored(first)
    for other in runs[own:]:
        found += _what(other, other.name)
        found += accuracy(other, teacher_accuracy, other.name)
        found += held_out(other, other.name)
        found += overlap(other, other.name)
    return tuple(found)


def _what(run: RunFacts, name: str = "") -> Iterator[Sentence]:
    last = run.updates[-1] if run.updates else {}
    student = Path(str((run.config.get("student") or {}).get("model") or "")).name
    teachers = names_of(run.record)[1]
    text = f"{name}: the student" if name else "The student"
    text += f" {student!r}" if student else ""
    text += f" was trained by {run.record.get('preset') or 'an objective without a name'}"
    text += f" on the scores of {' and '.join(map(repr, teachers))}" if teachers else ""
    planned = f" of {run.planned:,}" if run.planned and run.planned != run.done else ""
    text += f": {run.done:,}{planned} updates"
    if positions := last.get("progress/positions"):
        text += f" on {positions:,} response positions"
    if seconds := last.get("progress/seconds"):
        text += f" in {duration(seconds)}"
    yield Sentence(text=f"{text}.")


def accuracy(run: RunFacts, teacher: float | None = None, name: str = "") -> Iterator[Sentence]:
    """Yield the accuracy before and after, and the share of the gap to the teacher.

    name: of the run, in a report of several.
    """
    subject = f"{name}: accuracy" if name else "Accuracy"
    key = "eval/avg_at_n"
    lines = [line for line in run.evaluated if line.get(key) is not None]
    if not lines:
        key = "eval/accuracy"
        lines = [line for line in run.evaluated if line.get(key) is not None]
    if not lines:
        return
    first, last = lines[0], lines[-1]
    known = [line[TEACHER_ACCURACY] for line in lines if line.get(TEACHER_ACCURACY) is not None]
    goal = float(known[-1]) if known else teacher
    of_teacher = f" (teacher {percent(goal)})" if goal is not None else ""
    if step_of(first) == step_of(last):
        yield Sentence(
            text=f"{subject} is {percent(last[key])} after {step_of(last):,} updates{of_teacher}."
        )
        return
    errors = [line[f"{key}_se"] for line in (first, last) if line.get(f"{key}_se") is not None]
    error = math.hypot(*errors) if len(errors) == 2 else None
    both = Change(before=first[key], after=last[key], window=1, error=error)
    verb = {1: "rose", -1: "fell", 0: "went"}[both.direction]
    text = f"{subject} {verb} from {percent(both.before)} to {percent(both.after)}{of_teacher}"
    if error is None:
        text += "; its standard error is not known"
    elif not both.direction:
        text += ", which is no more than the noise of the evaluation"
    state = {1: "good", -1: "warning", 0: "neutral"}[both.direction]
    if goal is not None and both.direction > 0 and goal - both.before > 2 * (error or 0.0):
        share = (both.after - both.before) / (goal - both.before)
        text += f": the student closed {percent(share, 0)} of the gap to the teacher"
        state = "good" if share >= RECOVERED else "neutral"
    yield Sentence(text=f"{text}.", state=state)


def held_out(run: RunFacts, name: str = "") -> Iterator[Sentence]:
    """Yield loss and overlap mass of held-out rows before and after; their errors are not known."""
    lines = [line for line in run.evaluated if line.get("eval/loss") is not None]
    if len(lines) < 2:
        return
    first, last = lines[0], lines[-1]
    text = f"{name}: on held-out rows" if name else "On held-out rows"
    text += f" the loss went from {first['eval/loss']:.3g} to {last['eval/loss']:.3g} nats"
    key = "eval/overlap/mass_student"
    before, after = first.get(key), last.get(key)
    if before is not None and after is not None:
        both = Change(before=before, after=after, window=1, error=None)
        text += " and the overlap mass from {} to {} %".format(*_pair(both, percent=True))
    yield Sentence(text=f"{text}, between update {step_of(first):,} and {step_of(last):,}.")


def learned(run: RunFacts) -> Iterator[Sentence]:
    """Yield what overlap, advantage, entropies and spans did."""
    found = {
        key: change(run.updates, key)
        for key in (
            "overlap/advantage",
            "entropy/gap",
            "entropy/student",
            "entropy/teacher",
            "span/reverse_kl",
        )
    }
    yield from overlap(run)
    if advantage := found["overlap/advantage"]:
        towards = {1: " towards 0, where both agree", -1: ", away from the teacher", 0: ""}
        yield Sentence(
            text=f"The overlap advantage {moved(advantage, 'nats')}{towards[advantage.direction]}.",
            state=_state(advantage.direction),
        )
    if gap := found["entropy/gap"]:
        yield Sentence(text=f"The entropy gap {moved(gap, 'nats')}.", state=_state(-gap.direction))
    student, teacher = found["entropy/student"], found["entropy/teacher"]
    fell = student is not None and student.direction < 0
    if student and teacher and fell and student.after < COLLAPSED * teacher.after:
        yield Sentence(
            text=f"The student's entropy fell to {student.after:.3g} nats, and the teacher's is "
            f"{teacher.after:.3g}: its samples lose variety. More varied prompts help, or a "
            "forward divergence.",
            state="warning",
        )
    if spans := found["span/reverse_kl"]:
        yield Sentence(
            text=f"The log-ratio of spans, log p - log q for each token, {moved(spans, 'nats')}.",
            state=_state(-spans.direction),
        )
    if any(found.values()):
        window = next(each.window for each in found.values() if each)
        one = window == 1
        yield Sentence(
            text="These compare "
            + ("the first and the last logged value" if one else "means of the first and last ")
            + ("" if one else f"{window} logged values")
            + "; rose and fell mean by more than two standard errors."
        )


def overlap(run: RunFacts, name: str = "") -> Iterator[Sentence]:
    """Yield what ratio and mass of the overlap did, which are read together."""
    ratio, mass = (change(run.updates, f"overlap/{key}") for key in ("ratio", "mass_student"))
    if not ratio or not mass:
        return
    text = f"{name}: overlap mass" if name else "Overlap mass"
    text += f" {moved(mass, '%')}, and the overlap ratio {moved(ratio, '%')}"
    state = _state(max(mass.direction, ratio.direction))
    if mass.direction < 0:
        text += ": the student moves probability to ids that the teacher ranks low"
        state = "warning"
    elif ratio.direction < 0:
        state = "neutral"
        if (run.record.get("objective") or {}).get("divergence") == "reverse_kl":
            text += ": usual under reverse KL, which hardly moves improbable ids; read the mass"
            state = _state(mass.direction)
    yield Sentence(text=f"{text}.", state=state)


def trouble(run: RunFacts) -> Iterator[Sentence]:
    """Yield what a reader must know before trusting the numbers."""
    state = run_state(run.path).name
    if state != FINISHED:
        of = f" of {run.planned:,}" if run.planned else ""
        said = {
            RUNNING: f"The run goes on: {run.done:,}{of} updates are logged",
            STOPPED: f"The run stopped before its end: {run.done:,}{of} updates are logged; the "
            "same command goes on with it",
        }
        yield Sentence(text=f"{said[state]}.", state="warning" if state == STOPPED else "neutral")
    broken = [step_of(line) for line in run.updates if line.get("loss") is None]
    if broken:
        yield Sentence(
            text=f"The loss is not finite in {len(broken)} logged updates, first in {broken[0]:,}.",
            state="warning",
        )
    last = {key: value for line in run.updates for key, value in line.items() if value is not None}
    if (preset := preset_of(run)) is not None:
        for text in warnings(preset.objective, last):
            yield Sentence(text=f"In the last logged update {text}.", state="warning")
    if oldest := max((line["age"][2] for line in run.ledger if "age" in line), default=0):
        count = f"{oldest:,} {'update' if oldest == 1 else 'updates'}"
        means = "" if preset is None else f": {preset.staleness}"
        yield Sentence(text=f"Positions were trained on up to {count} after their sampling{means}.")
    norms = [line["train/grad_norm"] for line in run.updates if line.get("train/grad_norm")]
    limit = (run.config.get("train") or {}).get("max_grad_norm")
    if limit and (clipped := sum(norm > limit for norm in norms)):
        yield Sentence(
            text=f"The gradient was clipped to norm {limit:g} in {clipped:,} of {len(norms):,} "
            "logged updates."
        )
    widths = [line for line in run.updates if "mixture/width" in line]
    if any("entropy/teacher_width" in line for line in run.updates) and not widths:
        yield Sentence(
            text="The teacher returned only its best log-probs: its entropy is an interval, and "
            "the entropy gap is a lower bound."
        )


def stored(run: RunFacts) -> Iterator[Sentence]:
    """Yield what the store of a run holds or lacks; of a store alone also its contents."""
    store, snapshot = run.store, run.snapshot
    if store is None or snapshot is None:
        yield Sentence(text=f"The store is not shown: {run.store_missing}.", state="warning")
        return
    rollouts, _ = names_of(run.record)
    segments = snapshot.segments
    sampled = [s for s in segments if s.kind == "rollout" and rollouts in ("", s.name)]
    if not run.record:
        yield Sentence(
            text=f"The store holds {sum(s.counts['N'] for s in sampled):,} responses of "
            f"{sum(s.counts['P'] for s in sampled):,} positions"
            f"{_names(snapshot.names('rollout'))}, and scores by "
            f"{' and '.join(snapshot.names('score')) or 'no teacher'}, in "
            f"{data_size(sum(s.size for s in segments))} of {len(segments):,} segments."
        )
    scored = {s.base for s in segments if s.kind == "score"}
    if missing := sum(s.seg_id not in scored for s in sampled):
        yield Sentence(
            text=f"{missing:,} of {len(sampled):,} segments of rollouts have no scores; "
            "`logitcask score` makes them.",
            state="neutral" if run.record else "warning",
        )
    if failed := failed_units(store.storage).keys() - snapshot.unit_keys():
        yield Sentence(
            text=f"{len(failed):,} work units of the store failed and are not done; the section "
            "on errors has the reasons.",
            state="warning",
        )


def moved(found: Change, unit: str) -> str:
    """Return the change in words: 'rose from 1 to 2 nats'; unit '%' = shares."""
    verb = {1: "rose", -1: "fell", 0: "stayed"}[found.direction]
    before, after = _pair(found, percent=unit == "%")
    if found.direction:
        return f"{verb} from {before} to {after} {unit}"
    if found.error is None:
        return f"went from {before} to {after} {unit}, with an unknown error"
    return (
        f"{verb} near {after} {unit}"
        if before == after
        else (f"went from {before} to {after} {unit}, within the noise")
    )


def _pair(found: Change, *, percent: bool) -> tuple[str, str]:
    """Format two values with as many digits as show their difference, or its error."""
    if not percent:
        return f"{found.before:.3g}", f"{found.after:.3g}"
    size = 100 * max(abs(found.after - found.before), 2 * (found.error or 0.0))
    digits = min(4, max(1, 1 - math.floor(math.log10(size)))) if size else 1
    return f"{100 * found.before:.{digits}f}", f"{100 * found.after:.{digits}f}"


def percent(share: float, digits: int = 1) -> str:
    """Return a share as text: 97.6 %."""
    return f"{100 * share:.{digits}f} %"


def _state(direction: int) -> str:
    return {1: "good", 0: "neutral", -1: "warning"}[direction]


def _names(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""
