"""The on-policy distillations of the miniature: `logitcask distill` as a call, one folder each.

All have one setting, as in the paper: student top-k with k = 16, one update a round, temperature 1,
a constant rate. All use equally many prompts, from the start again at their end. A run that ended
is read from its folder.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper_family import NEW_TOKENS, POST_PROMPTS, Family
from paper_models import load
from paper_task import write_prompts

from logitcask.engine.config.loop import LoopScore, LoopTeacher
from logitcask.engine.config.prompts import Prompts
from logitcask.engine.config.sections import Rollout, Run, RunConfig, StoreSection, Student
from logitcask.engine.config.training import Loop, Train
from logitcask.engine.distill.loop import distill

ROUNDS, PROMPTS, N = 16, 64, 2
RATE = 1e-3
LAST = 4
"""Updates whose mean metrics are those after the run."""
METRICS = {
    "ratio": "overlap/ratio",
    "mass": "overlap/mass_student",
    "advantage": "overlap/advantage",
    "gap": "entropy/gap",
    "entropy": "entropy/student",
    "grad_norm": "train/grad_norm",
}
"""Key of a row -> key of metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A run of the bench."""

    student: str = "base"
    teacher: str = "post"
    objective: str = "opd"
    split: str = "prompts"
    template: str = "="
    topk: int = 16
    """Ids that student and teacher store."""
    rounds: int = ROUNDS


RUNS = {
    "success": Distillation(),
    "failure": Distillation(teacher="big"),
    "same": Distillation(teacher="big_post"),
    "other": Distillation(teacher="other"),
    "cold": Distillation(student="cold", teacher="other"),
    "reverse": Distillation(student="post", teacher="base"),
    "reverse_big": Distillation(student="post", teacher="big"),
    "reverse_long": Distillation(student="post", teacher="base", rounds=3 * ROUNDS),
    "reverse_big_long": Distillation(student="post", teacher="big", rounds=3 * ROUNDS),
    "success_big": Distillation(student="big", teacher="big_post"),
    "failure_big": Distillation(student="big", teacher="huge"),
    "overlap": Distillation(objective="overlap"),
    "non_overlap": Distillation(objective="non_overlap"),
    "template": Distillation(template="?"),
    "content": Distillation(split="post"),
    "sampled": Distillation(objective="sampled_token"),
    "k1": Distillation(objective="opd_released(k=1)"),
    "k4": Distillation(objective="opd_released(k=4)"),
    "k16": Distillation(objective="opd_released"),
    "k64": Distillation(objective="opd_released(k=64)", topk=64),
}


def run(family: Family, folder: Path, name: str) -> dict[str, Any]:
    """Run a distillation, and return its accuracies and its metrics before and after.

    `curve` has a metric of each update. The metrics of an update are those of the student that
    sampled its round, so the first are those before the run.
    """
    file = folder / f"{name}.json"
    if not file.exists():
        student, teacher = family.path(RUNS[name].student), family.path(RUNS[name].teacher)
        start = time.process_time()
        made = _run(family, folder / name, RUNS[name], student, teacher)
        made["cpu_s"] = time.process_time() - start
        file.write_text(json.dumps(made))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _run(
    family: Family, folder: Path, of: Distillation, student: Path, teacher: Path
) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prompts = folder / "prompts.jsonl"
    write_prompts(prompts, family.problems(of.split, POST_PROMPTS, of.template))
    config = RunConfig(
        student=Student(model=str(student)),
        teacher=LoopTeacher(model=str(teacher), name="teacher"),
        prompts=Prompts(file=prompts, chat_template=False),
        store=StoreSection(url=str(folder / "store")),
        rollout=Rollout(n=N, max_new_tokens=NEW_TOKENS, student_topk=of.topk, unit_prompts=PROMPTS),
        score=LoopScore(teacher_topk_min=of.topk),
        train=Train(
            objective=of.objective,
            learning_rate=RATE,
            adam_beta2=0.98,
            pack_length=2048,
            metrics_fraction=0.5,
            save_steps=10_000,
        ),
        loop=Loop(rounds=of.rounds, prompts_per_round=PROMPTS),
        run=Run(out=folder / "run", seed=family.seed, device="cpu", dtype="float32"),
    )
    distill(config)
    lines = [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    curves = {key: [line[name] for line in lines] for key, name in METRICS.items()}
    trained = load(folder / "run")
    return {
        "before": family.accuracies[of.student],
        "teacher": family.accuracies[of.teacher],
        "after": family.accuracy(trained),
        "after_other_template": family.accuracy(trained, "?"),
        "first": {key: curve[0] for key, curve in curves.items()},
        "last": {key: sum(curve[-LAST:]) / LAST for key, curve in curves.items()},
        "curve": curves,
    }
