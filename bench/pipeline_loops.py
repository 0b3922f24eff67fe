"""The loops of bench_pipeline.py: each returns its figures, its accuracy and its work."""

import os
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pipeline_live
from pipeline_spans import ROLES, Work, picture, queue, stage, summary, total, work_of
from pipeline_stages import Seconds, stretched

from logitcask.engine.backends.hf import HF
from logitcask.engine.commands.rollout import run_rollout
from logitcask.engine.commands.score import run_score
from logitcask.engine.commands.train import run_train
from logitcask.engine.config.loop import LoopScore, LoopTeacher
from logitcask.engine.config.parse.toml import to_toml
from logitcask.engine.config.prompts import Prompts
from logitcask.engine.config.runner import Work as WorkSection
from logitcask.engine.config.sections import (
    Rollout,
    RolloutConfig,
    Run,
    RunConfig,
    ScoreConfig,
    StoreSection,
    Student,
    TrainConfig,
)
from logitcask.engine.config.teacher import Teacher
from logitcask.engine.config.training import Loop, Train
from logitcask.engine.demo.models import accuracy, make_model, make_tokenizer, save
from logitcask.engine.demo.record import Record
from logitcask.engine.demo.run import Demo, one_thread
from logitcask.engine.demo.scale import FAST
from logitcask.engine.demo.task import Task, write_prompts
from logitcask.engine.distill.loop import distill
from logitcask.engine.models.identity import model_ref
from logitcask.engine.store import open_store
from logitcask.engine.types import no_progress
from logitcask.engine.workers.processes import Command, supervise
from logitcask.engine.workers.timeline import read_timeline

TASK = Task(FAST.digits)
UNITS = 2
"""Work units of a round."""
LEARNING_RATE = 1e-3
OBJECTIVES = ("opd", "forward_kl", "overlap")
STAGES = Path(__file__).with_name("pipeline_stages.py")


@dataclass(frozen=True)
class Scale:
    """Sizes of the loops. prompts: of a round; samples: responses to a prompt."""

    rounds: int
    prompts: int
    samples: int
    seeds: int
    trainings: int
    max_age: int
    trained: bool = True
    """False: models with random weights."""
    evaluation: int = 500
    """Problems of an accuracy."""

    @property
    def unit_prompts(self) -> int:
        return self.prompts // UNITS


def made_models(folder: Path, *, trained: bool) -> Path:
    """Make the teacher and the student in a folder once, and return it."""
    if not trained:
        for seed, name in enumerate(("teacher", "student")):
            save(make_model(FAST.student, seed), make_tokenizer(), folder / name)
        return folder
    record = Record.open(folder, {"seed": 0, "fast": True, "scale": asdict(FAST)})
    demo = Demo(folder, FAST, 0, True, record, no_progress)
    with one_thread():
        record.once("teacher", demo.make_teacher)
        record.once("student", demo.make_student)
    return folder


