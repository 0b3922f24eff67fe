"""Section of the time: seconds of each stage, and the work of each process over time.

A loop of several processes writes a timeline (engine/workers/timeline.py). Of other runs there are
the times of commits, those of the models for each segment of scores, and the lines of training.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from logitcask.engine.errors import IncompleteError, IntegrityError, LogitcaskError
from logitcask.engine.models.digests import read_json
from logitcask.engine.report.panels import (
    Absent,
    Axis,
    Bar,
    Bars,
    Panel,
    Section,
    Stretch,
    Timeline,
)
from logitcask.engine.report.runs import RunFacts
from logitcask.engine.report.sections.stored import same_teacher, stored_names
from logitcask.engine.store import Segment
from logitcask.engine.workers.timeline import Span, read_timeline

MOST_STRETCHES = 2000
"""Stretches of a timeline; neighbours are joined where there are more."""
MOST_COMMITS = 2000
"""Commits of which a timeline is made, the newest."""
TICK_S = 1.0
"""Length of a commit in a timeline: the log has whole seconds."""
DEMO = "demo.json"
"""File of `logitcask demo`, two folders above its runs: `seconds` has its stages."""
_SECONDS = Axis(name="time", unit="seconds")
_NO_END = "without an end"


def timeline_section(runs: Sequence[RunFacts]) -> Section:
    """Build the seconds of the stages of all runs, and the timeline of the first.

    A store alone is a run with an empty record. What a run does not record is an Absent.
    """
    panels: list[Panel] = []
    absent: list[Absent] = []
    for title, made in (("Seconds by stage", _stages), ("Timeline", _timeline)):
        try:
            panels.append(made(runs))
        except LogitcaskError as error:
            absent.append(Absent(title=title, why=f"{error.cause}; {error.hint}"))
    return Section(id="timeline", title="Time", panels=tuple(panels), absent=tuple(absent))


def _stages(runs: Sequence[RunFacts]) -> Bars:
    """Return the seconds of the stages. Raises IncompleteError where none are recorded."""
    bars = [
        replace(bar, name=f"{facts.name}: {bar.name}" if len(runs) > 1 else bar.name)
        for facts in runs
        for bar in _seconds(facts)
    ]
    if not bars:
        raise IncompleteError(
            "no stage has recorded its seconds yet",
            hint="`logitcask score`, `train` and `distill` do",
        )
    return Bars(
        id="timeline-seconds",
        title="Seconds by stage",
        how="Time of each process or stage, stacked by its kind of work. In a loop of several "
        "processes the role that waits least is the one to give more processes.",
        value=_SECONDS,
        bars=tuple(bars),
    )


def _timeline(runs: Sequence[RunFacts]) -> Timeline:
    """Return the timeline of the first run. Raises as `_of_commits`."""
    first, *_ = runs
    spans = read_timeline(first.path)
    return _of_spans(spans, first.locked) if spans else _of_commits(first)


def _seconds(facts: RunFacts) -> list[Bar]:
    """Return seconds by process and kind of a timeline, else by stage."""
    if spans := read_timeline(facts.path):
        sums = seconds_by_kind(spans)
        # In the order of the timeline, so that kinds have the same colours.
        kinds = list(dict.fromkeys(each.kind for each in spans))
        order = sorted(sums, key=lambda each: (kinds.index(each[1]), each[0]))
        return [Bar(name=name, group=kind, value=sums[name, kind]) for name, kind in order]
    bars = [Bar(name=stage, group=stage, value=value) for stage, value in _demo(facts).items()]
    wait, total = waited(facts)
    score = scored_seconds(facts)
    inline = "loop" in facts.record
    if score and not inline and not bars:
        bars.append(Bar(name="score", group="score", value=score))
    if not total:
        return bars
    if inline:
        score = min(score, wait)
        bars.append(Bar(name="loop", group="score", value=score))
        bars.append(Bar(name="loop", group="rollout and reading", value=wait - score))
        return [*bars, Bar(name="loop", group="update", value=total - wait)]
    bars.append(Bar(name="train", group="reading", value=wait))
    return [*bars, Bar(name="train", group="update", value=total - wait)]


def seconds_by_kind(spans: Iterable[Span]) -> dict[tuple[str, str], float]:
    """Return (lane, kind) -> seconds; work inside of a wait, such as a load, is no waiting."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    waiting_in: dict[str, Span] = {}
    for each in sorted(spans, key=lambda span: span.start):
        if each.end is None:
            continue
        lane = _lane(each)
        found[lane, each.kind] += each.end - each.start
        around = waiting_in.get(lane)
        if each.kind == "wait":
            waiting_in[lane] = each
        elif around is not None and around.end is not None:
            found[lane, "wait"] -= max(0.0, min(each.end, around.end) - each.start)
    return found


