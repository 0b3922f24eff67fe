"""A teacher that returns top-k log-probs only, compared with the same teacher with full logits.

Both score one store, and a student trains on the scores. An objective has the same values for both
if its ids are among the returned ones; if it reads the tail, they differ by the unresolved mass.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.returned import RESOLVED
from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Train
from logitcask.engine.errors import ConfigError, ObjectiveError
from logitcask.engine.metrics.metrics import TEACHER_WIDTH
from logitcask.engine.objectives import (
    PRESETS,
    check_exactness,
    current_topk,
    parse_objective,
    row_objective,
)
from logitcask.engine.objectives.presets import ROW_PRESETS
from logitcask.engine.packing.source import PackSource
from logitcask.engine.packing.targets import Targets
from logitcask.engine.rollout.plan import rollout
from logitcask.engine.rollout.unit import RolloutRequest
from logitcask.engine.score.plan import score
from logitcask.engine.score.unit import ScoreRequest
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.inspect import list_segments, show_sequence
from logitcask.engine.store.verify import verify
from logitcask.engine.training.cache_info import cache_info
from logitcask.engine.training.train import train
from logitcask.engine.types import ModelRef, Prompt, SamplingParams, ScoreParams
from logitcask.kernels.objective_input import SparseLoss
from logitcask.kernels.sparse_kl import sparse_kl
from tests.engine.score.scored import ref
from tests.engine.tiny import N_VOCAB, make_model, save_folder
from tests.engine.training.returned_topk import TopKTeacher

PROMPTS = [Prompt(id=f"p{i}", token_ids=tuple(range(3 + 5 * i, 8 + 6 * i))) for i in range(4)]
REQUEST = ScoreParams(entry_kind="topk", k_min=64, k_max=64)
"""64 of 99 ids."""
RETURNED = replace(REQUEST, entry_kind="topp", top_p=1.0)
"""An equivalent request with another unit key: two names may not share the units of a teacher."""
ALONE = replace(REQUEST, at_student=False)
UNSUPPORTED = {"rs_kd": "drawn ids", "full_vocab": "every id"}
"""Presets that no such teacher can serve."""


SPREAD = {"flat": 0.3, "sure": 1.0}
"""Of the teacher's weights: all tails of the flat one are resolved, few of the sure one."""


@pytest.fixture(scope="module", params=SPREAD)
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ModelRef]:
    root = tmp_path_factory.mktemp(request.param)
    spread = SPREAD[request.param]
    networks = {
        "student": make_model(seed=0),
        "teacher": make_model(seed=1, hidden=48, spread=spread),
        "base": make_model(seed=2),
    }
    return {name: ref(save_folder(root / name, model)) for name, model in networks.items()}


@pytest.fixture(scope="module")
def sure(models: dict[str, ModelRef]) -> bool:
    return models["teacher"].path.parent.name.startswith("sure")