def loop_config(scale: Scale, models: Path, folder: Path, seed: int, max_age: int) -> RunConfig:
    """Return the configuration of a loop below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return RunConfig(
        student=Student(model=str(models / "student")),
        teacher=LoopTeacher(model=str(models / "teacher"), name="teacher"),
        prompts=Prompts(file=prompts_file(scale, folder), chat_template=False),
        store=StoreSection(url=str(folder / "store")),
        rollout=sampling(scale),
        score=LoopScore(),
        train=Train(
            objective=OBJECTIVES[0],
            learning_rate=LEARNING_RATE,
            pack_length=pack_length(scale),
            save_steps=1000,
        ),
        loop=Loop(rounds=scale.rounds, prompts_per_round=scale.prompts, max_age=max_age),
        work=WorkSection(poll=0.1),
        run=run_section(folder, seed),
    )


def prompts_file(scale: Scale, folder: Path) -> Path:
    """Write the prompts of all rounds."""
    file = folder / "prompts.jsonl"
    write_prompts(file, TASK.draw("prompts", scale.rounds * scale.prompts, 0))
    return file


def sampling(scale: Scale) -> Rollout:
    return Rollout(
        n=scale.samples, max_new_tokens=TASK.max_new_tokens, unit_prompts=scale.unit_prompts
    )


def pack_length(scale: Scale) -> int:
    """Return more than twice the tokens of a round, so that an update is always one pack."""
    longest = len(TASK.draw("prompts", 1, 0)[0].prompt) + TASK.max_new_tokens
    return 3 * scale.prompts * scale.samples * longest


def run_section(folder: Path, seed: int) -> Run:
    return Run(out=folder / "run", seed=seed, device="cpu", dtype="float32")


def calibrated(
    scale: Scale, target: tuple[float, ...], models: Path, folder: Path
) -> tuple[dict[str, float], Seconds]:
    """Measure a round's stages in three real rounds, and return what stretches them to `target`.

    Returns the real seconds of a round by role, and the seconds that are added to a unit, a unit
    and an update.
    """
    few = Scale(**{**asdict(scale), "rounds": 3})
    work = _inline(few, Seconds(), models, folder, seed=0)
    real = {
        role: statistics.median(
            sum(each.seconds for each in work if (each.role, each.round) == (role, number))
            for number in range(few.rounds)
        )
        for role in ROLES
    }
    more = [max(0.0, most - real[role]) for role, most in zip(ROLES, target, strict=True)]
    return real, Seconds(more[0] / UNITS, more[1] / UNITS, more[2])


def synchronous(
    scale: Scale, added: Seconds, models: Path, folder: Path, seed: int
) -> dict[str, Any]:
    """Run `distill` in this process."""
    begun = time.monotonic()
    work = _inline(scale, added, models, folder, seed)
    return _figures(scale, work, folder, seed, time.monotonic() - begun)


def _inline(scale: Scale, added: Seconds, models: Path, folder: Path, seed: int) -> list[Work]:
    config = loop_config(scale, models, folder, seed, max_age=0)
    with one_thread(), stretched(added, folder):
        distill(config)
    return work_of(read_timeline(folder))


def asynchronous(
    scale: Scale, added: Seconds, models: Path, folder: Path, seed: int
) -> dict[str, Any]:
    """Run the three roles of `distill` in processes of their own."""
    config = loop_config(scale, models, folder, seed, max_age=scale.max_age)
    file = folder / "distill.toml"
    file.write_text(to_toml(config))
    begun = time.monotonic()
    supervise(commands(added, folder, file), folder / "logs", restarts=0, on_event=print)
    whole = time.monotonic() - begun
    work = work_of(read_timeline(folder))
    return _figures(scale, work, folder, seed, whole, own=config.run.out)


def commands(added: Seconds, folder: Path, file: Path) -> list[Command]:
    """Return the processes of a loop; file: its configuration."""
    return [
        Command(
            role=role,
            index=0,
            argv=[
                *(sys.executable, str(STAGES), str(added), str(folder), "0"),
                *("distill", str(file), "--role", role, "--index", "0"),
            ],
            env={"OMP_NUM_THREADS": "1"},
            leads=role == "train",
        )
        for role in ROLES
    ]


def _figures(
    scale: Scale,
    work: list[Work],
    folder: Path,
    seed: int,
    whole_s: float,
    own: Path | None = None,
) -> dict[str, Any]:
    """Return the figures of a finished loop; raise ValueError if work is missing or doubled.

    own: folder of the loop's own timeline, which has waits, loads and publications too.
    """
    counts = {role: sum(each.role == role for each in work) for role in ROLES}
    expected = {"rollout": UNITS * scale.rounds, "score": UNITS * scale.rounds}
    if counts != {**expected, "train": scale.rounds}:
        raise ValueError(f"{folder}: {counts} of {scale.rounds} rounds")
    snapshot = open_store(str(folder / "store")).head()
    held: dict[int, list[float]] = defaultdict(list)
    ages = []
    for segment in snapshot.rollouts("main"):
        number = segment.provenance["round"]
        held[number].append(segment.size)
        ages.append(number - segment.version)
    positions = sum(segment.counts["P"] for segment in snapshot.rollouts("main"))
    return {
        "seed": seed,
        **summary(work, positions),
        "whole_s": whole_s,
        "ages": {"mean": statistics.fmean(ages), "max": max(ages)},
        "accuracy": _accuracy(scale, folder / "run"),
        "queue": [
            [round(at, 2), round(held_bytes)]
            for at, held_bytes in queue(
                work, {number: statistics.fmean(sizes) for number, sizes in held.items()}
            )
        ],
        "picture": picture(read_timeline(own or folder)),
    }


def _accuracy(scale: Scale, folder: Path) -> float:
    """Return the accuracy of a student on the demo's test problems."""
    model = HF(model_ref(str(folder), chat_template=False), device="cpu", dtype="float32").model
    return _accuracy_of(scale, model)


