"""One update is the gradient of the token mean over all its rows, for every packing."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GraniteConfig, GraniteForCausalLM

from logitcask.engine.errors import IncompleteError, ModelError
from logitcask.engine.models.check import CheckedPaths, check_paths
from logitcask.engine.models.forward import folded_head
from logitcask.engine.models.load import hidden_states
from logitcask.engine.objectives import Bounds, Objective
from logitcask.engine.objectives import objective as objective_module
from logitcask.engine.objectives.divergences import DIVERGENCES, forward_kl, reverse_kl
from logitcask.engine.objectives.objective import ALLOWED_COMBINATIONS
from logitcask.engine.packing.source import Pack, PackSource
from logitcask.engine.packing.targets import Targets
from logitcask.engine.training.pack_loss import pack_loss
from logitcask.engine.training.trainer import DistillTrainer
from tests.engine.cached import make_unit
from tests.engine.fitting import (
    DENSE,
    FORWARD,
    REVERSE,
    WEIGHED,
    ListPacks,
    flat,
    make_case,
    make_trainer,
    relative,
    token_mean,
)
from tests.engine.tiny import make_model

UNEVEN = [12, 3, 1, 9, 5, 0, 17, 8]
PACKED = [[0, 1], [2], [3, 4], [6, 7]]
"""Sequences of the four rows of one update: 15, 1, 14 and 25 response tokens."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PackSource:
    units = [make_unit(0, prompts=4, vocab=99, lengths=UNEVEN)]
    store, _ = make_case(tmp_path_factory.mktemp("case"), units)
    return PackSource(store, store.head(), "main", "big")


def pack(source: PackSource, sequences: list[int]) -> Pack:
    return source.pack(np.array([[0, s] for s in sequences]).reshape(-1, 2))


def reference(source: PackSource, objective: Objective = REVERSE) -> tuple[float, torch.Tensor]:
    model = make_model().double()
    alone = [pack(source, [s]) for row in PACKED for s in row]
    loss = token_mean(model, alone, objective)
    loss.backward()
    return float(loss.detach()), flat({name: p.grad for name, p in model.named_parameters()})


def one_update(
    source: PackSource, folder: Path, packed: list[list[int]], **change: Any
) -> tuple[float, torch.Tensor]:
    rows = ListPacks([pack(source, row) for row in packed], source)
    trainer, gradients = make_trainer(
        make_model().double(), rows, folder, accumulation=len(packed), **change
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"], flat(gradients.updates[0])


@pytest.mark.parametrize("objective", [REVERSE, FORWARD], ids=["reverse", "forward"])
def test_an_update_of_packed_rows_is_the_token_mean_of_separate_sequences(
    source: PackSource, tmp_path: Path, objective: Objective
) -> None:
    expected_loss, expected = reference(source, objective)
    loss, grad = one_update(source, tmp_path, PACKED, objective=objective)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative(grad, expected) < 1e-6


@pytest.mark.parametrize("same", [REVERSE, DENSE], ids=["renormalize", "tail"])
def test_a_divergence_without_a_kernel_trains_with_its_torch_function(
    source: PackSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: Objective
) -> None:
    function = {"reverse_kl": reverse_kl, "forward_kl": forward_kl}[same.divergence]
    cell = (same.support, "new", same.tail, same.estimator)
    monkeypatch.setitem(DIVERGENCES, "new", function)
    monkeypatch.setattr(objective_module, "ALLOWED_COMBINATIONS", ALLOWED_COMBINATIONS | {cell})
    expected_loss, expected = one_update(source, tmp_path / "kernel", PACKED, objective=same)
    new = replace(same, divergence="new")
    loss, grad = one_update(source, tmp_path / "new", PACKED, objective=new)
    assert loss == expected_loss
    assert torch.equal(grad, expected)


def test_pack_loss_alone_is_the_update_of_its_rows(source: PackSource, tmp_path: Path) -> None:
    """Use modifiers with row weights, which a user's training loop has no trainer for."""
    members = [0, 2, 4, 6]
    expected_loss, expected = one_update(source, tmp_path, [members], objective=WEIGHED)
    row, model = pack(source, members), make_model().double()
    states = hidden_states(model, row.input_ids, row.position_ids)[row.predict_at]
    head = folded_head(model, states)[1]
    result = pack_loss(WEIGHED, states, head, row.targets, n_vocab=99)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(expected_loss, rel=1e-6)
    assert relative(flat({name: p.grad for name, p in model.named_parameters()}), expected) < 1e-6
    plain = pack_loss(REVERSE, states.detach(), head.detach(), row.targets, n_vocab=99)
    assert plain.loss.item() != pytest.approx(expected_loss, rel=1e-2)


HEADS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "scale": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 0.25}),
    "soft cap": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"final_logit_softcapping": 2.0, "head_dim": 16},
    ),
}