@pytest.fixture(scope="module")
def store(models: dict[str, ModelRef], tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return a store with scores of one teacher, in units of two prompts.

    `all` are from its logits, `returned` by its best 64 ids and the requested ones, `whole` by its
    best 64 alone.
    """
    store = open_store(tmp_path_factory.mktemp("store") / "s", create=True)
    rollout(
        RolloutRequest(
            store=store,
            model=models["student"],
            sampler=HF(models["student"]),
            prompts=PROMPTS,
            sampling=SamplingParams(n=2, max_new_tokens=16),
            student_k=16,
            mc_draws=8,
            unit_prompts=2,
        )
    )
    hf = HF(models["teacher"])
    requests: dict[str, Any] = {
        "all": {"scorer": hf, "params": REQUEST, "extra_ids": "mc"},
        "returned": {"scorer": TopKTeacher(hf), "params": RETURNED, "extra_ids": "mc"},
        "whole": {"scorer": TopKTeacher(hf, at_ids=False), "params": ALONE},
        "base": {
            "scorer": HF(models["base"]),
            "params": REQUEST,
            "extra_ids": "mc",
            "role": "base",
        },
    }
    for name, keys in requests.items():
        model = models["base" if name == "base" else "teacher"]
        score(ScoreRequest(store=store, model=model, teacher_name=name, profile="raw32", **keys))
    return store


def targets_of(store: Store, name: str) -> Targets:
    source = PackSource(store, store.head(), "main", name, base="base")
    units = source.lengths()
    replicas = [(u, s) for u, each in enumerate(units) for s in range(len(each.response))]
    return source.pack(np.array(replicas)).targets


def logits_of(rows: Targets) -> Tensor:
    """Return logits [P, V] in float64 of a student that is none of these models."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(rows), N_VOCAB, generator=generator).double() * 2


def loss_and_grad(store: Store, name: str, preset: str) -> tuple[SparseLoss, Tensor]:
    """Return losses and metrics, and the gradient by the student's logits [P, V]."""
    rows = targets_of(store, name)
    objective = parse_objective(preset).objective
    z = logits_of(rows).requires_grad_()
    k = current_topk(objective, N_VOCAB)
    result = sparse_kl(z, rows.ids, row_objective(objective, rows), k=k)
    result.loss.backward()
    assert z.grad is not None
    return result, z.grad


def test_a_store_holds_the_scores_of_both(store: Store, sure: bool) -> None:
    layouts = {
        (row["name"], row["layout"]) for row in list_segments(store) if row["kind"] == "score"
    }
    assert {("all", "dedup"), ("returned", "dedup+bounds"), ("whole", "full+bounds")} <= layouts
    verify(store, deep=True)
    exact, returned, whole = (targets_of(store, name) for name in ("all", "returned", "whole"))
    assert exact.q_entropy_hi is None
    for rows in (returned, whole):
        assert rows.q_entropy_hi is not None
        assert (rows.q_entropy <= exact.q_entropy + 1e-5).all()
        assert (exact.q_entropy <= rows.q_entropy_hi + 1e-5).all()
    assert torch.equal(exact.ids, returned.ids)
    assert torch.equal(exact.q_rank, returned.q_rank)
    torch.testing.assert_close(returned.q_log_p, exact.q_log_p, rtol=1e-5, atol=1e-5)
    off = (returned.q_log_tail.double().exp() - exact.q_log_tail.double().exp()).abs()
    assert off.max() < 2 * RESOLVED
    # More requested ids give a narrower interval.
    assert returned.q_entropy_hi is not None
    assert whole.q_entropy_hi is not None
    width, wider = returned.q_entropy_hi - returned.q_entropy, whole.q_entropy_hi - whole.q_entropy
    assert width.mean() <= wider.mean()
    resolved = exact.q_log_tail.exp() > RESOLVED
    if sure:
        assert resolved.float().mean() < 0.1
        assert wider.max() < 1e-4
    else:
        assert resolved.all()
        assert wider.mean() > 1e-3


def test_an_entropy_interval_is_shown(store: Store) -> None:
    which: dict[str, Any] = {"rollouts": "main", "sequence": 0, "top": 3}
    for row in show_sequence(store, teacher="whole", **which)["rows"]:
        assert row["teacher_entropy"] <= row["teacher_entropy_hi"]
    assert "teacher_entropy_hi" not in show_sequence(store, teacher="all", **which)["rows"][0]


@pytest.mark.parametrize("name", sorted(ROW_PRESETS.keys() - UNSUPPORTED.keys()))
def test_every_objective_has_the_same_values_for_both(store: Store, name: str) -> None:
    ours, grad = loss_and_grad(store, "returned", name)
    exact, exact_grad = loss_and_grad(store, "all", name)
    scale = exact_grad.norm()
    if name == "vopd_cached":
        # Its baseline does not affect the mean: the tail adds a multiple of d log p(y).
        rows = targets_of(store, "all")
        score = -logits_of(rows).softmax(-1)
        score[torch.arange(len(rows)), rows.token] += 1
        off = grad - exact_grad
        share = (off * score).sum(-1, keepdim=True) / (score * score).sum(-1, keepdim=True)
        assert (off - share * score).norm() < 1e-6 * scale
    else:
        tail = PRESETS[name].objective.tail == "bucket" or name == "eopd"
        # q log(q / p) of a bucket with q below RESOLVED and p above e^-10; otherwise float32.
        unresolved = RESOLVED * (10 - math.log(RESOLVED)) if tail else 0.0
        off = 5e-6 if tail else 1e-6
        if name == "alpha_divergence":  # 4 sqrt(q p) of it, as its label says
            unresolved, off = 4 * math.sqrt(RESOLVED), 4 * math.sqrt(RESOLVED)
        torch.testing.assert_close(ours.row_loss, exact.row_loss, rtol=1e-6, atol=1e-5 + unresolved)
        assert (grad - exact_grad).norm() < off * scale
    for each in exact.metrics:
        if each.startswith(("overlap/", "cache/")):
            torch.testing.assert_close(
                ours.metrics[each], exact.metrics[each], rtol=1e-5, atol=1e-5, msg=each
            )
    low, high = ours.metrics["entropy/gap"], exact.metrics["entropy/gap"]
    assert (low <= high + 1e-5).all()
    assert (ours.metrics[TEACHER_WIDTH] >= 0).all()


@pytest.mark.parametrize("name", ["overlap", "teacher_topk", "forward_kl"])
def test_a_teacher_without_requested_ids_trains(
    store: Store, models: dict[str, ModelRef], tmp_path: Path, name: str
) -> None:
    settings = Train(learning_rate=1e-3, pack_length=96, gradient_accumulation_steps=2)
    report = train(
        store,
        model=models["student"],
        run=Run(out=tmp_path / "out", device="cpu"),
        teacher="whole",
        objective=parse_objective(name),
        settings=settings,
    )
    assert report.updates > 0
    lines = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines
    assert all(line[TEACHER_WIDTH] > 0 for line in lines)
    labels = json.loads((tmp_path / "out" / "run.json").read_text())["exactness"]
    assert any("its entropy is an interval" in note for note in labels["notes"])


def test_objectives_on_the_students_ids_are_refused_with_a_hint(
    store: Store, models: dict[str, ModelRef], tmp_path: Path
) -> None:
    source = PackSource(store, store.head(), "main", "whole")
    info = cache_info(models["student"], source, False)
    assert info.entropy_bounds
    assert not info.at_student
    for name in ("opd", "opd_released"):
        with pytest.raises(
            ObjectiveError, match="lack the teacher's log-probs at the student's ids"
        ) as caught:
            check_exactness(PRESETS[name], info)
        assert "--objective overlap" in caught.value.hint
    with pytest.raises(ObjectiveError, match="lack the teacher's log-probs at the student's ids"):
        train(
            store,
            model=models["student"],
            run=Run(out=tmp_path, device="cpu"),
            teacher="whole",
            objective=PRESETS["opd"],
            settings=Train(learning_rate=1e-3),
        )
    exact = PackSource(store, store.head(), "main", "all")
    assert not cache_info(models["student"], exact, False).entropy_bounds


def test_a_scorer_without_at_ids_gets_no_request_for_ids(
    store: Store, models: dict[str, ModelRef]
) -> None:
    scorer = TopKTeacher(HF(models["teacher"]), at_ids=False)
    which: dict[str, Any] = {"model": models["teacher"], "scorer": scorer}
    with pytest.raises(ConfigError, match="cannot give at_ids"):
        ScoreRequest(store=store, teacher_name="refused", params=REQUEST, **which)
    drawn = ScoreParams(entry_kind="sampled", draws=5, at_student=False)
    with pytest.raises(ConfigError, match="cannot give drawn"):
        ScoreRequest(store=store, teacher_name="refused", params=drawn, **which)
    assert "refused" not in store.head().names("score")
