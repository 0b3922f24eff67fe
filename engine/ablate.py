"""Ablations: every combination of some settings, trained from one state of a store.

    DIR/plan.json                fixed at the first call: store, snapshot, common configuration
        COMBINATION/seed-N       a run each, as `logitcask train` makes it
        cache                    units of the store, decoded once for all runs
        ablate.json ablate.md    the table

Nothing is sampled for training and nothing is scored: a teacher's seconds are spent once, by
`score`. The same call resumes, because each run does.
"""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from logitcask.engine.commands.resolve import held_out_set, snapshot_of
from logitcask.engine.commands.train import check_train, run_train, scoring_seconds
from logitcask.engine.config.sections import TrainConfig
from logitcask.engine.config.toml import keys_of, parse_value, validate
from logitcask.engine.config.training import Ablate
from logitcask.engine.errors import ConfigError, LogitcaskError
from logitcask.engine.events import EventHandler
from logitcask.engine.store import open_store
from logitcask.engine.store.cache import UnitCache
from logitcask.engine.training.run import TrainReport
from logitcask.engine.training.run_dir import check_same, make_folder, replace_text, write_json
from logitcask.engine.types import Progress, no_progress

FIXED = ("store.url", "store.profile", "train.snapshot", "run.out", "run.overwrite", "run.seed")
"""Keys that cannot be varied, beside those of [eval]."""

_SNAPSHOTS = ("train.snapshot", "eval.snapshot")
"""What plan.json says with a digest."""

FIGURES: dict[str, Callable[[TrainReport, float | None], float | None]] = {
    "loss": lambda run, _: run.last["loss"],
    "accuracy": lambda run, _: _evaluated(run, -1, "accuracy"),
    "avg_at_n": lambda run, _: _evaluated(run, -1, "avg_at_n"),
    "eval_loss": lambda run, _: _evaluated(run, -1, "loss"),
    "eval_overlap_ratio": lambda run, _: _evaluated(run, -1, "overlap/ratio"),
    "gap_recovery": lambda run, teacher: gap_recovery(
        _evaluated(run, 0, "avg_at_n"), _evaluated(run, -1, "avg_at_n"), teacher
    ),
    "overlap_ratio": lambda run, _: run.last["overlap/ratio"],
    "overlap_mass": lambda run, _: run.last["overlap/mass_student"],
    "seconds": lambda run, _: own_seconds(run),
}
"""Columns of the table: (run, teacher's avg@n) -> its value, None where it is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Combination:
    name: str
    """Its folder: key=value,key=value."""
    values: Mapping[str, Any]
    job: TrainConfig
    refused: str = ""
    """Why it cannot be trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Runs over the same scores, equally often."""

    seconds: float | None
    """What the teacher took to make those scores; None where the store does not say."""
    runs: int
    epochs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AblateReport:
    out: Path
    snapshot: int
    """Log number that all runs are trained from."""
    rows: tuple[Mapping[str, Any], ...]
    """Of each combination: its values, n, and mean and spread (sample standard deviation over
    seeds) of every figure; or why it was refused."""
    runs_trained: int
    """By this call; others were finished before."""
    seconds: float
    trainings_seconds: float
    """Of `seconds`, what the trainings and their evaluations took themselves."""
    teacher_seconds_spent: float
    teacher_passes: tuple[Passes, ...]
    """Over the scores of the snapshot, by all runs of the table."""
    teacher_seconds_saved: float | None
    """What a teacher that scores as it did, but anew in every pass, would have added; None where
    scores do not say what they took.
    """


_LISTED = re.compile(r",(?![^(]*\))")
"""Between values: a comma that stands in no brackets, as those of `gkd(parameter=0.1,k=8)` do."""


def combinations(job: TrainConfig, vary: Sequence[str]) -> list[Combination]:
    """The cartesian product of `key=value,value` texts over a job. Raises ConfigError."""
    axes: dict[str, list[Any]] = {}
    for text in vary:
        key, equals, listed = text.partition("=")
        if not (equals and key.strip() and listed.strip()):
            raise ConfigError(
                f"--vary {text}: not key=value,value", hint="e.g. --vary loss_topk=1,4,16"
            )
        name = full_key(key.strip())
        if name in FIXED or name.startswith("eval."):
            raise ConfigError(
                f"--vary {text}: {name} is the same in all runs of an ablation",
                hint="vary another key; --seeds says how many seeds, [eval] is common to all",
            )
        if name in axes:
            raise ConfigError(f"--vary {text}: {name} is varied twice", hint="give it once")
        axes[name] = [parse_value(value) for value in _LISTED.split(listed)]
    if not axes:
        raise ConfigError("nothing is varied", hint="e.g. --vary objective=overlap,opd")
    common = job.model_dump(mode="json")
    found: dict[str, Combination] = {}
    for chosen in product(*axes.values()):
        values = dict(zip(axes, chosen, strict=True))
        name = ",".join(f"{key.partition('.')[2]}={_plain(v)}" for key, v in values.items())
        if name in found:
            raise ConfigError(f"--vary: {name} comes twice", hint="give every value once")
        changed = {section: dict(content) for section, content in common.items()}
        for key, value in values.items():
            section, _, inner = key.partition(".")
            changed[section][inner] = value
        made = validate(TrainConfig, changed, source="--vary")
        found[name] = Combination(name=name, values=values, job=made)
    return list(found.values())


def full_key(key: str) -> str:
    """section.key of a TrainJob; the section may be left out where one key alone has the name."""
    known = [name for name in keys_of(TrainConfig) if "." in name]
    named = [name for name in known if key in (name, name.partition(".")[2])]
    if len(named) == 1:
        return named[0]
    spelled = {name.partition(".")[2]: name for name in known} | {name: name for name in known}
    near = get_close_matches(key, spelled, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"--vary {key}: names no key of a training, or several",
        hint=f"did you mean {spelled[near]}?",
    )


def ablate(
    job: TrainConfig,
    vary: Sequence[str],
    settings: Ablate,
    *,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> AblateReport:
    """Trains what is not trained yet, and writes the table.

    Raises ConfigError, IdentityError (DIR holds an ablation of something else), and what a training
    raises; a combination that cannot be trained stops all of them before the first is, unless
    `skip_refused`.
    """
    begun_s = time.monotonic()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: ablate runs in one process",
            hint="start it without torchrun",
        )
    planned = combinations(job, vary)
    varied = set(planned[0].values)
    plan = _plan(job, varied, settings.out)
    number = int(plan["pin"])
    judged = [_judged(_at_snapshot(each, plan), settings.skip_refused) for each in planned]
    make_folder(settings.out)
    write_json(settings.out / "plan.json", plan)
    cache = UnitCache(settings.out / "cache")
    rows, passes, trained, trainings_s = [], [], 0, 0.0
    total, done = settings.seeds * sum(not each.refused for each in judged), 0
    for each in judged:
        runs = []
        for seed in range(job.run.seed, job.run.seed + settings.seeds * (not each.refused)):
            out = settings.out / each.name / f"seed-{seed}"
            run = each.job.run.model_copy(update={"out": out, "seed": seed, "overwrite": False})
            start_s = time.monotonic()
            report = run_train(
                each.job.model_copy(update={"run": run}),
                cache=cache,
                on_event=_of(f"{each.name}/seed-{seed}", on_event),
            )
            if report.resumed_at < report.updates:
                trained += 1
                # Of a resumed run its own seconds are those of an earlier call, too.
                trainings_s += min(own_seconds(report), time.monotonic() - start_s)
            runs.append(report)
            done += 1
            progress("ablate", done, total)
        rows.append(row(each, runs, settings.teacher_accuracy))
        if runs:
            took_s, epochs = scoring_seconds(each.job), each.job.train.num_train_epochs
            passes.append(Passes(seconds=took_s, runs=len(runs), epochs=epochs))
    result = AblateReport(
        out=settings.out,
        snapshot=number,
        rows=tuple(rows),
        runs_trained=trained,
        seconds=time.monotonic() - begun_s,
        trainings_seconds=trainings_s,
        teacher_seconds_spent=0.0,
        teacher_passes=tuple(passes),
        teacher_seconds_saved=saved_seconds(passes),
    )
    written = {**asdict(result), "out": str(settings.out)}
    write_json(settings.out / "ablate.json", {**written, "pin": written.pop("snapshot")})
    replace_text(settings.out / "ablate.md", markdown(result))
    return result


def saved_seconds(passes: Sequence[Passes]) -> float | None:
    """seconds x runs x epochs, summed; None where one is not known."""
    each = [None if p.seconds is None else p.seconds * p.runs * p.epochs for p in passes]
    known = [seconds for seconds in each if seconds is not None]
    return sum(known) if len(known) == len(each) else None


def row(
    each: Combination, runs: Sequence[TrainReport], teacher: float | None = None
) -> dict[str, Any]:
    """One line of the table."""
    values = {key.partition(".")[2]: value for key, value in each.values.items()}
    found: dict[str, Any] = {**values, "n": len(runs)}
    for name, figure in FIGURES.items():
        known = [x for x in (figure(run, teacher) for run in runs) if x is not None]
        whole = bool(runs) and len(known) == len(runs)
        found[name] = fmean(known) if whole else None
        found[f"{name}_sd"] = stdev(known) if whole and len(known) > 1 else None
    return {**found, "refused": each.refused}


def gap_recovery(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """Share of the way to the teacher, arXiv 2604.13016, section 3.2; None without a gap."""
    if before is None or after is None or teacher is None or teacher == before:
        return None
    return (after - before) / (teacher - before)


def own_seconds(run: TrainReport) -> float:
    """Of a whole run: loading, training, evaluating."""
    last = float(run.evaluations[-1]["eval/seconds"]) if run.evaluations else 0.0
    # The evaluation after the last update is after its line, too.
    return float(run.last["progress/seconds"]) + last


def table(report: AblateReport) -> list[dict[str, str]]:
    """For a person: mean ± spread of what is known of any combination, or why it was refused."""
    names = [
        name
        for name in report.rows[0]
        if not name.endswith("_sd") and any(each[name] not in (None, "") for each in report.rows)
    ]
    return [{n: _cell(each[n], each.get(f"{n}_sd")) for n in names} for each in report.rows]


def footnotes(report: AblateReport) -> list[str]:
    saved = report.teacher_seconds_saved
    same: Counter[tuple[float | None, int]] = Counter()
    for each in report.teacher_passes:
        same[each.seconds, each.epochs] += each.runs
    sums = [
        f"{s or 0:.3g} s a pass x {n} runs x {epochs} epochs" for (s, epochs), n in same.items()
    ]
    known = "unknown: not all of these scores say what they took"
    if saved is not None:
        known = f"a live teacher would have added {saved:.3g} s ({' + '.join(sums)})"
    return [
        f"snapshot {report.snapshot}; mean ± sample standard deviation over n seeds; losses of "
        "different objectives do not compare",
        f"teacher seconds spent: {report.teacher_seconds_spent:.0f}; saved: {known}",
    ]


def markdown(report: AblateReport) -> str:
    """table and footnotes."""
    shown = table(report)
    lines = [list(shown[0]), ["---"] * len(shown[0]), *(list(each.values()) for each in shown)]
    rows = "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    return rows + "\n" + "".join(f"- {note}\n" for note in footnotes(report))


def _cell(value: Any, spread: float | None) -> str:
    if value in (None, ""):
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if spread is None else f"{text} ± {spread:.2g}"


def _plan(job: TrainConfig, varied: set[str], out: Path) -> dict[str, Any]:
    """What DIR is bound to: plan.json of the first call, if this one agrees with it."""
    store = open_store(job.store.url)
    common = {
        f"{section}.{key}": value
        for section, content in job.model_dump(mode="json").items()
        for key, value in content.items()
        if f"{section}.{key}" not in {*varied, "store.url", "run.out", "run.overwrite", *_SNAPSHOTS}
    }
    file = out / "plan.json"
    if not file.exists():
        if out.is_dir() and any(out.iterdir()):
            raise ConfigError(
                f"{out} is not empty and holds no plan.json: it is no folder of an ablation",
                hint="give a new or an empty folder with --out",
            )
        snapshot = (
            store.head() if job.train.snapshot is None else snapshot_of(store, job.train.snapshot)
        )
        return {
            "store": store.uuid,
            "pin": snapshot.number,
            "sha256": snapshot.sha256,
            "held_out": _held_out(job),
            "common": common,
        }
    plan: dict[str, Any] = json.loads(file.read_text())
    # What one call varies, another may have fixed: only what both fix must be the same.
    both = plan["common"].keys() & common.keys()
    earlier = {"store": plan["store"], "common": {key: plan["common"][key] for key in both}}
    ours: dict[str, Any] = {"store": store.uuid, "common": {key: common[key] for key in both}}
    if job.train.snapshot is not None:
        earlier["pin"], ours["pin"] = plan["pin"], snapshot_of(store, job.train.snapshot).number
    if job.eval.snapshot is not None:
        earlier["held_out"], ours["held_out"] = plan.get("held_out"), _held_out(job)
    check_same(out, earlier, ours, hint="give another --out, or what this one was begun with")
    store.snapshot(int(plan["pin"]), plan["sha256"])
    if (held := plan.get("held_out")) is not None:
        open_store(job.eval.store or job.store.url).snapshot(int(held["pin"]), held["sha256"])
    return plan


def _held_out(job: TrainConfig) -> dict[str, Any] | None:
    """Which state of which store all runs are measured on, if any."""
    if (asked := held_out_set(job.eval, job.store.url)) is None:
        return None
    snapshot = asked.snapshot or asked.store.head()
    return {"store": asked.store.uuid, "pin": snapshot.number, "sha256": snapshot.sha256}


def _at_snapshot(each: Combination, plan: Mapping[str, Any]) -> Combination:
    train = each.job.train.model_copy(update={"snapshot": str(plan["pin"])})
    job = each.job.model_copy(update={"train": train})
    if (held := plan.get("held_out")) is not None:
        held_out = each.job.eval.model_copy(update={"snapshot": str(held["pin"])})
        job = job.model_copy(update={"eval": held_out})
    return Combination(name=each.name, values=each.values, job=job)


def _judged(each: Combination, skip: bool) -> Combination:
    try:
        check_train(each.job)
    except LogitcaskError as error:
        if not skip:
            raise type(error)(f"{each.name}: {error.cause}", hint=error.hint) from error
        return Combination(name=each.name, values=each.values, job=each.job, refused=error.cause)
    return each


def _evaluated(run: TrainReport, which: int, name: str) -> float | None:
    found = run.evaluations[which].get(f"eval/{name}") if run.evaluations else None
    return None if found is None else float(found)


def _of(run: str, on_event: EventHandler) -> EventHandler:
    """Lines say which run they are of: its folder."""
    return lambda line: on_event(f"{run}: {line}")


def _plain(value: Any) -> str:
    """As part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.+-]", "_", str(value))
