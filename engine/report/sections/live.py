"""Section of a run that goes on: its pace and its end, its processes, and the work that waits.

Times are absolute, so that nothing on the page moves while nothing moves in the run.
"""

from collections.abc import Sequence
from itertools import accumulate

from logitcask.engine.packing.teachers import Teachers
from logitcask.engine.quantities import duration
from logitcask.engine.report.panels import (
    Absent,
    Axis,
    Bar,
    Bars,
    Lines,
    Panel,
    Section,
    Series,
    Table,
)
from logitcask.engine.report.runs import RunFacts
from logitcask.engine.report.sections.state import (
    RUNNING,
    STOPPED,
    Commits,
    Pace,
    commits_of,
    run_pace,
    run_state,
    utc,
)
from logitcask.engine.report.sections.workers import claims, processes
from logitcask.engine.store import Segment, Snapshot
from logitcask.engine.teachers.refreshes import refresh_version
from logitcask.engine.workers.timeline import read_timeline

POINTS = 400
"""Points of a line at most; of more commits, evenly chosen ones are drawn."""


def live_section(facts: RunFacts) -> Section:
    """Return what a run does now: pace, end, rounds, rates, processes, claims, last evaluation.

    Raises IntegrityError for a damaged log of the store.
    """
    panels: list[Panel] = []
    absent: list[Absent] = []
    pace = run_pace(facts)
    panels.append(_now(facts, pace))
    if facts.store is None or facts.snapshot is None:
        absent.append(Absent(title="Queue and rates", why=facts.store_missing))
    else:
        store, snapshot = facts.store, facts.snapshot
        rollouts, scores = _rollouts(facts, snapshot), _scores(facts, snapshot)
        ours = {each.seg_id for each in rollouts}
        scores = [each for each in scores if each.base in ours]
        scored = {each.base for each in scores}
        if "loop" in facts.record:
            panels.append(_rounds(facts, rollouts, scored, pace))
        panels.append(_queue(facts, [each for each in rollouts if each.seg_id not in scored]))
        made = {"rollout": commits_of(store, rollouts), "score": commits_of(store, scores)}
        panels.append(_rates(made, pace))
        panels += _made(made)
        panels += claims(facts, store)
    spans = read_timeline(facts.path)
    if spans:
        panels.append(processes(spans))
    else:
        absent.append(
            Absent(
                title="Processes",
                why="There is no timeline: this run does its stages in turn, in one process. "
                "`logitcask distill --runner processes` writes one.",
            )
        )
    evaluation = _evaluation(facts)
    if evaluation:
        panels.append(evaluation)
    else:
        absent.append(
            Absent(
                title="Last evaluation",
                why="None is there yet. `--eval-every` with `--eval-prompts` measures the student "
                "while it trains, and `logitcask evaluate --worker` does it in another process.",
            )
        )
    return Section(id="live", title="Now", panels=tuple(panels), absent=tuple(absent))


def _now(facts: RunFacts, pace: Pace | None) -> Table:
    state = run_state(facts.path)
    trains = {True: f"trained by {state.owner}", False: "no process trains"}[bool(state.owner)]
    if state.name == STOPPED:
        trains = "it ended before its last update; the same command goes on with it"
    rows: list[tuple[str, str, str]] = [("State", state.name, trains)]
    if pace is None:
        rows.append(("Time left", "-", "not known before the second logged update"))
    else:
        of = "" if pace.planned is None else f" of {pace.planned:,}"
        rows.append(
            (
                "Updates",
                f"{pace.done:,}{of}",
                f"newest logged line, {utc(pace.at, day_of=pace.at)} UTC",
            )
        )
        rows.append(
            (
                "Seconds an update",
                f"{pace.seconds_per_update:.3g}",
                f"mean of the last {pace.over}, with their waits for rollouts and scores",
            )
        )
        if pace.left_s is None:
            rows.append(("Time left", "-", "run.json does not say how many updates there are"))
        elif state.name == RUNNING:
            end = utc(pace.at + pace.left_s, day_of=pace.at)
            why = f"{pace.left:,} updates at that pace; evaluations and the last save come on top"
            rows.append(("Time left", f"{duration(pace.left_s)}, until {end} UTC", why))
    return Table(
        id="live-now",
        title="Pace and end",
        how="The time left is the number of updates that are missing times the mean of the newest "
        "ones, so it is wrong where responses become longer.",
        columns=(Axis(name="quantity"), Axis(name="value"), Axis(name="from")),
        rows=tuple(rows),
    )


def _rollouts(facts: RunFacts, snapshot: Snapshot) -> Sequence[Segment]:
    return snapshot.rollouts(str(facts.record.get("rollouts", "")))


