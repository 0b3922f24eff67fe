"""Parameters under DeepSpeed's ZeRO-3: divided flat, in equal parts with padding at the end.

A parameter that is divided has `ds_id`; its own data is empty but while a module that uses it runs.
DeepSpeed keeps the float32 weights of this process's parts in flat tensors, and its optimizer has a
state for each of those.
"""

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from logitcask.engine.errors import ConfigError
from logitcask.engine.models.forward import inner_model
from logitcask.engine.training.processes import rank

WEIGHT = "weight"
LINEAR = nn.functional.linear
"""DeepSpeed replaces it by one that frees the weights between forward and backward pass."""


def check_package() -> None:
    """Raise ConfigError where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "train.sharding = zero3 needs the package deepspeed",
            hint='pip install --no-build-isolation "deepspeed>=0.19"',
        )


def configuration(cpu: bool) -> dict[str, Any]:
    """Return the configuration of DeepSpeed; transformers completes what is auto."""
    if cpu:
        # DeepSpeed would look for a GPU, and report on standard output that there is none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        # Sums of gradients, over processes and over micro-batches.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            # Whole weights are freed after each use: DeepSpeed would keep a billion of them.
            "stage3_max_reuse_distance": 0,
        },
    }


def load_models_whole() -> None:
    """Let transformers load models as usual: it would divide all of them from now on.

    A teacher, a sampler or the copy that proves a save is loaded by one process alone.
    """
    from transformers.integrations import deepspeed

    integration: Any = deepspeed
    integration.unset_hf_deepspeed_config()


def divide(student: Any, args: TrainingArguments) -> None:
    """Divide the parameters of a student over the processes; the first one's weights count.

    In a run that computes in bfloat16 DeepSpeed would train on from rounded weights, so the first
    process keeps the trained ones, for `restore`.
    """
    import deepspeed  # pyright: ignore[reportMissingImports]
    from deepspeed.utils import logger  # pyright: ignore[reportMissingImports]

    logger.setLevel(logging.ERROR)
    # DeepSpeed calls them for each exchange.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if args.use_cpu:
        # No op counts as compatible then: the exchange by shared memory compiles for minutes.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    deepspeed.init_distributed()
    config: Any = args.hf_deepspeed_config
    config.trainer_config_finalize(args, inner_model(student), 0)
    exact: dict[str, Tensor] = {}
    student.exact_weights = exact
    for name, parameter in student.named_parameters() if args.bf16 else ():
        if rank() != 0:
            parameter.data = torch.empty(parameter.shape, dtype=torch.bfloat16)
            continue
        if parameter.requires_grad:
            exact[name] = parameter.detach()
        parameter.data = parameter.data.to(torch.bfloat16)
    # One parameter after the other goes to the device, is broadcast, and is divided.
    deepspeed.zero.Init(module=student, config_dict_or_path=config.config)
    student.to(args.device)  # its buffers: the parameters are empty


@torch.no_grad()
def restore(student: Any, *, resumed: bool) -> None:
    """Set the trained weights to the float32 ones that `divide` kept in the first process.

    resumed: forget them instead, since a checkpoint follows.
    """
    exact: dict[str, Tensor] = vars(student).pop("exact_weights")
    for name, parameter in () if resumed else student.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            whole = torch.empty(parameter.ds_shape, device=parameter.ds_tensor.device)
            if rank() == 0:
                whole.copy_(exact.pop(name))
            torch.distributed.broadcast(whole, 0)
            start, local = states(parameter)[WEIGHT]
            local.copy_(whole.flatten()[start : start + local.numel()])
            written(parameter)


def restore_linear() -> None:
    """Undo the replacement of torch's linear for the models of later calls."""
    nn.functional.linear = LINEAR


def is_divided(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def shape_of(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter."""
    whole: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return whole


def _place(parameter: Any) -> tuple[Any, Tensor, int, int, int]:
    """Return (DeepSpeed's optimizer, flat tensor, its start, first element, elements)."""
    zero = parameter._z3_optimizer
    group, start, size = zero.grad_position[zero.get_param_id(parameter)]
    first = min(size * rank(), parameter.ds_numel)
    count = min(size, parameter.ds_numel - first)
    return zero, zero.fp32_partitioned_groups_flat[group], start, first, count


def states(parameter: Tensor) -> dict[str, tuple[int, Tensor]]:
    """Return kind -> (first element, elements) of this process: float32 weights, and moments.

    Elements [E] are views; a scalar [] is that of all processes.
    """
    zero, flat, start, first, count = _place(parameter)
    found = {WEIGHT: flat, **zero.optimizer.state.get(flat, {})}
    return {
        kind: (first, tensor.detach()[start : start + count] if tensor.ndim else tensor.clone())
        for kind, tensor in found.items()
    }


def add_state(parameter: Tensor, kind: str, scalar: Tensor | None) -> None:
    """Add a state to the optimizer before its first step: a scalar, or zeros for `states`."""
    zero, flat, *_ = _place(parameter)
    state = zero.optimizer.state[flat]
    if scalar is not None:
        moved = any(g.get("fused") or g.get("capturable") for g in zero.optimizer.param_groups)
        state[kind] = scalar.to(flat.device) if moved else scalar
    elif kind not in state:
        state[kind] = torch.zeros_like(flat, requires_grad=False)


def written(parameter: Any) -> None:
    """Make a parameter what its float32 weights are, after these were written."""
    _, local = states(parameter)[WEIGHT]
    if parameter.ds_status.name == "AVAILABLE":
        parameter.partition()
    parameter.ds_tensor[: local.numel()].copy_(local)


def in_order(optimizer: Any) -> Iterator[nn.Parameter]:
    """Yield the parameters of an optimizer, in the order of its saved states."""
    # DeepSpeed has emptied the groups of the optimizer that it was given.
    zero = getattr(optimizer, "optimizer", optimizer)
    for group in getattr(zero, "trainable_param_groups", optimizer.param_groups):
        yield from group["params"]


def whole(parameter: Tensor) -> Tensor:
    """Return the whole of a parameter in float32; every process calls this.

    One that is not trained may have been rounded to bfloat16.
    """
    import deepspeed  # pyright: ignore[reportMissingImports]
    from deepspeed.utils import safe_get_full_fp32_param  # pyright: ignore[reportMissingImports]

    if not parameter.requires_grad:
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()
    found: Tensor = safe_get_full_fp32_param(parameter)
    return found


def is_kept_divided(parameter: Any) -> bool:
    """Return True for a divided parameter that is empty here, or too small to be freed."""
    if not is_divided(parameter):
        return False
    return parameter.ds_status.name == "NOT_AVAILABLE" or bool(parameter.ds_persist)