def _accuracy_of(scale: Scale, model: Any) -> float:
    problems = TASK.draw("evaluation", scale.evaluation, 0)
    with one_thread():
        return accuracy(model, make_tokenizer(), problems, TASK.max_new_tokens)


def live(scale: Scale, added: Seconds, models: Path, folder: Path) -> dict[str, Any]:
    """Train with a live teacher for as many rounds."""
    problems = TASK.draw("prompts", scale.rounds * scale.prompts, 0)
    loop = pipeline_live.LiveLoop(
        student=models / "student",
        teacher=models / "teacher",
        prompts=[each.prompt for each in problems],
        samples=scale.samples,
        per_round=scale.prompts,
        rounds=scale.rounds,
        max_new_tokens=TASK.max_new_tokens,
        learning_rate=LEARNING_RATE,
        # As long as the units of a round.
        added=Seconds(UNITS * added.rollout, UNITS * added.score, added.train),
        folder=folder,
        seed=0,
    )
    begun = time.monotonic()
    with one_thread():
        student = pipeline_live.train_live(loop)
    whole = time.monotonic() - begun
    work = work_of(read_timeline(folder))
    return {
        "wall_s": max(each.end for each in work),
        "whole_s": whole,
        "rounds": sum(each.role == "train" for each in work),
        "accuracy": _accuracy_of(scale, student),
        "picture": picture(read_timeline(folder)),
    }


def ablated(scale: Scale, added: Seconds, models: Path, folder: Path) -> dict[str, Any]:
    """Fill a store once, and train several students from it, by other objectives."""
    folder.mkdir(parents=True)
    store, run = StoreSection(url=str(folder / "store")), run_section(folder, 0)
    student = Student(model=str(models / "student"))
    begun = time.monotonic()
    with one_thread(), stretched(added, folder):
        run_rollout(
            RolloutConfig(
                student=student,
                prompts=Prompts(file=prompts_file(scale, folder), chat_template=False),
                store=store,
                rollout=sampling(scale),
                run=run,
            )
        )
        teacher = Teacher(model=str(models / "teacher"), name="teacher")
        run_score(ScoreConfig(teacher=teacher, store=store, run=run))
        for number in range(scale.trainings):
            run_train(
                TrainConfig(
                    student=student,
                    store=store,
                    train=Train(
                        objective=OBJECTIVES[number % len(OBJECTIVES)],
                        learning_rate=LEARNING_RATE,
                        pack_length=_tokens_per_update(scale, folder / "store"),
                        save_steps=1000,
                    ),
                    run=run.model_copy(update={"out": folder / f"run-{number}"}),
                )
            )
    whole = time.monotonic() - begun
    work = work_of(read_timeline(folder))
    return {
        "trainings": scale.trainings,
        "wall_s": whole,
        "rollout_s": stage(work, "rollout"),
        "score_s": stage(work, "score"),
        "train_s": total(work, "train") / scale.trainings,
        "updates": sum(each.role == "train" for each in work) / scale.trainings,
    }


def _tokens_per_update(scale: Scale, store: Path) -> int:
    """Return the tokens of a pack that make as many updates as a loop has rounds."""
    segments = open_store(str(store)).head().rollouts("main")
    prompt = len(TASK.draw("prompts", 1, 0)[0].prompt)
    sequences = scale.rounds * scale.prompts * scale.samples
    tokens = sum(each.counts["P"] for each in segments) + sequences * prompt
    return round(1.01 * tokens / scale.rounds)


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
