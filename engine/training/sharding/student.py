"""The student of a sharded run: its load in the first process, and the whole of it at the end."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from logitcask.engine.config.training import Lora
from logitcask.engine.errors import ConfigError
from logitcask.engine.models.adapters import with_adapters
from logitcask.engine.models.attention import attention_of
from logitcask.engine.models.check import CheckedPaths
from logitcask.engine.models.forward import inner_model, rope_switch
from logitcask.engine.models.load import (
    ON_GPU,
    empty_student,
    load_model,
    load_student,
    paths_of,
)
from logitcask.engine.training.processes import on_first, rank
from logitcask.engine.training.run_dir.shards import reshard
from logitcask.engine.training.sharding import zero3
from logitcask.engine.types import ModelRef


def load_on_first(model: ModelRef, args: TrainingArguments, **options: Any) -> nn.Module:
    """Load a student in the first process, and build it without weights in the others.

    options: those of load_student. accelerate broadcasts the weights while it shards them, ZeRO-3
    here. An error of the first process is raised in all of them; ConfigError for sequences that
    shards cannot compute.
    """
    loaded: list[nn.Module] = []

    def load() -> tuple[CheckedPaths, dict[str, Tensor], str]:
        student = load_student(model, **options)
        loaded.append(student)
        return paths_of(student), dict(student.named_buffers()), attention_of(inner_model(student))

    paths, buffers, attention = on_first(load)
    student = (
        loaded[0]
        if loaded
        else empty_student(
            model, paths, buffers, attention=attention, lora=options["lora"], seed=options["seed"]
        )
    )
    check_passes(inner_model(student).config, options["length"])
    if args.fsdp_plugin_args is not None:
        # accelerate raises for a name without a layer, such as that of a family's vision tower.
        named = set(getattr(inner_model(student), "_no_split_modules", None) or ())
        args.fsdp_plugin_args["transformer_cls_names_to_wrap"] = sorted(
            named & {type(module).__name__ for module in student.modules()}
        )
    return student


def check_passes(config: Any, longest: int) -> None:
    """Raise ConfigError where some packs take more forward passes than others.

    The processes gather weights together, so each must run as many.
    """
    if longest > (switch := rope_switch(config)):
        raise ConfigError(
            f"train.sharding: the longest sequence has {longest} tokens, and beyond {switch} the "
            "LongRoPE of this student takes a second forward pass, for which the other processes "
            "of a sharded student would wait for ever",
            hint="train with --sharding none, or on sequences of at most that length",
        )


def whole_student(
    student: nn.Module,
    model: ModelRef,
    lora: Lora,
    seed: int,
    device: torch.device | None = None,
) -> nn.Module | None:
    """Return a copy of a sharded student with whole weights in float32. Every process calls this.

    device: where each process gets it; None = on the CPU of the first one, and None elsewhere: the
    others then hold one whole tensor at a time.
    """
    reshard(student)
    place = torch.device("cpu") if device is None else device
    here = device is not None or rank() == 0
    rounded = {
        name
        for name, parameter in student.named_parameters()
        if parameter.dtype != torch.float32 and not parameter.requires_grad
    }
    state: dict[str, Tensor] = {}
    found: dict[int, Tensor] = {}
    for name, tensor in student.state_dict(keep_vars=True).items():
        if name in rounded and device is None:
            continue
        # A tied weight has several names.
        if id(tensor) not in found:
            whole = _whole(tensor).detach()
            found[id(tensor)] = whole.to(place) if here else torch.empty(0)
        state[name] = found[id(tensor)]
    if not here:
        return None
    attention = attention_of(inner_model(student))
    copy = empty_student(
        model,
        paths_of(student),
        dict(student.named_buffers()),
        attention="sdpa" if device is None and attention in ON_GPU else attention,
        lora=lora,
        seed=seed,
    )
    if rounded and device is None:
        # The weights below the adapters are those of the folder.
        base = load_model(model.path, torch.float32, torch.device("cpu"))
        packed = paths_of(student).packed
        state = with_adapters(base, lora, seed, packed=packed, check=False).state_dict() | state
    copy.load_state_dict(state, assign=True)
    inner_model(copy).tie_weights()
    return copy.to(place).eval()


def _whole(tensor: Tensor) -> Tensor:
    if zero3.is_divided(tensor):
        return zero3.whole(tensor)
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole
