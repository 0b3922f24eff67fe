"""Estimate of the memory of a training run per process, before anything is loaded.

The student is built without data from its config.json, and one update is computed on shapes alone,
with the layers, the adapters, the checkpointing and the attention of the run. Every tensor that it
makes is counted from its making to its end. The optimizer is measured on a small parameter. So no
part is a formula by architecture; only what the kernels of the loss allocate is repeated, in fake.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

from logitcask.engine.config.training import Lora
from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.models.adapters import four_bit_layers
from logitcask.engine.models.forward import backbone, folded_head, inner_model
from logitcask.engine.training.memory.fake import (
    Live,
    Loss,
    fake_student,
    pack_edges,
)
from logitcask.engine.training.memory.shapes import LossShape, PackShape
from logitcask.kernels.linear_sparse_kl import default_chunk_rows

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes of one process; those of the interpreter and its libraries are not counted."""

    parameters: int
    trained: int
    weights: int
    gradients: int
    moments: int
    """State of the optimizer."""
    gathered: int
    """Whole weights of two layers and of the head, where shards are gathered for their use."""
    buckets: int
    """Copies of gradients: one that DistributedDataParallel exchanges, two of shards in ZeRO-3."""
    activations: int
    """Kept of the largest pack for its backward pass."""
    logits: int
    """One chunk of logits."""
    head_gradient: int
    """Dense gradient of the head, before it is added to that of the embeddings."""
    copy: int
    """Second copy of the weights: the saved model is loaded and compared."""
    pack: int
    """Tokens and targets of the largest pack, and of the next."""
    peak_update: int
    peak_optimizer: int
    peak_save: int

    @property
    def peak(self) -> int:
        """Return the bytes of the worst moment."""
        return max(self.peak_update, self.peak_optimizer, self.peak_save)


