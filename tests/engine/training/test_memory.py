"""The estimate of a training's memory: numbers that follow from the shapes."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from transformers import LlamaConfig

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Lora, Train
from logitcask.engine.errors import ModelError
from logitcask.engine.objectives import parse_objective
from logitcask.engine.packing.plan import Lengths, PlanKey, make_plan
from logitcask.engine.training.memory.estimate import MemoryEstimate, estimate_memory, rows_of
from logitcask.engine.training.memory.shapes import (
    LossShape,
    PackShape,
    largest_pack,
    loss_shape,
)
from logitcask.engine.training.settings import training_arguments

LAYERS, WIDTH, INNER, VOCAB = 4, 64, 128, 1000
LENGTHS = (100, 60)
TOKENS = sum(LENGTHS)


def estimate(
    tmp_path: Path,
    *,
    lora: Lora | None = None,
    tie: bool = False,
    world: int = 1,
    dtype: Literal["auto", "bfloat16"] = "auto",
    **train: Any,
) -> MemoryEstimate:
    LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        tie_word_embeddings=tie,
    ).save_pretrained(tmp_path)
    settings = Train(**train)
    plain = settings.model_copy(update={"sharding": "none"})
    return estimate_memory(
        tmp_path,
        PackShape(lengths=LENGTHS, rows=TOKENS // 2, ids=80),
        LossShape(dense=True, measured=1.0),
        n_vocab=VOCAB,
        args=training_arguments(plain, Run(out=tmp_path / "out", device="cpu", dtype=dtype)),
        lora=lora or Lora(),
        checkpointing=settings.gradient_checkpointing,
        world_size=world,
        sharded=settings.sharding != "none",
        zero3=settings.sharding == "zero3",
    )


def test_weights_gradients_and_moments_follow_from_the_shapes(tmp_path: Path) -> None:
    layer = 4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH
    inner = LAYERS * layer + WIDTH
    found = estimate(tmp_path)
    assert found.parameters == found.trained == inner + 2 * VOCAB * WIDTH
    assert estimate(tmp_path, tie=True).parameters == inner + VOCAB * WIDTH
    assert 0 <= found.weights - 4 * found.parameters < 1000, "and buffers of the rotary embedding"
    assert found.gradients == found.head_gradient + 4 * (inner + VOCAB * WIDTH)
    assert found.head_gradient == 4 * VOCAB * WIDTH
    assert found.moments == pytest.approx(8 * found.trained, rel=1e-4)
    assert found.logits == 4 * VOCAB * TOKENS // 2
    assert found.peak_optimizer >= 16 * found.trained
    assert found.peak_update >= 12 * found.trained + found.activations + found.logits
    assert found.peak_save >= 16 * found.trained
    assert found.peak == max(found.peak_update, found.peak_optimizer, found.peak_save)


@pytest.mark.parametrize(
    ("optim", "per_number"),
    [("sgd", 0), ("adagrad", 4), ("adafactor", 0.02), ("adamw_torch", 8)],
)
def test_moments_are_those_of_the_optimizer(optim: str, per_number: float, tmp_path: Path) -> None:
    found = estimate(tmp_path, optim=optim)
    assert found.moments == pytest.approx(per_number * found.trained, rel=0.02, abs=1e4)
    if optim == "adamw_torch":
        fused = estimate(tmp_path)
        assert found.peak_optimizer >= fused.peak_optimizer + 4 * VOCAB * WIDTH, "temporaries"


def test_activations_grow_by_layers_and_tokens_and_go_with_checkpointing(tmp_path: Path) -> None:
    """Count the inputs of each product in a layer; only its own input when it is checkpointed."""
    whole, again = estimate(tmp_path), estimate(tmp_path, gradient_checkpointing=True)
    state = 4 * TOKENS * WIDTH  # one tensor of hidden states
    kept_of_layer = whole.activations / LAYERS / state
    # Two norms with two inputs each, q, k, v, rotated q and k, output: twelve at least; and three
    # of the inner width.
    assert 12 + 3 * INNER / WIDTH < kept_of_layer < 30 + 4 * INNER / WIDTH
    assert LAYERS * state <= again.activations <= (LAYERS + 8) * state
    assert again.peak_update < whole.peak_update
    # The second pack of an update finds the gradients of the first.
    more = estimate(tmp_path, gradient_accumulation_steps=2)
    assert more.peak_update >= whole.weights + whole.moments + whole.gradients + whole.activations


@pytest.mark.needs("peft")
def test_adapters_alone_have_gradients(tmp_path: Path) -> None:
    found = estimate(tmp_path, lora=Lora(r=2))
    layer = 4 * 2 * 2 * WIDTH + 3 * 2 * (WIDTH + INNER)
    assert found.trained == LAYERS * layer
    assert found.gradients == 4 * found.trained
    assert found.head_gradient == 0
    assert found.peak_update < 4 * found.parameters * 2 + found.activations + found.logits


def test_processes_hold_copies_of_the_gradients(tmp_path: Path) -> None:
    alone, two = estimate(tmp_path), estimate(tmp_path, world=2)
    assert (alone.buckets, two.buckets) == (0, alone.gradients)
    assert two.peak == alone.peak + alone.gradients
    table = {str(row["part"]): row["bytes"] for row in rows_of(two)}
    assert table["peak"] == two.peak
    assert table["head gradient"] == two.head_gradient


def test_shards_divide_weights_gradients_and_moments(tmp_path: Path) -> None:
    alone, four = estimate(tmp_path), estimate(tmp_path, world=4, sharding="fsdp2")
    for part in ("weights", "gradients", "moments"):
        assert getattr(four, part) == pytest.approx(getattr(alone, part) / 4, rel=0.01), part
    assert (four.buckets, four.activations) == (0, alone.activations)
    layer = 4 * (4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH)
    assert four.gathered == pytest.approx(2 * layer + four.head_gradient, rel=0.02)
    assert four.peak_update < alone.peak_update - alone.gradients // 2
    assert four.peak_save >= 2 * alone.weights + four.weights + four.moments, "the first process"
    whole = four.gathered + four.activations + four.logits
    assert four.peak_update > four.weights + four.moments + whole
    half = estimate(tmp_path, world=4, sharding="zero3", dtype="bfloat16")
    assert half.weights == pytest.approx(1.5 * four.weights, rel=0.01), "a copy in bfloat16"
    assert half.moments == four.moments
    assert half.buckets == 2 * four.gradients, "those that DeepSpeed keeps"


def test_a_student_that_reads_values_of_tensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such"}')
    with pytest.raises(ModelError, match="cannot be estimated"):
        estimate_memory(
            tmp_path,
            PackShape(lengths=(3,), rows=1, ids=1),
            LossShape(dense=True, measured=1.0),
            n_vocab=9,
            args=training_arguments(Train(), Run(out=tmp_path / "out", device="cpu")),
            lora=Lora(),
            checkpointing=False,
        )


def test_the_pack_is_the_one_with_most_tokens() -> None:
    lengths = [
        Lengths(
            seg_id="s",
            prompt_ids=("a",),
            seq_prompt=np.zeros(4, np.int64),
            prompt=np.array([5, 5, 5, 5]),
            response=np.array([10, 40, 30, 0]),
        )
    ]
    key = PlanKey(
        snapshot=1,
        snapshot_sha256="",
        rollouts="main",
        teacher="t",
        seed=0,
        epochs=1,
        pack_length=60,
    )
    plan = make_plan(key, lengths)
    found = largest_pack(plan, lengths, 80)
    assert largest_pack(plan, lengths, 80, 3).rows == 3 * found.rows, "of three teachers"
    assert (sorted(found.lengths), found.rows) == ([15, 45], 50)


def test_the_loss_reads_all_logits_where_its_objective_does() -> None:
    shapes = {
        name: loss_shape(parse_objective(name).objective, Train(metrics_fraction=0.25))
        for name in ("forward_kl", "overlap", "opd")
    }
    assert shapes["forward_kl"] == LossShape(dense=True, measured=1.0)
    assert shapes["overlap"].dense is False
    assert {shapes["overlap"].measured, shapes["opd"].measured} <= {0.25, 1.0}


@pytest.mark.needs("peft")
def test_weights_in_4_bits_are_counted_and_saved_as_plain_numbers(tmp_path: Path) -> None:
    plain, four = (estimate(tmp_path, lora=Lora(r=2, load_in_4bit=bits)) for bits in (False, True))
    numbers = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * INNER)
    assert four.parameters == plain.parameters
    # Half a byte each, a scale of 4 bytes for 64, and 16 values of 4 bytes in each of the layers.
    assert plain.weights - four.weights == numbers * 4 - numbers * 9 // 16 - LAYERS * 7 * 64
    assert (four.trained, four.moments) == (plain.trained, plain.moments)
    assert four.peak_save == plain.peak_save