def scored_seconds(facts: RunFacts) -> float:
    """Return the recorded seconds of the teacher's models for the scores of a run.

    Of a store alone for all of its scores. 0 where none are recorded, and where they are
    more than MOST_COMMITS, whose entries would take long to read.
    """
    used = {
        seg_id
        for line in facts.ledger
        for source in line.get("segments", ())
        for seg_id in source["scores"]
    }
    try:
        segments = _segments(facts)
    except IncompleteError:
        return 0.0
    found = [
        each for each in segments if each.kind == "score" and (not used or each.seg_id in used)
    ]
    if len(found) > MOST_COMMITS:
        return 0.0
    return sum(each.seconds or 0.0 for each in found)


def waited(facts: RunFacts) -> tuple[float, float]:
    """Return (seconds in which training waited for rows, all seconds of training).

    train/data_wait is a share of the time since the line before.
    """
    wait = before = 0.0
    for line in facts.updates:
        now = float(line.get("progress/seconds") or before)
        wait += float(line.get("train/data_wait") or 0.0) * (now - before)
        before = now
    return wait, before


def _demo(facts: RunFacts) -> Mapping[str, float]:
    """Return the seconds of the stages of a demo before its runs; empty for another run."""
    file = facts.path.resolve().parent.parent / DEMO
    if not facts.record or not file.is_file():
        return {}
    found = read_json(file, hint="run `logitcask demo` again").get("seconds")
    names = {
        "teacher": "train the demo's teacher",
        "student": "train the demo's student",
        "rollout": "rollout",
        "score": "score",
    }
    if not isinstance(found, dict) or not all(type(each) is float for each in found.values()):
        raise IntegrityError(f"{file} has no seconds of stages", hint="run `logitcask demo` again")
    return {name: found[stage] for stage, name in names.items() if stage in found}


def _of_spans(spans: Sequence[Span], runs_on: bool) -> Timeline:
    """Return the timeline of processes; runs_on: the run has not ended."""
    begin = spans[0].start
    last = max(each.start if each.end is None else each.end for each in spans)
    newest = {_lane(each): each for each in spans}
    stretches = []
    for each in spans:
        group, end = each.kind, each.end
        if end is None:
            # A lane goes on with the next process, if there is one.
            later = (s.start for s in spans if _lane(s) == _lane(each) and s.start > each.start)
            end = min(later, default=last)
            if not (runs_on and newest[_lane(each)] is each):
                group = f"{each.kind} {_NO_END}"
        known = (("round", each.round), ("version", each.version))
        words = [f"{name} {value}" for name, value in known if value is not None]
        stretches.append(
            Stretch(
                lane=_lane(each),
                group=group,
                start=each.start - begin,
                end=end - begin,
                label=", ".join([group, *words]),
            )
        )
    hosts = {each.host for each in spans}
    clocks = f" Clocks of {len(hosts)} hosts may differ." if len(hosts) > 1 else ""
    joined, note = join_neighbours(stretches)
    return Timeline(
        id="timeline-loop",
        title="Timeline of the loop",
        how="Work and waiting of each process: where one works and all others wait, its role holds "
        f"up the loop. A stretch without an end is one in which the process died.{clocks}{note}",
        stretches=tuple(joined),
    )