@pytest.mark.parametrize(("kind", "config", "keys"), HEADS.values(), ids=HEADS)
def test_a_head_with_a_scale_or_a_soft_cap_is_trained_through_it(
    source: PackSource, tmp_path: Path, kind: Any, config: Any, keys: dict[str, Any]
) -> None:
    def make_head() -> Any:
        torch.manual_seed(0)
        return kind(
            config(
                vocab_size=99,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                initializer_range=0.3,
                attn_implementation="sdpa",
                **keys,
            )
        ).double()

    assert check_paths(make_head(), 99) == CheckedPaths()
    model = make_head()
    token_mean(model, [pack(source, [s]) for row in PACKED for s in row]).backward()
    expected = flat({name: p.grad for name, p in model.named_parameters()})
    rows = ListPacks([pack(source, row) for row in PACKED], source)
    trainer, gradients = make_trainer(make_head(), rows, tmp_path, accumulation=len(PACKED))
    trainer.train()
    assert relative(flat(gradients.updates[0]), expected) < 1e-6


def test_accumulation_equals_one_big_row(source: PackSource, tmp_path: Path) -> None:
    loss, grad = one_update(source, tmp_path / "four", PACKED)
    whole, big = one_update(source, tmp_path / "one", [[s for row in PACKED for s in row]])
    assert loss == pytest.approx(whole, rel=1e-6)
    assert relative(grad, big) < 1e-6


@pytest.mark.parametrize("aggregation", ["sequence-mean", "sequence-sum"])
def test_sequences_count_equally_for_every_packing(
    source: PackSource, tmp_path: Path, aggregation: str
) -> None:
    model = make_model().double()
    sequences = [s for row in PACKED for s in row]
    losses = [token_mean(model, [pack(source, [s])]) for s in sequences]
    lengths = [1 if aggregation == "sequence-mean" else UNEVEN[s] for s in sequences]
    mean = sum(n * x for n, x in zip(lengths, losses, strict=True)) / len(sequences)
    mean.backward()
    expected = flat({name: p.grad for name, p in model.named_parameters()})
    for place, packed in (("four", PACKED), ("one", [sequences])):
        loss, grad = one_update(source, tmp_path / place, packed, aggregation=aggregation)
        assert loss == pytest.approx(float(mean.detach()), rel=1e-6)
        assert relative(grad, expected) < 1e-6


def test_modifiers_of_sequences_and_batches_do_not_depend_on_the_packing(
    source: PackSource, tmp_path: Path
) -> None:
    big = [[s for row in PACKED for s in row]]
    loss, grad = one_update(source, tmp_path / "four", PACKED, objective=WEIGHED)
    whole, same = one_update(source, tmp_path / "one", big, objective=WEIGHED)
    assert loss == pytest.approx(whole, rel=1e-6)
    assert relative(grad, same) < 1e-6
    assert relative(grad, reference(source)[1]) > 0.1, "and they have an effect"


def test_a_bound_stops_a_run_or_skips_rows(source: PackSource, tmp_path: Path) -> None:
    live = replace(REVERSE, support="overlap")

    def rows() -> ListPacks:
        return ListPacks([pack(source, row) for row in PACKED], source)

    trainer, _ = make_trainer(
        make_model(), rows(), tmp_path / "stop", objective=live, bounds=Bounds(action="stop")
    )
    with pytest.raises(
        IncompleteError, match=r"cache/coverage = 0\.\d+ is under --min-coverage 0.8"
    ):
        trainer.train()
    trainer, gradients = make_trainer(
        make_model(), rows(), tmp_path / "skip", objective=live, bounds=Bounds(action="skip")
    )
    trainer.train()
    # A random model has little of its mass on a few scored ids.
    assert trainer.state.log_history[0]["cache/skipped_share"] == 1.0
    assert flat(gradients.updates[0]).abs().max() == 0.0


