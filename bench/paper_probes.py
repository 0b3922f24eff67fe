"""Measure E12, E13 and E14 in the miniature, and try its teachers by `probe compatibility`.

Results of claims are [value, standard error]; 0 where the error is only that between seeds.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paper_family import NEW_TOKENS, Family
from paper_models import load, sample
from paper_task import EVALUATION, write_prompts

from logitcask.engine.commands.probes.compatibility import run_compatibility_probe
from logitcask.engine.commands.rollout import run_rollout
from logitcask.engine.commands.score import run_score
from logitcask.engine.config.probes import (
    Compatibility,
    CompatibilityConfig,
    FewPrompts,
    KeptStore,
)
from logitcask.engine.config.prompts import Prompts
from logitcask.engine.config.sections import (
    Rollout,
    RolloutConfig,
    Run,
    ScoreConfig,
    StoreSection,
    Student,
)
from logitcask.engine.config.teacher import Score, Teacher
from logitcask.engine.probes.positions import position_report
from logitcask.engine.probes.reward import reward_report, sequence_rewards
from logitcask.engine.store import open_store

CUTS = (0, 10, 20, 30)
"""Tokens of the student's response that the teacher continues from."""
GRADED, N = 400, 2
CANDIDATES = {"post": "success", "big_post": "same", "other": "other", "big": "failure"}
"""Teacher that `probe compatibility` tries -> the run in which it teaches `base`."""
UNSTABLE = "k1"
"""The run whose entropies E12 reads: the paper finds k = 1 the least stable."""


def probe(family: Family, folder: Path, experiment: str) -> dict[str, Any]:
    """Return the measurements of E12, E13 or E14; what the folder holds is not made again."""
    file = folder / f"{experiment}.json"
    if not file.exists():
        start = time.process_time()
        made = PROBES[experiment](family, folder)
        made["cpu_s"] = time.process_time() - start
        file.write_text(json.dumps(made))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def continuations(family: Family, folder: Path) -> dict[str, Any]:
    """Measure E13: accuracy of the teacher minus that of the student, from cut responses."""
    student, teacher = load(family.path("base")), load(family.path("post"))
    problems = family.problems("evaluation", EVALUATION)
    responses = sample(student, [p.prompt for p in problems], NEW_TOKENS, family.seed + 1)
    advantages: list[tuple[float, float]] = []
    for cut in CUTS:
        long = [(p, r[:cut]) for p, r in zip(problems, responses, strict=True) if len(r) > cut]
        starts = [p.prompt + prefix for p, prefix in long]
        shares = []
        for model in (teacher, student):
            ends = sample(model, starts, NEW_TOKENS - cut, family.seed + 2)
            right = [p.solved_by(prefix + end) for (p, prefix), end in zip(long, ends, strict=True)]
            shares.append(sum(right) / len(right))
        error = math.sqrt(sum(s * (1 - s) for s in shares) / len(long))
        advantages.append((shares[0] - shares[1], error))
    fall = advantages[0][0] - advantages[-1][0]
    return {
        "continuation": advantages,
        "continuation_fall": (fall, math.hypot(advantages[0][1], advantages[-1][1])),
    }


def rewards(family: Family, folder: Path) -> dict[str, Any]:
    """Measure E14: does the mean reward of a response separate right from wrong?"""
    prompts = folder / "graded.jsonl"
    write_prompts(prompts, family.problems("evaluation", GRADED))
    section, of = StoreSection(url=str(folder / "graded")), Run(device="cpu", dtype="float32")
    run_rollout(
        RolloutConfig(
            student=Student(model=str(family.path("base"))),
            prompts=Prompts(file=prompts, chat_template=False),
            store=section,
            rollout=Rollout(n=N, max_new_tokens=NEW_TOKENS, grader="paper_task:solves"),
            run=of,
        )
    )
    areas = {}
    for key, name in (("works", "post"), ("fails", "big")):
        teacher = Teacher(model=str(family.path(name)), name=name)
        run_score(ScoreConfig(teacher=teacher, store=section, score=Score(), run=of))
        store = open_store(section.url)
        found = sequence_rewards(store, store.head(), teacher=name)
        report = reward_report(found, correct_from=1.0)
        areas[f"auroc_{key}"] = (report.auroc, report.auroc_se)
    above = {key: (area - 0.5, error) for key, (area, error) in areas.items()}
    difference = areas["auroc_works"][0] - areas["auroc_fails"][0]
    errors = math.hypot(areas["auroc_works"][1], areas["auroc_fails"][1])
    return {**above, "auroc_difference": (difference, errors), "auroc": areas}


def entropies(family: Family, folder: Path) -> dict[str, Any]:
    """Measure E12: how much more the student's entropy grows at the end of its responses.

    Growth is the largest entropy of an update minus that before the run, nats, in the last and in
    the first quarter of the positions.
    """
    store = open_store(str(folder / UNSTABLE / "store"))
    report = position_report(store, store.head(), bins=4)
    quarters = [
        [ranges[n].means["entropy/student"] or 0.0 for _, ranges in sorted(report.versions.items())]
        for n in range(4)
    ]
    growth = [max(each) - each[0] for each in quarters]
    return {"entropy_tail": (growth[-1] - growth[0], 0.0), "entropy_growth": growth}


def compatibility(family: Family, folder: Path) -> dict[str, Any]:
    """Try the teachers of `base` as before a distillation: 64 prompts, 4 responses each."""
    prompts = folder / "candidates.jsonl"
    write_prompts(prompts, family.problems("evaluation", EVALUATION))
    report = run_compatibility_probe(
        CompatibilityConfig(
            student=Student(model=str(family.path("base"))),
            compatibility=Compatibility(
                teacher_models=tuple(f"{name}={family.path(name)}" for name in CANDIDATES)
            ),
            prompts=FewPrompts(file=prompts, chat_template=False),
            store=KeptStore(url=str(folder / "candidates")),
            rollout=Rollout(max_new_tokens=NEW_TOKENS, grader="paper_task:solves"),
            run=Run(device="cpu", dtype="float32"),
        )
    )
    return {
        "assessments": {each.name: each.assessment for each in report.teachers},
        "because": {each.name: each.because for each in report.teachers},
    }


PROBES: dict[str, Callable[[Family, Path], dict[str, Any]]] = {
    "E12": entropies,
    "E13": continuations,
    "E14": rewards,
    "compatibility": compatibility,
}
"""Experiment -> its measurement, from the folder of the seed's runs."""
