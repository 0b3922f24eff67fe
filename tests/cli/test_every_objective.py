"""Every objective trains from one store that was sampled and scored once."""

import json
from typing import Any

import pytest

from logitcask.engine.objectives import PRESETS
from logitcask.engine.objectives.modifiers import MODIFIERS
from tests.cli.conftest import ROLL, World
from tests.engine.tiny import N_VOCAB

MODIFIED = {
    "extrapolate": "sampled_token+extrapolate(factor=1.1)",
    "adaptive_target": "overlap+adaptive_target(beta=0.2)",
    "entropy_gate": "opd+entropy_gate(nats=0.1)",
    "prune": "opd+prune(overlap=0.5)",
    "stepwise": "forward_kl+stepwise(tokens=2)",
    "keep_entropy": "gkd+keep_entropy(share=0.3)",
    "clip": "opd_released(weights=teacher_p)+clip",
    "ce": "opd+ce+reward(std=true)",
}
SOAK_ALONE = ("mixed_kl", "skew_kl", "skew_reverse_kl", "alpha_divergence")
"""They differ from teacher_topk and gkd in the divergence alone."""
SOAK_ALONE += ("alm", "gold", "gold_bayesian", "simct", "x_token")
"""They differ from uld in the function of spans."""
ELSEWHERE = ("reward", "return_to_go", "fixed")
"""In MODIFIED or in a preset."""
OTHERS = {name: f"sampled_token+{name}" for name in MODIFIERS if name not in ELSEWHERE}


def even(prompt: Any, response: str) -> float:
    """Return a reward."""
    return float(len(response) % 2 == 0)


@pytest.fixture(scope="module")
def store(world: World) -> str:
    """Store rollouts with draws, full teacher and base scores, and a teacher's own draws."""
    name = world.new("all")
    score_flags = (
        f"--teacher-topk-min {N_VOCAB} --teacher-topk-max {N_VOCAB} --device cpu --store {name}"
    )
    grader = "--grader tests.cli.test_every_objective:even"
    assert world(f"{ROLL} {name} --student-topk 16 --mc-draws 4 {grader}") == 0
    assert world(f"score --model @teacher --teacher big --extra-ids mc {score_flags}") == 0
    assert (
        world(
            f"score --model @other-teacher --teacher base --teacher-kind base "
            f"--extra-ids mc {score_flags}"
        )
        == 0
    )
    drawn = "--selection sampled --draws 8 --device cpu"
    assert world(f"score --model @teacher --teacher drawn {drawn} --store {name}") == 0
    return name


def test_a_staleness_bound_skips_or_stops(world: World, call: Any) -> None:
    out = world.new("out")
    train = f"train --model @student --store {world.store()} --out {out} --objective overlap"
    result = call(
        f"{train} --loss-topk 4 --staleness-action skip --min-coverage 1 --lr 1e-3 --device cpu"
    )
    assert result.code == 0
    assert "gave no gradient; sample and score again" in result.err
    recorded = json.loads((world.at(out) / "run.json").read_text())["rescore"]
    assert 0 < recorded["skipped"] <= recorded["positions"]
    stopped_run = call(
        f"{train} --loss-topk 4 --staleness-action stop --min-coverage 1 --device cpu --overwrite"
    )
    stopped_run.assert_error(3, "is under --min-coverage 1.0", "sample and score again")
    refused = call(f"{train} --staleness-action resample --device cpu --overwrite")
    refused.assert_error(2, "nothing samples during a training on stored scores", "skip or stop")


@pytest.mark.parametrize(
    "objective",
    [
        *(
            pytest.param(name, marks=pytest.mark.needs("soak")) if name in SOAK_ALONE else name
            for name in PRESETS
        ),
        *(OTHERS | MODIFIED).values(),
    ],
)
def test_every_objective_trains_from_one_store(
    world: World, call: Any, store: str, objective: str
) -> None:
    out = world.new("out")
    teacher = "drawn" if objective == "rs_kd" else "big"
    base = "--base base" if "exopd" in objective or "extrapolate" in objective else ""
    result = call(
        f"train --model @student --store {store} --teacher {teacher} {base} --out {out} "
        f"--objective {objective} --pack-length 64 --lr 1e-3 --device cpu --format json"
    )
    assert result.code == 0, result.err
    assert result.json["updates"] >= 1
    lines = [
        json.loads(line) for line in (world.at(out) / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(line["train/grad_norm"] > 0 for line in lines)
    assert all(line["train/changed_share"] > 0.5 for line in lines)
    if objective == MODIFIED["ce"]:
        for line in lines:  # the mean over tokens of the parts with their weights
            parts = line["loss/distill"] + 0.1 * line["loss/ce"] + line["loss/reward"]
            assert line["loss"] == pytest.approx(parts, rel=1e-5, abs=1e-6)
    recorded = json.loads((world.at(out) / "run.json").read_text())
    assert f"estimator: {recorded['exactness']['estimator']}" in result.err
    assert set(recorded["exactness"]) == {"scores", "support", "estimator", "prefixes", "notes"}