def test_a_loss_that_trainer_scales_again_would_be_a_quarter(
    source: PackSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = reference(source)
    monkeypatch.setattr(DistillTrainer, "loss_is_scaled_for_ga", False)
    _, grad = one_update(source, tmp_path, PACKED)
    assert float(grad.norm() / expected.norm()) == pytest.approx(1 / 4, rel=1e-5)


def test_empty_rows_change_nothing(source: PackSource, tmp_path: Path) -> None:
    _, expected = reference(source)
    loss, grad = one_update(source, tmp_path, [[], *PACKED, [], []])
    assert relative(grad, expected) < 1e-6
    assert loss > 0


def test_an_update_of_nothing_has_gradients_of_zero(source: PackSource, tmp_path: Path) -> None:
    rows = ListPacks([], source)
    trainer, gradients = make_trainer(make_model(tie=False), rows, tmp_path, accumulation=2)
    trainer.train()
    for name, grad in gradients.updates[0].items():
        assert grad is not None, name
        assert torch.count_nonzero(grad) == 0, name
    assert trainer.state.log_history[0]["loss"] == 0


def test_rows_of_weight_zero_leave_loss_and_divisor(source: PackSource, tmp_path: Path) -> None:
    def masked(row: Pack) -> Pack:
        weight = (torch.arange(len(row.targets)) % 3 != 0).float()
        fields = {n: getattr(row.targets, n) for n in Targets.__dataclass_fields__}
        return replace(row, targets=Targets(**{**fields, "weight": weight}))

    alone = [masked(pack(source, [s])) for s in (0, 3, 6)]
    model = make_model().double()
    token_mean(model, alone).backward()
    expected = flat({name: p.grad for name, p in model.named_parameters()})
    trainer, gradients = make_trainer(
        make_model().double(), ListPacks(alone, source), tmp_path, accumulation=3
    )
    trainer.train()
    assert relative(flat(gradients.updates[0]), expected) < 1e-6
    kept = sum(int(row.targets.weight.sum()) for row in alone)
    assert trainer.state.log_history[0]["progress/positions"] == kept < sum(UNEVEN)


def test_prompts_get_no_loss_rows(source: PackSource) -> None:
    row = pack(source, [0, 3])
    lengths = source.lengths()[0]
    prompts = [int(lengths.prompt[s]) for s in (0, 3)]
    second = prompts[0] + 12
    expected = [*range(prompts[0] - 1, second - 1)]
    expected += [*range(second + prompts[1] - 1, second + prompts[1] + 9 - 1)]
    assert row.predict_at.tolist() == expected


class Shifted(ListPacks):
    """Packs that read the hidden state `by` positions after the one that predicts the row."""

    by = 0

    def pack(self, index: int) -> Pack:
        row = super().pack(index)
        last = row.input_ids.shape[1] - 1
        return replace(row, predict_at=(row.predict_at + self.by).clamp(0, last))


@pytest.mark.parametrize(("by", "learns"), [(0, True), (-1, False), (1, False)])
def test_a_row_reads_the_state_before_its_token(tmp_path: Path, by: int, learns: bool) -> None:
    # Tokens are independent, the teacher's distribution is a function of the token before, and a
    # model without layers knows one token only: just one alignment can be learnt.
    rng = np.random.default_rng(0)
    unit = make_unit(1, prompts=6, vocab=99, lengths=[48] * 12)
    store, _ = make_case(tmp_path, [unit])
    source = PackSource(store, store.head(), "main", "big")
    row = source.pack(np.array([[0, s] for s in range(12)]))
    table = torch.log_softmax(3 * torch.from_numpy(rng.normal(size=(99, 4))).float(), -1)
    before = row.input_ids[0, row.predict_at]
    fields = {n: getattr(row.targets, n) for n in Targets.__dataclass_fields__}
    count = len(before)
    learnable = {
        "ids": torch.arange(4).repeat(count, 1),
        "q_log_p": table[before],
        "q_rank": torch.arange(4).repeat(count, 1),
        "in_student": torch.zeros(count, 4, dtype=torch.bool),
        "cached": torch.ones(count, 4, dtype=torch.bool),
        "token_col": torch.zeros(count, dtype=torch.int64),
    }
    rows = Shifted([replace(row, targets=Targets(**{**fields, **learnable}))] * 40, source)
    rows.by = by
    trainer, _ = make_trainer(
        make_model(layers=0, tie=False), rows, tmp_path, updates=40, objective=FORWARD, lr=0.1
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history]
    assert (losses[-1] < 0.1 * losses[0]) is learns, (losses[0], losses[-1])
    if not learns:
        assert losses[-1] > 0.25 * losses[0]


def test_rows_are_prepared_once_per_update_after_the_previous_update(
    source: PackSource, tmp_path: Path
) -> None:
    model = make_model()
    seen: list[tuple[str, int, float]] = []

    class Recording(ListPacks):
        def prepare(self, step: int) -> Sequence[str]:
            seen.append(("prepare", step, float(next(model.parameters()).detach().sum())))
            return super().prepare(step)

        def pack(self, index: int) -> Pack:
            seen.append(("row", index, 0.0))
            return super().pack(index)

    rows = Recording([pack(source, row) for row in PACKED], source)
    trainer, _ = make_trainer(model, rows, tmp_path, updates=2, accumulation=2)
    trainer.train()
    assert [entry[:2] for entry in seen] == [
        ("prepare", 0),
        ("row", 0),
        ("row", 1),
        ("prepare", 1),
        ("row", 2),
        ("row", 3),
    ]
    assert seen[0][2] != seen[3][2], "the first update came before the second round was prepared"


def test_a_loss_that_is_not_finite_ends_the_run(source: PackSource, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        next(model.parameters())[:] = math.inf
    trainer, _ = make_trainer(model, ListPacks([pack(source, [0])], source), tmp_path)
    with pytest.raises(ModelError, match=r"update 1: loss nan"):
        trainer.train()


def test_a_dense_objective_trains_the_whole_head(source: PackSource, tmp_path: Path) -> None:
    _, grad = one_update(source, tmp_path, PACKED, objective=DENSE)
    assert float((grad != 0).float().mean()) > 0.99
