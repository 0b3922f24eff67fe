"""Ablations: every combination of some settings, trained from one snapshot of a store.

    DIR/plan.json                fixed at the first call: store, snapshot, common configuration
        COMBINATION/seed-N       one run each, as of `logitcask train`
        cache                    units of the store, decoded once for all runs
        ablate.json ablate.md    the table

Nothing is sampled for training and nothing is scored: the teacher's scores are paid for once, by
`score`. The same call resumes, because each run does.
"""

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from logitcask.engine.ablate_table import (
    AblateReport,
    Passes,
    markdown,
    run_seconds,
    saved_seconds,
    table_row,
)
from logitcask.engine.commands.resolve import snapshot_of
from logitcask.engine.commands.train import check_train, held_out_set, run_train, scoring_seconds
from logitcask.engine.config.parse.other_names import keys_named, suggest
from logitcask.engine.config.parse.toml import keys_of, validate
from logitcask.engine.config.section import parse_value
from logitcask.engine.config.sections import TrainConfig
from logitcask.engine.config.training import Ablate
from logitcask.engine.errors import ConfigError, IntegrityError, LogitcaskError
from logitcask.engine.estimate.left import (
    Approve,
    WorkLeft,
    refuse_full_disk,
    trainings_left,
)
from logitcask.engine.events import EventHandler
from logitcask.engine.models.digests import read_json, replace_text, write_json
from logitcask.engine.models.identity import METADATA_FILE, resolve_model
from logitcask.engine.models.weight_files import weight_files
from logitcask.engine.store import open_store
from logitcask.engine.store.cache import UnitCache
from logitcask.engine.training.run_dir.files import METRICS, check_same, locked, writing
from logitcask.engine.types import NO_DETAIL, Detail, Progress, no_progress

PLAN = "plan.json"

FIXED = ("store.url", "store.profile", "train.snapshot", "run.out", "run.overwrite", "run.seed")
"""Keys that cannot be varied; nor can those of [eval]."""

_NOT_COMPARED = ("store.url", "run.out", "run.overwrite", "train.snapshot", "eval.snapshot")
"""Keys that plan.json holds as an id or not at all."""