def estimate_memory(
    path: Path,
    pack: PackShape,
    loss: LossShape,
    *,
    n_vocab: int,
    args: TrainingArguments,
    lora: Lora,
    checkpointing: bool,
    world_size: int = 1,
    sharded: bool = False,
    zero3: bool = False,
    offloaded: bool = False,
) -> MemoryEstimate:
    """Estimate the memory of a run on the student in `path`, from its config.json alone.

    world_size: processes that train together; sharded: each holds a part, zero3: one of ZeRO-3;
    offloaded: the parts are on the CPU. Raises ModelError for a student whose shapes depend on
    data.
    """
    parts = world_size if sharded else 1
    half = args.bf16 and not args.use_cpu
    try:
        with fake_student(path, lora, checkpointing) as model:
            parameters = list(model.parameters())
            trained = [p for p in parameters if p.requires_grad]
            kept = whole = _bytes([*parameters, *model.buffers()])
            layers = four_bit_layers(model)
            # Each of their weights in float32, as it is saved.
            numbers = sum(each.in_features * each.out_features for each in layers)
            saved = kept + 4 * numbers - _bytes([b for each in layers for b in each.buffers()])
            if zero3 and args.bf16:
                # Each weight in bfloat16, those in training in float32 too.
                whole = kept // 2 + _bytes(trained)
            activations, update = _update(model, pack, loss, n_vocab, args, half=half, parts=parts)
            head = inner_model(model).get_output_embeddings().weight
            gathered = _gathered(model, head) if parts > 1 else 0
            head_gradient = _bytes([head]) if head.requires_grad else 0
            total, learned = (sum(p.numel() for p in x) for x in (parameters, trained))
            total += numbers
            largest = max(p.numel() for p in trained)
            gradients = _bytes(trained)
            read = pack.rows if loss.dense else int(pack.rows * loss.measured)
            states = torch.empty(read, head.shape[1], dtype=torch.bfloat16 if half else None)
            logits = min(read, default_chunk_rows(n_vocab, states)) * n_vocab * states.itemsize
    except ConfigError:
        raise
    # Architectures raise what they want where they read values of tensors.
    except Exception as error:
        raise ModelError(
            f"the memory of {path} cannot be estimated: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}",
            hint="train with --max-steps 2, and read the peak in the report",
        ) from error
    state, extra = _optimizer_bytes(args)
    # Targets: ids, four values of each, and their places; the next pack is made ahead.
    tensors = 2 * pack.rows * (pack.ids * 32 + 64)
    # Targets: ids, four values of each, and their places; the next pack is made ahead.
    tensors = 2 * pack.rows * (pack.ids * 32 + 64)
    weights, gradients = whole // parts, gradients // parts
    moments = int(state * learned) // parts
    buckets = gradients if world_size > 1 and not sharded else 2 * gradients if zero3 else 0
    here = 0 if offloaded and not args.use_cpu else weights + moments
    fixed = here + buckets + tensors
    # The first process gathers shards in the memory of the CPU, and loads the saved model there.
    copies = (2 if args.use_cpu else 0) if sharded else 1
    return MemoryEstimate(
        parameters=total,
        trained=learned,
        weights=weights,
        gradients=gradients,
        moments=moments,
        gathered=gathered,
        buckets=buckets,
        activations=activations,
        logits=logits,
        head_gradient=head_gradient,
        copy=saved,
        pack=tensors,
        peak_update=fixed + gathered + update,
        peak_optimizer=fixed + gradients + extra(learned, largest) // parts,
        peak_save=fixed + saved - kept + saved * copies,
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of tensors, shared ones once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _update(
    model: nn.Module,
    pack: PackShape,
    loss: LossShape,
    n_vocab: int,
    args: TrainingArguments,
    *,
    half: bool,
    parts: int,
) -> tuple[int, int]:
    """Return (bytes kept for the backward pass, peak of an update with its gradients).

    parts: shards of each gradient, of which one stays.
    """
    for p in model.parameters() if parts > 1 else ():
        if p.requires_grad:
            hooked: Any = p
            hooked.register_post_accumulate_grad_hook(partial(_shard_gradient, parts, {}))
    known = [*model.parameters(), *model.buffers()]
    ids = torch.zeros(1, sum(pack.lengths), dtype=torch.int64)
    edges = pack_edges(model, pack.lengths)
    kept = 0
    with Live(known) as live:
        for _ in range(min(2, args.gradient_accumulation_steps)):
            before = live.bytes
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                hidden = backbone(model)(input_ids=ids, use_cache=False, **edges)
            hidden = hidden.last_hidden_state[0]
            hidden, head = folded_head(model, hidden)
            kept = max(kept, live.bytes - before)
            if half:
                hidden = hidden.to(torch.bfloat16)
            value: Tensor = Loss.apply(hidden[: pack.rows], head, n_vocab, loss)  # type: ignore[no-untyped-call]
            del hidden, head
            value.backward()  # type: ignore[no-untyped-call]
            del value
    return kept, live.peak


def _shard_gradient(parts: int, kept: dict[str, Tensor], parameter: Tensor) -> None:
    """Keep a part of the gradient that a parameter has just got."""
    kept["shard"] = parameter.new_empty(-(-parameter.numel() // parts))
    parameter.grad = None


def _gathered(model: nn.Module, head: Tensor) -> int:
    """Return the bytes of the two largest layers, one of which comes early, and of the head."""
    names = set(getattr(inner_model(model), "_no_split_modules", None) or ())
    layers = [_bytes(list(m.parameters())) for m in model.modules() if type(m).__name__ in names]
    return sum(sorted(layers)[-2:]) + _bytes([head])


def _optimizer_bytes(args: TrainingArguments) -> tuple[float, Callable[[int, int], int]]:
    """Return (bytes of state per trained number, f: numbers, largest parameter -> bytes of a step).

    Measured on one parameter and on four: a step over all at once takes memory for all.
    """
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    side = 512
    size = side * side
    steps = []
    state = 0.0
    for count in (1, 4):
        trial = [nn.Parameter(torch.zeros(side, side, device=args.device)) for _ in range(count)]
        optimizer = kind(trial, **options)
        for _ in range(2):
            for each in trial:
                each.grad = torch.ones_like(each)
            tensors = _state(optimizer)
            grads = [each.grad for each in trial if each.grad is not None]
            with Live([*trial, *grads, *tensors]) as live:
                optimizer.step()
        steps.append(live.peak / size)
        tensors = [
            t for s in optimizer.state.values() for t in tree_leaves(s) if torch.is_tensor(t)
        ]
        state = _bytes(tensors) / (count * size)
    at_once = steps[1] > 2 * steps[0]
    return state, lambda numbers, largest: int(steps[0] * (numbers if at_once else largest))


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, Tensor)]


def rows_of(estimate: MemoryEstimate) -> list[Mapping[str, Any]]:
    """Return the table of an estimate: part, bytes and GiB."""
    names = [each.name for each in fields(estimate) if each.name not in ("parameters", "trained")]
    return [
        {"part": name.replace("_", " "), "bytes": value, "GiB": round(value / GIB, 3)}
        for name in [*names, "peak"]
        for value in [getattr(estimate, name)]
    ]
