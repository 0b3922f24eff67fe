"""Stores and trainings of bench_cross_tokenizer.py: one store, which each teacher scores once."""

import json
import shutil
from pathlib import Path
from typing import Any

from cross_models import KINDS, TASK, Family, load

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
from logitcask.engine.demo.models import make_tokenizer
from logitcask.engine.store import open_store

K = 16
"""Ids of the student's lists, and those of a teacher at least."""
DRAWN = 8
"""Best ids that the student samples from. From all of them, one response in thousands has a filler
token inside, and a response with a control token inside has no spans: scoring refuses it."""

TEMPERATURE = 0.1
"""Of computed weights: their scores, entropies, differ by tenths of a nat."""
ENDS = "-ends"
"""Suffix of scores whose ids are of the last row of each span, not of the first."""


class Runs:
    """The store and the trainings of one family; what the folder holds is not made again."""

    def __init__(self, family: Family, name: str, *, top_k: int) -> None:
        self.family, self.folder = family, family.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.top_k = top_k
        self.run = Run(seed=family.seed, device="cpu", dtype="float32")
        self.store = StoreSection(url=str(self.folder / "store"))

    def after(
        self,
        teacher: str,
        objective: str,
        weighting: str,
        rate: float,
        *,
        validation: bool = False,
    ) -> dict[str, float]:
        """Return the accuracies of the student after a training on scores of the store.

        teacher: value of `--teacher`; `routed` = of the expert of each problem's kind.
        weighting: of several teachers, a value of `--teacher-weighting`.
        validation: on the problems of that split, by which a rate is chosen.
        """
        of = f"{objective}-{weighting}" if weighting != "fixed" else objective
        name = f"{teacher}-{of}-{rate:g}"
        file = self.folder / f"{name}{'-validation' * validation}.json"
        if not file.exists():
            folder = self.folder / name
            if not (folder / "model.safetensors").exists():
                self._train(folder, teacher, objective, weighting, rate)
            split = "validation" if validation else "evaluation"
            measured = self.family.measured(load(folder), make_tokenizer(), split)
            file.write_text(json.dumps(measured))
        found: dict[str, float] = json.loads(file.read_text())
        return found

    def teachers(self, teacher: str) -> dict[str, dict[str, float]]:
        """Return name of scores -> accuracies of their model, for a value of `--teacher`."""
        known = self.family.accuracies
        return {name: known[name.removesuffix(ENDS)] for name in self.names(teacher)}

    @staticmethod
    def names(teacher: str) -> list[str]:
        """Return the names of scores in a value of `--teacher`, or of `routed`."""
        return [*KINDS] if teacher == "routed" else teacher.split("+")

    def _train(
        self, folder: Path, teacher: str, objective: str, weighting: str, rate: float
    ) -> None:
        for name in self.names(teacher):
            self._score(name)
        teachers: dict[str, Any] = {"teacher": teacher}
        if teacher == "routed":
            routes = ",".join(f"{kind}={kind}" for kind in KINDS)
            teachers = {"teacher": routes, "teacher_field": "kind"}
        if weighting != "fixed":
            teachers["teacher_weighting"] = weighting
            teachers["teacher_weighting_temperature"] = TEMPERATURE
        shutil.rmtree(folder, ignore_errors=True)
        run_train(
            TrainConfig(
                student=Student(model=str(self.family.path("student"))),
                store=self.store,
                train=Train(
                    **teachers,
                    objective=objective,
                    learning_rate=rate,
                    lr_scheduler_type="cosine",
                    warmup_steps=20,
                    adam_beta2=0.98,
                    pack_length=self.family.scale.pack_length,
                    save_steps=1000,
                ),
                run=self.run.model_copy(update={"out": folder}),
            )
        )

    def _score(self, name: str) -> None:
        """Score the rollouts by a teacher, and sample them before if there are none."""
        if not (self.folder / "prompts.jsonl").exists():
            self._sample()
        of, ends = name.removesuffix(ENDS), name.endswith(ENDS)
        model = self.family.path(of)
        if open_store(self.store.url).head().scores(name):
            return
        run_score(
            ScoreConfig(
                teacher=Teacher(
                    model=str(model),
                    name=name,
                    student_tokenizer=str(self.family.path("student")) if of == "merged" else "",
                ),
                store=self.store,
                score=Score(teacher_topk_min=K, span_topk="ends" if ends else "starts"),
                run=self.run,
            )
        )

    def _sample(self) -> None:
        problems = self.family.problems("prompts", self.family.scale.prompts)
        kinds = {op: kind for kind, op in KINDS.items()}
        rows = [
            {"id": f"{n:06d}", "prompt": p.prompt, "answer": p.answer, "kind": kinds[p.op]}
            for n, p in enumerate(problems)
        ]
        file = self.folder / "prompts.tmp"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        run_rollout(
            RolloutConfig(
                student=Student(model=str(self.family.path("student"))),
                prompts=Prompts(file=file, chat_template=False),
                store=self.store,
                rollout=Rollout(
                    n=self.family.scale.n,
                    max_new_tokens=TASK.max_new_tokens,
                    student_topk=K,
                    top_k=self.top_k,
                    grader="logitcask.engine.demo.task:solves",
                ),
                run=self.run,
            )
        )
        file.rename(self.folder / "prompts.jsonl")