_VALUE_SEPARATOR = re.compile(r",(?![^(]*\))")
"""A comma outside brackets: `gkd(parameter=0.1,k=8)` is one value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Combination:
    name: str
    """Name of its folder: key=value,key=value."""
    values: Mapping[str, Any]
    config: TrainConfig
    refused: str = ""
    """Reason why it cannot be trained."""


def combinations(config: TrainConfig, vary: Sequence[str]) -> list[Combination]:
    """Return the cartesian product of `key=value,value` texts. Raises ConfigError."""
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
                hint="vary another key; --seeds sets the number of seeds, [eval] is common to all",
            )
        if name in axes:
            raise ConfigError(f"--vary {text}: {name} is varied twice", hint="give it once")
        axes[name] = [parse_value(value) for value in _VALUE_SEPARATOR.split(listed)]
    if not axes:
        raise ConfigError("nothing is varied", hint="e.g. --vary objective=overlap,opd")
    common = config.model_dump(mode="json")
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
        found[name] = Combination(name=name, values=values, config=made)
    return list(found.values())


def full_key(key: str) -> str:
    """Return section.key of a TrainConfig; the section may be omitted where the key is unique."""
    known = [name for name in keys_of(TrainConfig) if "." in name]
    matches = [name for name in known if key in (name, name.partition(".")[2])]
    if len(matches) > 1:
        matches = [name for name in matches if not name.startswith("eval.")]
    if len(matches) == 1:
        return matches[0]
    spelled = {name.partition(".")[2]: name for name in known} | {name: name for name in known}
    same = keys_named(key.rpartition(".")[2])
    raise ConfigError(
        f"--vary {key}: names no key of a training, or several",
        hint=suggest(key, known, matches or same)
        or suggest(key, spelled)
        or f"known keys: {', '.join(known)}",
    )


def ablate(
    config: TrainConfig,
    vary: Sequence[str],
    settings: Ablate,
    *,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
    approve: Approve = refuse_full_disk,
) -> AblateReport:
    """Train the missing runs and write the table; `approve` gets them before the first one.

    A combination that cannot be trained stops the call before the first training, unless
    `skip_refused`. Raises ConfigError, IdentityError (DIR holds another ablation), and the errors
    of a training.
    """
    begun_s = time.monotonic()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: ablate runs in one process",
            hint="start it without torchrun",
        )
    planned = combinations(config, vary)
    with locked(settings.out, on_event):
        plan = _plan(config, set(planned[0].values), settings.out)
        checked = [_checked(_at_snapshot(each, plan), settings.skip_refused) for each in planned]
        approve(_left(config, checked, settings))
        with writing(settings.out):
            write_json(settings.out / PLAN, plan)
        rows, passes, trained, trainings_s = _trained(config, checked, settings, progress, on_event)
        result = AblateReport(
            out=settings.out,
            snapshot=int(plan["pin"]),
            rows=tuple(rows),
            runs_trained=trained,
            seconds=time.monotonic() - begun_s,
            trainings_seconds=trainings_s,
            teacher_seconds_spent=0.0,
            teacher_passes=tuple(passes),
            teacher_seconds_saved=saved_seconds(passes),
        )
        written = {**asdict(result), "out": str(settings.out)}
        table = {**written, "pin": written.pop("snapshot")}
        text = json.dumps(table, indent=1, sort_keys=True) + "\n"
        with writing(settings.out):
            replace_text(settings.out / "ablate.json", text)
            replace_text(settings.out / "ablate.md", markdown(result))
    return result


def _left(config: TrainConfig, checked: Sequence[Combination], settings: Ablate) -> WorkLeft:
    """Return the trainings that are left."""
    trained = [each for each in checked if not each.refused]
    folders = [
        settings.out / each.name / f"seed-{config.run.seed + number}"
        for each in trained
        for number in range(settings.seeds)
    ]
    finished = [each / METRICS for each in folders if (each / METADATA_FILE).is_file()]
    student = resolve_model(config.student.model, config.student.revision)
    snapshot = snapshot_of(open_store(config.store.url), config.train.snapshot)
    rollouts = snapshot.rollouts(config.store.rollouts)
    return trainings_left(
        settings.out,
        done=[_seconds_of(file) for file in finished],
        total=len(folders),
        positions=sum(each.counts["P"] for each in rollouts) * config.train.num_train_epochs,
        weight_bytes=sum(file.stat().st_size for file in weight_files(student)),
    )


def _seconds_of(metrics: Path) -> float:
    """Return the seconds of a finished training; 0 where its file does not show them."""
    last = metrics.read_text(errors="replace").splitlines()[-1:] if metrics.is_file() else []
    try:
        return float(json.loads("".join(last))["progress/seconds"])
    except (ValueError, KeyError, TypeError):
        return 0.0  # the training itself reports the damage


def _trained(
    config: TrainConfig,
    checked: Sequence[Combination],
    settings: Ablate,
    progress: Progress,
    on_event: EventHandler,
) -> tuple[list[dict[str, Any]], list[Passes], int, float]:
    """Train the missing runs; return (rows of the table, passes over the scores, number of runs
    trained, their seconds).
    """
    cache = UnitCache(settings.out / "cache")
    rows: list[dict[str, Any]] = []
    passes: list[Passes] = []
    trained, trainings_s = 0, 0.0
    total, done = settings.seeds * sum(not each.refused for each in checked), 0
    for each in checked:
        runs = []
        for seed in range(config.run.seed, config.run.seed + settings.seeds * (not each.refused)):
            name = f"{each.name}/seed-{seed}"
            run = {"out": settings.out / name, "seed": seed, "overwrite": False}
            progress("ablate", done, total)
            start_s = time.monotonic()
            report = run_train(
                each.config.model_copy(update={"run": each.config.run.model_copy(update=run)}),
                cache=cache,
                progress=_within(progress, done, total, name),
                on_event=_prefixed(name, on_event),
            )
            if report.resumed_at < report.updates:
                trained += 1
                # The seconds of a resumed run include those of an earlier call.
                trainings_s += min(run_seconds(report), time.monotonic() - start_s)
            runs.append(report)
            done += 1
        rows.append(table_row(each.values, runs, each.refused, settings.teacher_accuracy))
        if runs:
            scoring_s, epochs = scoring_seconds(each.config), each.config.train.num_train_epochs
            passes.append(Passes(seconds=scoring_s, runs=len(runs), epochs=epochs))
    progress("ablate", total, total)
    return rows, passes, trained, trainings_s


def _within(progress: Progress, run: int, runs: int, name: str) -> Progress:
    """Return the progress of one training as a part of all."""
    share = 0.0

    def within(stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
        nonlocal share
        if stage == "train":  # evaluations between its updates move nothing
            share = min((done + detail.share) / max(1, total), 0.99)
        part = f"{name}: {stage} {done:,}/{total:,}"
        progress("ablate", run, runs, Detail(part=part, share=share))

    return within


# --- the plan ---


def _plan(config: TrainConfig, varied: set[str], out: Path) -> dict[str, Any]:
    """Return plan.json of the first call, checked against this one."""
    store = open_store(config.store.url)
    common = {
        f"{section}.{key}": value
        for section, content in config.model_dump(mode="json").items()
        for key, value in content.items()
        if f"{section}.{key}" not in {*varied, *_NOT_COMPARED}
    }
    file, number = out / PLAN, config.train.snapshot
    if not file.exists():
        if any(each.name[0] != "." for each in out.iterdir()):
            raise ConfigError(
                f"{out} is not empty and holds no {PLAN}: it is not the folder of an ablation",
                hint="give a new or an empty folder with --out",
            )
        snapshot = snapshot_of(store, number)
        return {
            "store": store.uuid,
            "pin": snapshot.number,
            "sha256": snapshot.sha256,
            "held_out": _held_out(config),
            "common": common,
        }
    hint = "restore it from a copy, or give another --out"
    plan = read_json(file, hint=hint)
    if not (
        type(plan.get("pin")) is int
        and type(plan.get("sha256")) is type(plan.get("store")) is str
        and isinstance(plan.get("common"), dict)
        and isinstance(plan.get("held_out") or {}, dict)
    ):
        raise IntegrityError(f"{file} is not the plan of an ablation", hint=hint)
    # A key that one call varies may be fixed in another: only keys fixed in both must be equal.
    both = plan["common"].keys() & common.keys()
    earlier = {"store": plan["store"], "common": {key: plan["common"][key] for key in both}}
    ours: dict[str, Any] = {"store": store.uuid, "common": {key: common[key] for key in both}}
    if number is not None:
        earlier["pin"], ours["pin"] = plan["pin"], snapshot_of(store, number).number
    if config.eval.snapshot is not None:
        earlier["held_out"], ours["held_out"] = plan.get("held_out"), _held_out(config)
    check_same(out, earlier, ours, hint="give another --out, or the settings of its first call")
    store.snapshot(int(plan["pin"]), plan["sha256"])
    if (held := plan.get("held_out")) is not None:
        open_store(config.eval.store or config.store.url).snapshot(int(held["pin"]), held["sha256"])
    return plan


def _held_out(config: TrainConfig) -> dict[str, Any] | None:
    """Return the store and snapshot of the held-out data of all runs, if there are any."""
    if (held_out := held_out_set(config.eval, config.store.url, config.train)) is None:
        return None
    snapshot = held_out.snapshot or held_out.store.head()
    return {"store": held_out.store.uuid, "pin": snapshot.number, "sha256": snapshot.sha256}


def _at_snapshot(each: Combination, plan: Mapping[str, Any]) -> Combination:
    snapshots = {"train": plan["pin"]}
    if (held := plan.get("held_out")) is not None:
        snapshots["eval"] = held["pin"]
    sections = {
        name: getattr(each.config, name).model_copy(update={"snapshot": str(number)})
        for name, number in snapshots.items()
    }
    return replace(each, config=each.config.model_copy(update=sections))


def _checked(each: Combination, skip: bool) -> Combination:
    """Return the combination, marked as refused if it cannot be trained and `skip` is True."""
    try:
        check_train(each.config)
    except LogitcaskError as error:
        if not skip:
            raise type(error)(f"{each.name}: {error.cause}", hint=error.hint) from error
        return replace(each, refused=error.cause)
    return each


def _prefixed(name: str, on_event: EventHandler) -> EventHandler:
    return lambda line: on_event(f"{name}: {line}")


def _plain(value: Any) -> str:
    """Return the value as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.+-]", "_", str(value))