def _scores(facts: RunFacts, snapshot: Snapshot) -> list[Segment]:
    """Return the scores of the teachers of a run, those of all refreshes of one that moves."""
    record = facts.record
    teacher = record.get("teacher_name")
    if teacher is None:  # of a run on data that is there
        names = set(Teachers.parse(record.get("teacher"), record.get("teacher_field")).names)
        return [each for each in snapshot.segments if each.kind == "score" and each.name in names]
    return [
        each
        for each in snapshot.segments
        if each.kind == "score"
        and (each.name == teacher or refresh_version(str(teacher), each.name) is not None)
    ]


def _rounds(
    facts: RunFacts, rollouts: Sequence[Segment], scored: set[str], pace: Pace | None
) -> Bars:
    loop = facts.record["loop"]
    per_round = loop["prompts_per_round"] * facts.config["rollout"]["n"]
    sampled = sum(each.counts["N"] for each in rollouts)
    ready = sum(each.counts["N"] for each in rollouts if each.seg_id in scored)
    trained = (0 if pace is None else pace.done) / loop["updates_per_round"]
    bars = {
        "planned": loop["rounds"],
        "sampled": sampled / per_round,
        "scored": ready / per_round,
        "trained": trained,
    }
    return Bars(
        id="live-rounds",
        title="Rounds of the loop",
        how="A round is sampled, then scored, then trained on. Where scored is far behind sampled "
        "the teacher is the slowest; where sampled is no further than trained the sampler is.",
        value=Axis(name="rounds"),
        bars=tuple(Bar(name=name, value=float(value)) for name, value in bars.items()),
    )


def _queue(facts: RunFacts, waiting: Sequence[Segment]) -> Table:
    limit = facts.config.get("loop", {}).get("max_unscored_bytes")
    at_most = None if limit is None else float(limit)
    return Table(
        id="live-queue",
        title="Rollouts that wait for scores",
        how="0 means that the teacher keeps up. At the limit no rollout begins until some are "
        "scored.",
        columns=(
            Axis(name="units"),
            Axis(name="sequences"),
            Axis(name="positions", unit="tokens"),
            Axis(name="size", form="bytes"),
            Axis(name="limit", form="bytes"),
        ),
        rows=(
            (
                float(len(waiting)),
                float(sum(each.counts["N"] for each in waiting)),
                float(sum(each.rows for each in waiting)),
                float(sum(each.size for each in waiting)),
                at_most,
            ),
        ),
    )


def _rates(made: dict[str, Commits], pace: Pace | None) -> Table:
    rows: list[tuple[str | float | None, ...]] = []
    for role, commits in made.items():
        rate, took = commits.recent or (None, None)
        total = float(sum(commits.positions))
        rows.append((role, rate, took, None, total))
    if pace is not None:
        rows.append(
            (
                "train",
                pace.positions_per_second,
                pace.seconds_per_update * pace.over,
                60 / pace.seconds_per_update,
                None,
            )
        )
    return Table(
        id="live-rates",
        title="Rates",
        how="Positions are response tokens. The rates are those of the newest commits and updates, "
        "waits included, so the slowest role sets the pace of all.",
        columns=(
            Axis(name="role"),
            Axis(name="rate", unit="tokens/s"),
            Axis(name="measured over", unit="s"),
            Axis(name="updates", unit="1/min"),
            Axis(name="positions in all", unit="tokens"),
        ),
        rows=tuple(rows),
    )


def _made(made: dict[str, Commits]) -> list[Panel]:
    times = [at for commits in made.values() for at in commits.times]
    if not times or min(times) == max(times):
        return []
    begun = min(times)
    series = []
    for role, commits in made.items():
        sums = list(accumulate(commits.positions))
        chosen = _thinned(len(sums))
        series.append(
            Series(
                of={"rollout": "sampled", "score": "scored"}[role],
                x=tuple((commits.times[i] - begun) / 60 for i in chosen),
                y=tuple(float(sums[i]) for i in chosen),
            )
        )
    return [
        Lines(
            id="live-made",
            title="Positions sampled and scored",
            how="Since the first commit of these rollouts. The gap between the lines is what waits "
            "for scores; a flat piece is a pause.",
            x=Axis(name="time", unit="min"),
            y=Axis(name="positions", unit="tokens"),
            series=tuple(series),
        )
    ]


def _thinned(count: int) -> list[int]:
    """Return the indices of at most POINTS of `count` points, the last one among them."""
    if count <= POINTS:
        return list(range(count))
    return [round(i * (count - 1) / (POINTS - 1)) for i in range(POINTS)]


def _evaluation(facts: RunFacts) -> Table | None:
    if not facts.evaluated:
        return None
    last = facts.evaluated[-1]
    return Table(
        id="live-evaluation",
        title=f"Last evaluation, after update {last.get('progress/step', 0):,}",
        how="The newest line of metrics.jsonl or evaluations.jsonl with values of an evaluation.",
        columns=(Axis(name="measure"), Axis(name="value")),
        rows=tuple(
            (name.removeprefix("eval/"), None if value is None else float(value))
            for name, value in last.items()
            if name.startswith("eval/") and isinstance(value, int | float | None)
        ),
    )