def _lane(span: Span) -> str:
    return f"{span.role} {span.process}"


@dataclass(frozen=True, slots=True)
class _Commit:
    segment: Segment
    end: float
    """Seconds since 1970, of the log record."""


def _of_commits(facts: RunFacts) -> Timeline:
    """Return the timeline of the commits of a store, as far as the log has it.

    Raises IncompleteError without a store or scores, IntegrityError for a damaged log.
    """
    segments, store = _segments(facts), facts.store
    assert store is not None, "a store with scores"
    commits = [
        _Commit(each, datetime.fromisoformat(store.log.time(each.number)).timestamp())
        for each in segments[-MOST_COMMITS:]
    ]
    starts = {each.segment: each.end - _length(each.segment) for each in commits}
    begin = min(starts.values())
    stretches = [
        Stretch(
            lane=f"{each.segment.kind} {each.segment.name}",
            group="commit" if each.segment.kind == "rollout" else "score",
            start=starts[each.segment] - begin,
            end=each.end - begin,
            label=f"{each.segment.counts['N']} responses, log record {each.segment.number}",
        )
        for each in commits
    ]
    joined, note = join_neighbours(stretches)
    loop = 'A loop of several processes (`runner.kind = "processes"`) records more.'
    return Timeline(
        id="timeline-commits",
        title="Timeline of the commits",
        how="Scores from the beginning of the teacher's work to their commit; of rollouts the log "
        f"has the second of the commit alone. {loop if 'loop' in facts.record else ''}{note}",
        stretches=tuple(joined),
    )


def _segments(facts: RunFacts) -> list[Segment]:
    """Return the rollouts and scores that a run reads; those of a store alone are all.

    Raises as `stored_names`.
    """
    rollouts, teacher = stored_names(facts)
    assert facts.snapshot is not None, "a store with scores"
    return [
        each
        for each in facts.snapshot.segments
        if not facts.record
        or (each.name == rollouts if each.kind == "rollout" else same_teacher(each, teacher))
    ]


def _length(segment: Segment) -> float:
    """Return the seconds of the models for scores, else those that a commit has in a timeline."""
    return max(TICK_S, segment.seconds or 0.0) if segment.kind == "score" else TICK_S


def join_neighbours(
    stretches: Sequence[Stretch], most: int = MOST_STRETCHES
) -> tuple[list[Stretch], str]:
    """Return at most `most` stretches, and a sentence where neighbours were joined.

    Stretches of a lane and group are joined over gaps, short ones first, so long work and long
    waiting stay apart.
    """
    if len(stretches) <= most:
        return list(stretches), ""
    gap = max(each.end for each in stretches) / most
    joined = list(_joined(stretches, gap))
    while len(joined) > most:
        gap *= 2
        joined = list(_joined(stretches, gap))
    note = (
        f" Its {len(stretches):,} stretches are {len(joined):,}: neighbours of a kind less than "
        f"{gap:.2g} s apart are one."
    )
    return joined, note


def _joined(stretches: Iterable[Stretch], gap: float) -> Iterator[Stretch]:
    """Yield the stretches with those of a lane and group joined over short gaps."""
    begun: dict[tuple[str, str], tuple[Stretch, int]] = {}
    for each in sorted(stretches, key=lambda stretch: stretch.start):
        key = (each.lane, each.group)
        last, count = begun.get(key, (each, 0))
        if count and each.start - last.end > gap:
            yield _counted(last, count)
            last, count = each, 0
        begun[key] = (replace(last, end=max(last.end, each.end)), count + 1)
    yield from (_counted(*each) for each in begun.values())


def _counted(stretch: Stretch, count: int) -> Stretch:
    return replace(stretch, label=f"{count} times {stretch.group}") if count > 1 else stretch
