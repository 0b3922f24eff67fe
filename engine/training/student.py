"""The student of a training, loaded onto its device or divided over the processes."""

from typing import Any

from torch import nn
from transformers import TrainingArguments

from logitcask.engine.config.training import Lora, Train
from logitcask.engine.models.load import ON_GPU, checkpoint_layers, load_student, use_on_gpu
from logitcask.engine.training.compiled import compile_layers
from logitcask.engine.training.sharding import zero3
from logitcask.engine.training.sharding.settings import is_sharded, is_zero3
from logitcask.engine.training.sharding.student import load_on_first
from logitcask.engine.types import ModelRef


def load_for_training(
    model: ModelRef,
    settings: Train,
    lora: Lora,
    args: TrainingArguments,
    *,
    attention: str | None,
    seed: int,
    length: int,
) -> nn.Module:
    """Load the student: on its device, or on the CPU for accelerate to shard it.

    attention: as of `choose_attention`; seed: of the adapters; length: tokens of the longest
    sequence.
    """
    sharded = is_sharded(args)
    options: dict[str, Any] = {
        "lora": lora,
        "seed": seed,
        "length": length,
        "attention": attention,
    }
    student = load_on_first(model, args, **options) if sharded else load_student(model, **options)
    if settings.gradient_checkpointing:
        checkpoint_layers(student, dropout=settings.dropout)
    if is_zero3(args):
        zero3.divide(student, args)
    if not sharded:
        # Before a sampler takes views of the weights: a move makes new tensors.
        student.to(args.device)
        if attention in ON_GPU:
            explicit = settings.attn_implementation != "auto"
            use_on_gpu(student, model, attention, explicit=explicit)
        if settings.args.get("torch_compile"):
            compile_layers(student, settings.args, n_vocab=model.n_vocab, bf16=args.bf16)
    return student
