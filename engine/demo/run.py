"""All stages on a toy task: two models trained from scratch, one store, any objective.

    OUT/teacher, student       ordinary model folders, trained on solutions
        main.jsonl             prompts of the training rollouts
        heldout.jsonl          prompts of the rollouts that overlap is measured on
        store                  rollouts `main` and `heldout` of the student, scores of `teacher`
        runs/OBJECTIVE         the student trained on `main`
        report.html            the page of the newest run, with the others laid over it
        demo.json              settings, accuracies, and seconds of the finished stages

Stages recorded in demo.json are not repeated: a second call with another objective pretrains,
samples and scores nothing. Everything runs on the CPU in float32.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitcask.engine.backends.hf import HF
from logitcask.engine.commands.rollout import run_rollout
from logitcask.engine.commands.score import run_score
from logitcask.engine.commands.train import run_train
from logitcask.engine.config.prompts import Prompts
from logitcask.engine.config.sections import (
    Rollout,
    RolloutConfig,
    Run,
    ScoreConfig,
    StoreSection,
    Student,
    TrainConfig,
)
from logitcask.engine.config.teacher import Score, Teacher
from logitcask.engine.config.training import Train
from logitcask.engine.demo.models import Size, accuracy, make_model, make_tokenizer, save
from logitcask.engine.demo.pretrain import TaskPretrainer, pretrain_between, pretrain_to_at_least
from logitcask.engine.demo.record import DemoResult, Record
from logitcask.engine.demo.scale import FAST, FULL, Scale
from logitcask.engine.demo.task import Task, write_prompts
from logitcask.engine.events import running_step
from logitcask.engine.models.digests import replace_text
from logitcask.engine.models.identity import model_ref
from logitcask.engine.objectives import parse_objective
from logitcask.engine.report.build import build_report
from logitcask.engine.report.page import page
from logitcask.engine.report.runs import TEACHER_ACCURACY, is_run
from logitcask.engine.store import open_store
from logitcask.engine.store.format.layouts import kept_lists
from logitcask.engine.store.format.ragged import starts
from logitcask.engine.store.inspect import bytes_per_position
from logitcask.engine.training.run_dir.files import EVALUATIONS
from logitcask.engine.types import Array, Progress, ScoreParams, no_progress

Top = tuple[Array, Array]
"""([P, K] ids, [P, K] log-probs), best first."""

K = 16
"""Ids of the top-k lists whose overlap is measured; student and teacher store at least these."""
MAIN, HELDOUT, TEACHER = "main", "heldout", "teacher"
TEACHER_AT_LEAST = 0.95
STUDENT_BETWEEN = (0.45, 0.65)


def run_demo(
    out: Path,
    *,
    objective: str = Train().objective,
    fast: bool = False,
    seed: int = 0,
    progress: Progress = no_progress,
) -> DemoResult:
    """Run the missing stages of `out`, train the student by `objective`, and evaluate it.

    A trained objective is only evaluated again. Raises ObjectiveError for an unknown objective,
    ConfigError for an `out` that holds something else or a demo of another seed or size,
    LogitcaskError where a model does not learn its task, and the errors of the stages.
    """
    parse_objective(objective)  # raises before minutes of work
    scale = FAST if fast else FULL
    record = Record.open(out, {"seed": seed, "fast": fast, "scale": asdict(scale)})
    demo = Demo(out, scale, seed, fast, record, progress)
    record.once("teacher", demo.make_teacher)
    record.once("student", demo.make_student)
    with one_thread():
        record.once("rollout", demo.sample)
        record.once("score", demo.score)
        return demo.distill(objective)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: more gain nothing with such small matrices, and threads that spin
    while they wait make a busy machine many times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Demo:
    """The stages of one demo folder."""

    def __init__(
        self,
        out: Path,
        scale: Scale,
        seed: int,
        fast: bool,
        record: Record,
        progress: Progress,
    ) -> None:
        self.out, self.scale, self.seed, self.fast = out, scale, seed, fast
        self.record, self.progress = record, progress
        self.task = Task(scale.digits)
        self.tokenizer = make_tokenizer()
        self.run = Run(seed=seed, device="cpu", dtype="float32")

    def make_teacher(self) -> None:
        """Pretrain a teacher that solves almost every problem."""
        scale = self.scale
        pretrainer = self._pretrainer(
            "teacher", scale.teacher, scale.teacher_batch, scale.teacher_lr
        )
        pretrain_to_at_least(
            pretrainer,
            TEACHER_AT_LEAST,
            ready=0.8,
            stride=25,
            slide=scale.teacher_slide,
            limit=1000,
            stage="teacher",
            progress=self.progress,
        )
        self._save("teacher", pretrainer.model)

    def make_student(self) -> None:
        """Pretrain a student that solves about half of the problems."""
        scale = self.scale
        pretrainer = self._pretrainer(
            "student", scale.student, scale.student_batch, scale.student_lr
        )
        pretrain_between(
            pretrainer,
            *STUDENT_BETWEEN,
            stride=20,
            limit=2000,
            stage="student",
            progress=self.progress,
        )
        self._save("student", pretrainer.model)

    def _pretrainer(self, name: str, size: Size, batch: int, lr: float) -> TaskPretrainer:
        return TaskPretrainer(
            make_model(size, self.seed),
            self.tokenizer,
            self.task.stream(name, self.seed),
            self.task.draw("validation", self.scale.exam, self.seed),
            batch=batch,
            lr=lr,
            max_new_tokens=self.task.max_new_tokens,
        )

    def _save(self, name: str, model: Any) -> None:
        save(model, self.tokenizer, self.out / name)
        self.record.accuracy[name] = self._accuracy(model)

    def sample(self) -> None:
        """Sample the student's responses to both sets of prompts."""
        self._rollout(MAIN, "prompts", self.scale.prompts)
        self._rollout(HELDOUT, "evaluation", self.scale.heldout)

    def score(self) -> None:
        """Score both sets of rollouts with the teacher."""
        for name in (MAIN, HELDOUT):
            config = ScoreConfig(
                teacher=Teacher(model=str(self.out / "teacher"), name=TEACHER),
                store=self._store(name),
                score=Score(teacher_topk_min=K),
                run=self.run,
            )
            run_score(config, progress=self.progress)

    def _rollout(self, name: str, split: str, count: int) -> None:
        file = self.out / f"{name}.jsonl"
        write_prompts(file, self.task.draw(split, count, self.seed))
        config = RolloutConfig(
            student=Student(model=str(self.out / "student")),
            prompts=Prompts(file=file, chat_template=False),
            store=self._store(name),
            rollout=Rollout(
                n=self.scale.n,
                max_new_tokens=self.task.max_new_tokens,
                student_topk=K,
                unit_prompts=self.scale.unit_prompts,
            ),
            run=self.run,
        )
        run_rollout(config, progress=self.progress)

    def distill(self, objective: str) -> DemoResult:
        """Train the student by `objective`, and compare it with student and teacher before."""
        folder = self.out / "runs" / objective
        config = TrainConfig(
            student=Student(model=str(self.out / "student")),
            store=self._store(MAIN),
            train=Train(
                teacher=TEACHER,
                objective=objective,
                learning_rate=1e-3,
                lr_scheduler_type="cosine",
                warmup_steps=20,
                adam_beta2=0.98,
                pack_length=self.scale.pack_length,
                gradient_accumulation_steps=self.scale.accumulation,
                save_steps=1000,
            ),
            run=self.run.model_copy(update={"out": folder}),
        )
        with self.record.timing("train"):
            trained_run = run_train(config, progress=self.progress)
        with self.record.timing("evaluate"), running_step("evaluate"):
            trained = HF(model_ref(str(folder), chat_template=False), device="cpu", dtype="float32")
            after = self._accuracy(trained.model)
            snapshot = open_store(self.out / "store").head()
            (ratio_before, mass_before), (ratio_after, mass_after) = self._overlaps(trained)
        before, teacher = self.record.accuracy["student"], self.record.accuracy["teacher"]
        self._note_accuracy(folder, {0: before, trained_run.updates: after})
        with self.record.timing("report"):
            file = self.report(folder)
        return DemoResult(
            student_before=before,
            student_after=after,
            teacher=teacher,
            gap_recovery=(after - before) / (teacher - before),
            overlap_ratio_before=ratio_before,
            overlap_ratio_after=ratio_after,
            overlap_mass_before=mass_before,
            overlap_mass_after=mass_after,
            positions=sum(s.counts["P"] for s in snapshot.rollouts(MAIN)),
            bytes_per_position=bytes_per_position(snapshot)["total"],
            seconds=self.record.seconds,
            objective=objective,
            segments=len(snapshot.segments),
            reused=self.record.reused,
            out=self.out,
            fast=self.fast,
            seed=self.seed,
            report=file,
            report_bytes=file.stat().st_size,
        )

    def _note_accuracy(self, run: Path, accuracy: Mapping[int, float]) -> None:
        """Write evaluations.jsonl of a run: update -> share of problems solved, greedily.

        The standard error is that of a share of n independent problems, sqrt(x (1 - x) / n).
        """
        n = self.scale.evaluation
        lines = [
            {
                "version": update,
                "progress/step": update,
                "eval/prompts": n,
                "eval/n": 1,
                "eval/accuracy": share,
                "eval/accuracy_se": math.sqrt(share * (1 - share) / n),
                TEACHER_ACCURACY: self.record.accuracy["teacher"],
            }
            for update, share in accuracy.items()
        ]
        replace_text(run / EVALUATIONS, "".join(json.dumps(line) + "\n" for line in lines))

    def report(self, run: Path) -> Path:
        """Write the report of a run, with the other runs of the folder laid over it."""
        others = sorted(each for each in run.parent.iterdir() if is_run(each) and each != run)
        file = self.out / "report.html"
        with running_step("report"):
            replace_text(file, page(build_report(run, others)))
        return file

    def _overlaps(self, trained: HF) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return (ratio, mass) before and after, on the same rows of `heldout`."""
        store = open_store(self.out / "store")
        snapshot = store.head()
        scored = snapshot.scores(TEACHER)
        own_top = ScoreParams(top_p=1.0, k_min=K, k_max=K, at_student=False)
        before, after, teacher = [], [], []
        for segment in snapshot.rollouts(HELDOUT):
            rollouts = store.read_rollouts(segment)
            assert rollouts.student is not None, "a committed rollout unit holds these"
            old, new = rollouts.student, trained.score(rollouts, own_top)
            cached = store.read_scores(scored[segment.seg_id], base=rollouts)
            before.append(top(old.cnt, old.ids, old.entry_lp))
            after.append(top(new.cnt, new.ids, new.entry_lp))
            teacher.append(top(cached.kept, *kept_lists(cached)))
        return overlap(before, teacher), overlap(after, teacher)

    def _accuracy(self, model: Any) -> float:
        problems = self.task.draw("evaluation", self.scale.evaluation, self.seed)
        return accuracy(model, self.tokenizer, problems, self.task.max_new_tokens)

    def _store(self, rollouts: str) -> StoreSection:
        return StoreSection(url=str(self.out / "store"), rollouts=rollouts)


def overlap(students: list[Top], teachers: list[Top]) -> tuple[float, float]:
    """Return the mean |S(p) & S(q)| / K and the student's mean mass on S(p) & S(q), S the top K.

    Both lists have the same rows. arXiv 2604.13016 Eq.6 and Eq.9.
    """
    p_ids, log_p = (np.concatenate(each) for each in zip(*students, strict=True))
    q_ids, _ = (np.concatenate(each) for each in zip(*teachers, strict=True))
    both = (p_ids[:, :, None] == q_ids[:, None, :]).any(-1)
    mass = np.where(both, np.exp(log_p, dtype=np.float64), 0.0).sum(-1)
    return float(both.mean()), float(mass.mean())


def top(cnt: Array, ids: Array, log_probs: Array) -> Top:
    """Return ([P, K] ids, [P, K] log-probs) of the best K entries of every row."""
    at = starts(cnt)[:-1, None] + np.arange(K)
    return ids[at], log_probs[at]
