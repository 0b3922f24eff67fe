"""Evaluation: its numbers, which a run computes once."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from logitcask.engine.backends.hf import HF
from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Train
from logitcask.engine.errors import GraderError, IdentityError
from logitcask.engine.models.forward import inner_model
from logitcask.engine.store import Store
from logitcask.engine.training.evaluation.responses import EvalPlan, evaluate, standard_error
from logitcask.engine.training.run import TrainReport
from logitcask.engine.training.train import train
from logitcask.engine.types import (
    LENGTH,
    STOP,
    ModelRef,
    Prompt,
    Rollouts,
    SamplingParams,
)
from tests.engine.cached import make_unit
from tests.engine.fitting import REVERSE, make_case

SETTINGS = Train(learning_rate=1e-3, pack_length=96, save_steps=2)
PROMPTS = [Prompt(id=f"e{i}", token_ids=(5 + i, 6, 7)) for i in range(5)]


def share_of_even_ids(prompt: Prompt, text: str) -> float:
    ids = [int(word) for word in text.split()]
    return sum(i % 2 == 0 for i in ids) / max(1, len(ids))


def make_plan(sampler: Callable[[Any], Any], **change: Any) -> EvalPlan:
    fields: dict[str, Any] = {
        "prompts": PROMPTS,
        "sampling": SamplingParams(n=3, temperature=0.7, top_p=0.95, max_new_tokens=8),
        "grader": share_of_even_ids,
        "grader_name": "even",
        "decode": lambda ids: " ".join(map(str, ids)),
        "sampler": sampler,
    }
    return EvalPlan(**(fields | change))


class FixedSampler:
    """A sampler with fixed responses: two prompts, two each."""

    def generate(self, prompts: Any, sampling: Any, **_: Any) -> Rollouts:
        return Rollouts(
            prompts=tuple(prompts),
            seq_prompt=np.array([0, 0, 1, 1], np.uint32),
            seq_off=np.array([0, 1, 3, 4, 4]),
            tokens=np.array([2, 2, 3, 5], np.uint32),
            loss_mask=np.ones(4, np.uint16),
            b_lp=np.zeros(4, np.float32),
            finish=np.array([STOP, LENGTH, STOP, STOP], np.uint16),
            version_start=np.zeros(4, np.int64),
            version_end=np.zeros(4, np.int64),
        )

    def describe(self) -> dict[str, str]:
        return {}


def test_numbers_worked_by_hand() -> None:
    """Grade [[1, 1/2], [0, 0]]: the first rewards are 1 and 0, the means 3/4 and 0."""
    plan = make_plan(lambda _: FixedSampler(), prompts=PROMPTS[:2], sampling=SamplingParams(n=2))
    report = evaluate(FixedSampler(), plan, version=0)
    assert (report.prompts, report.n) == (2, 2)
    assert (report.accuracy, report.avg_at_n) == (0.5, 0.375)
    # Deviations of 1/2 and 3/8 on both sides of the mean, each over sqrt(2 - 1) and sqrt(2).
    assert report.accuracy_se == pytest.approx(0.5)
    assert report.avg_at_n_se == pytest.approx(0.375)
    assert (report.mean_length, report.stopped_share) == (1.0, 0.75)
    assert standard_error(np.array([0.3])) is None


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, ModelRef]:
    units = [make_unit(i, prompts=2, vocab=99, lengths=[30, 24, 17, 36]) for i in range(4)]
    return make_case(tmp_path_factory.mktemp("case"), units)


def plan_of(model: ModelRef, **change: Any) -> EvalPlan:
    return make_plan(lambda s: HF(model, dtype="float32", network=inner_model(s)), **change)


def run(case: tuple[Store, ModelRef], out: Path, **change: Any) -> TrainReport:
    store, model = case
    fields: dict[str, Any] = {
        "model": model,
        "run": Run(out=out, device="cpu"),
        "teacher": "big",
        "objective": REVERSE,
        "settings": SETTINGS,
        "evaluation": plan_of(model, every=2),
    }
    return train(store, **(fields | change))


def evaluations(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "loss" not in line]
    for line in found:
        assert line.pop("eval/seconds") > 0
    return found


def test_the_same_model_gets_the_same_report(case: tuple[Store, ModelRef]) -> None:
    _, model = case
    sampler = HF(model, device="cpu")
    report = evaluate(sampler, plan_of(model), version=0)
    assert report == evaluate(sampler, plan_of(model), version=0)
    assert report != evaluate(sampler, plan_of(model), version=1)
    assert 0 < report.avg_at_n < 1


def test_evaluation_changes_no_update_and_is_recorded_in_the_folder(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    _, model = case
    plain = run(case, tmp_path / "a", evaluation=None)
    evaluated = run(case, tmp_path / "b")
    assert plain.evaluations == ()
    assert {k: v for k, v in evaluated.last.items() if "/" not in k} == {
        k: v for k, v in plain.last.items() if "/" not in k
    }
    ours, theirs = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    n = evaluated.updates
    steps = [line["progress/step"] for line in evaluated.evaluations]
    assert steps == sorted({*range(0, n, 2), n})
    recorded = json.loads((tmp_path / "b" / "run.json").read_text())["evaluations"]
    assert recorded == list(evaluated.evaluations)
    first, last = evaluated.evaluations[0], evaluated.evaluations[-1]
    before = evaluate(HF(model, device="cpu"), plan_of(model), version=0).line()
    trained = HF(tmp_path / "b", device="cpu", n_vocab=model.n_vocab, stop_ids=model.stop_ids)
    after = evaluate(trained, plan_of(model), version=n).line()
    assert {k: first[k] for k in before} == before
    assert {k: last[k] for k in after} == after


class Cancelled(Exception):
    pass


def test_a_resumed_run_evaluates_nothing_twice(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    _, model = case
    graded: list[str] = []

    def counting(prompt: Prompt, text: str) -> float:
        graded.append(prompt.id)
        return share_of_even_ids(prompt, text)

    def stop(stage: str, done: int, *_: Any) -> None:
        if (stage, done) == ("train", 3):
            raise Cancelled

    straight = run(case, tmp_path / "a")
    plan = plan_of(model, grader=counting, every=2)
    with pytest.raises(Cancelled):
        run(case, tmp_path / "b", evaluation=plan, progress=stop)
    assert [line["progress/step"] for line in evaluations(tmp_path / "b")] == [0, 2]
    resumed = run(case, tmp_path / "b", evaluation=plan)
    once = len(straight.evaluations) * len(PROMPTS) * 3
    assert (resumed.resumed_at, len(graded)) == (2, once)
    assert evaluations(tmp_path / "b") == evaluations(tmp_path / "a")
    again = run(case, tmp_path / "b", evaluation=plan)
    assert (again.evaluations, len(graded)) == (resumed.evaluations, once)
    assert again.last == resumed.last


def test_another_evaluation_is_another_run(case: tuple[Store, ModelRef], tmp_path: Path) -> None:
    _, model = case
    run(case, tmp_path)
    for change in ({"every": 0}, {"grader_name": "odd"}, {"prompts": PROMPTS[:4]}):
        key = next(iter(change)).removesuffix("_name")
        with pytest.raises(IdentityError, match=f"eval.{key}"):
            run(case, tmp_path, evaluation=plan_of(model, **{"every": 2, **change}))
    with pytest.raises(IdentityError, match="eval"):
        run(case, tmp_path, evaluation=None)


def test_a_grader_that_fails_stops_the_run_before_its_first_update(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    _, model = case

    def broken(prompt: Prompt, text: str) -> float:
        raise GraderError("on prompt 'e0'", hint="mend it")

    with pytest.raises(GraderError):
        run(case, tmp_path, evaluation=replace(plan_of(model), grader=broken))
    assert (tmp_path / "metrics.jsonl").read_text() == ""
