"""Held-out rows: numbers equal to plain torch, and measurements without side effects."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Train
from logitcask.engine.errors import IdentityError, IncompleteError
from logitcask.engine.metrics.metrics import COMMON_METRICS
from logitcask.engine.models.load import load_student
from logitcask.engine.packing.source import PackSource
from logitcask.engine.store import Store
from logitcask.engine.training.evaluation.held_out import HeldOutSet, hold_out
from logitcask.engine.training.train import train
from logitcask.engine.types import ModelRef
from tests.engine.cached import make_store, make_unit
from tests.engine.fitting import REVERSE, make_case, token_mean

LENGTHS = [9, 4, 0, 7, 2, 8]
SETTINGS = Train(learning_rate=1e-3, pack_length=48, save_steps=2)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, ModelRef, Store]:
    """Return the training store, the student and the store of held-out rows."""
    folder = tmp_path_factory.mktemp("case")
    store, model = make_case(folder, [make_unit(s, vocab=99, lengths=LENGTHS) for s in range(2)])
    others = [make_unit(7 + s, vocab=99, lengths=LENGTHS) for s in range(2)]
    return store, model, make_store(folder / "other", others, student=model)


def held_out_set(store: Store, **change: int) -> HeldOutSet:
    return HeldOutSet(store=store, rollouts="main", teacher="big", **change)


def test_the_loss_is_the_token_mean_of_plain_torch(
    case: tuple[Store, ModelRef, Store],
) -> None:
    _, model, other = case
    evaluator = hold_out(held_out_set(other), model, REVERSE, 48)
    student = load_student(model).train()
    line = evaluator.line(student)
    source = PackSource(other, other.head(), "main", "big")
    singles = [
        source.pack(np.array([[o, s]])) for o in range(2) for s, n in enumerate(LENGTHS) if n
    ]
    expected = float(token_mean(student, singles).detach())
    assert line["eval/loss"] == pytest.approx(expected, rel=1e-5)
    assert line["eval/rows"] == 2 * sum(LENGTHS)
    assert {name.removeprefix("eval/") for name in line} == {"loss", "rows", *COMMON_METRICS}
    assert student.training, "the mode is restored"
    assert all(p.grad is None for p in student.parameters())


def test_measuring_changes_no_update(case: tuple[Store, ModelRef, Store], tmp_path: Path) -> None:
    store, model, other = case
    runs = {
        name: train(
            store,
            model=model,
            run=Run(out=tmp_path / name, device="cpu"),
            teacher="big",
            objective=REVERSE,
            settings=SETTINGS,
            held_out=held_out,
        )
        for name, held_out in (("a", None), ("b", held_out_set(other, every=1)))
    }
    ours, theirs = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    updates = runs["b"].updates
    lines = runs["b"].evaluations
    assert [line["progress/step"] for line in lines] == [*range(updates + 1)]
    assert len({line["eval/loss"] for line in lines}) == updates + 1
    with pytest.raises(IdentityError, match=r"eval\.held_out\.every = 1, not 2"):
        train(
            store,
            model=model,
            run=Run(out=tmp_path / "b", device="cpu"),
            teacher="big",
            objective=REVERSE,
            settings=SETTINGS,
            held_out=held_out_set(other, every=2),
        )


def test_rows_that_are_masked_are_not_measured(
    case: tuple[Store, ModelRef, Store], tmp_path: Path
) -> None:
    _, model, _ = case
    unit = make_unit(3, vocab=99, lengths=LENGTHS)
    mask = np.zeros_like(unit.rollouts.loss_mask)
    masked = replace(unit, rollouts=replace(unit.rollouts, loss_mask=mask))
    store = make_store(tmp_path / "s", [masked], student=model)
    with pytest.raises(IncompleteError, match="no held-out row is counted"):
        hold_out(held_out_set(store), model, REVERSE, 48).line(load_student(model))
    no_response = make_store(
        tmp_path / "t", [make_unit(4, vocab=99, lengths=[0] * 6)], student=model
    )
    with pytest.raises(IncompleteError, match="hold no response token"):
        hold_out(held_out_set(no_response), model, REVERSE, 48)
