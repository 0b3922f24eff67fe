"""`logitcask evaluate`: a student, or the versions of a run as they appear, by the trainer's code.

The settings are those of the run, where the folder is of one, and flags go before them.
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logitcask.engine.commands.load_teacher import live_backend
from logitcask.engine.commands.resolve import rendering_of, student_of
from logitcask.engine.commands.train import eval_plan, find_objective, held_out_set
from logitcask.engine.config.parse.toml import validate
from logitcask.engine.config.sections import EvaluateConfig
from logitcask.engine.config.training import Lora
from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.events import EventHandler, warn_once
from logitcask.engine.models.identity import METADATA_FILE, local_folder
from logitcask.engine.models.load import quiet
from logitcask.engine.store import open_store
from logitcask.engine.training.evaluation.held_out import HeldOut, hold_out
from logitcask.engine.training.evaluation.responses import EvalPlan, measure_student
from logitcask.engine.training.evaluation.versions import (
    evaluating,
    published,
    read_evaluations,
)
from logitcask.engine.training.run_dir.files import RUN, VERSIONS, read_run
from logitcask.engine.training.settings import choose_attention, training_arguments
from logitcask.engine.training.student import load_for_training
from logitcask.engine.types import NO_DETAIL, Detail, ModelRef, Progress, no_progress

_SECTIONS = ("student", "store", "train", "eval", "run")


def evaluate_config(name: str, flags: Mapping[str, Mapping[str, Any]]) -> EvaluateConfig:
    """Return the configuration for a folder or a hub id: flags, then the settings of its run."""
    run = _run_of(name)
    recorded = (run or {}).get("config") or {}
    values = {s: {**recorded.get(s, {}), **flags.get(s, {})} for s in (*_SECTIONS, "work")}
    values["student"] = {**flags.get("student", {}), "model": name}
    return validate(EvaluateConfig, values, source=f"evaluate {name}")


def run_evaluate(
    config: EvaluateConfig,
    *,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> dict[str, Any]:
    """Return the entries that a trainer writes for this student, and its version.

    Raises ConfigError where nothing is to be measured, and the errors of an evaluation.
    """
    run = _run_of(config.student.model)
    return _Evaluator(config, run, on_event).line(config.student.model, progress)


def watch_evaluations(
    config: EvaluateConfig,
    *,
    stop: threading.Event,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> dict[str, Any]:
    """Evaluate the versions of a run as they appear, until the final student has its line.

    Raises ConfigError for a folder without a run, and where another process evaluates it.
    """
    out = Path(config.student.model)
    run = read_run(out) if (out / RUN).exists() else None
    if run is None:
        raise ConfigError(
            f"--worker: {out} has no {RUN}: it is not the folder of a run",
            hint="start the training first, and give its folder; without --worker a model will do",
        )
    evaluator = _Evaluator(config, run, on_event)
    every, said = config.eval.every, warn_once(on_event)
    count, idle_s = 0, time.monotonic()
    with evaluating(out, every, evaluator.start, on_event) as (live, append):

        def lively(stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
            live()
            progress(stage, done, total, detail)

        while not stop.is_set():
            live()
            folders, over = published(out), (out / METADATA_FILE).exists()
            due = _due(folders, read_evaluations(out), evaluator, over)
            if not due and (over or 0 < config.work.idle_exit <= time.monotonic() - idle_s):
                break
            # Those that a trainer keeps come in order; else the newest, which stays the longest.
            number = (due[0] if every else due[-1]) if due else -1
            try:
                line = evaluator.line(str(folders[number]), lively) if due else None
            except IncompleteError as error:
                # At the start of a loop nothing is sampled yet.
                said(f"waiting: {error.cause}")
                line = None
            except Exception:
                if (folders[number] / METADATA_FILE).exists():
                    raise
                on_event(f"version {number} was removed before its evaluation ended")
                continue
            if line is None:
                stop.wait(config.work.poll)
                continue
            append(line)
            on_event(f"version {number} is evaluated")
            count, idle_s = count + 1, time.monotonic()
    return {"out": out, "evaluated": count, "evaluations": read_evaluations(out)}


def _due(
    folders: Mapping[int, Path], lines: list[dict[str, Any]], evaluator: "_Evaluator", over: bool
) -> list[int]:
    """Return the versions without a line, in order; over: the last one is the final student."""
    done = {line["version"] for line in lines}
    every, last = evaluator.config.eval.every or 1, max(folders, default=-1)
    return sorted(
        number
        for number in folders.keys() - done
        if (number - evaluator.start) % every == 0 or (over and number == last)
    )


class _Evaluator:
    """Prompts and held-out rows of an evaluation, read at the first student."""

    def __init__(
        self, config: EvaluateConfig, run: Mapping[str, Any] | None, on_event: EventHandler
    ) -> None:
        if config.eval.prompts is None and config.eval.held_out_names() == (None,) * 4:
            raise ConfigError(
                "evaluate without prompts and without held-out rollouts: nothing is measured",
                hint="give --eval-prompts FILE, or --eval-store or --eval-rollouts",
            )
        self.config = config
        self._run, self._on_event = run, on_event
        self.start = int(((run or {}).get("student") or {}).get("version", 0))
        """Version of the student before update 0 of the run."""
        self._plans: tuple[EvalPlan | None, HeldOut | None] | None = None

    def line(self, name: str, progress: Progress) -> dict[str, Any]:
        """Return the version and the entries of a student: a folder or a hub id."""
        config, begun_s = self.config, time.monotonic()
        snapshot = open_store(config.store.url).head()
        student = config.student.model_copy(update={"model": name})
        model = student_of(student, snapshot, config.store.rollouts)
        if self._plans is None:
            rendering = rendering_of(snapshot, config.store.rollouts)
            plan = eval_plan(config.eval, config.run, model, rendering, self._on_event)
            self._plans = plan, self._held_out(model)
        plan, held_out = self._plans
        # One process, whatever the training has.
        settings = config.train.model_copy(
            update={"sharding": "none", "cpu_offload": False, "gradient_checkpointing": False}
        )
        args = training_arguments(settings, config.run, model.path)
        with quiet():
            network = load_for_training(
                model,
                settings,
                Lora(),
                args,
                attention=choose_attention(settings, args),
                seed=config.run.seed,
                length=held_out.longest if held_out else 0,
            )
            found = measure_student(
                plan,
                held_out,
                network,
                # That of the plan needs the folder of its first student, which may be gone.
                lambda: live_backend(network, model, config.run) if plan else None,
                version=model.version,
                progress=progress,
                device=args.device,
            )
        step = {"progress/step": model.version - self.start} if self._run else {}
        return {
            "version": model.version,
            **step,
            **found,
            "eval/seconds": time.monotonic() - begun_s,
        }

    def _held_out(self, model: ModelRef) -> HeldOut | None:
        config = self.config
        data = held_out_set(config.eval, config.store.url, config.train)
        if data is None:
            return None
        # The snapshot of a run that measures the same rows is fixed.
        preset = find_objective(config.train)
        return hold_out(data, model, preset, config.train.pack_length, self._run)


def _run_of(name: str) -> dict[str, Any] | None:
    """Return run.json of a folder of a run, or of one of its versions; None for another model."""
    folder = local_folder(name)
    if folder is not None and folder.parent.name == VERSIONS:
        folder = folder.parent.parent
    return read_run(folder) if folder is not None and (folder / RUN).exists() else None
