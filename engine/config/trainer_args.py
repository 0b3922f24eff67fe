"""Fields of transformers.TrainingArguments in one table: [train.args] passes some of them.

    PASSED       reach the Trainer, or the same in our own steps, and change no number
    RECORDED     reach the Trainer and change numbers: part of the run's identity in run.json
    OURS         set by a key of ours, which the error names
    REFUSED      have no right meaning here; the error says why

A test compares the table with the installed transformers: a new field needs a row before it passes.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from logitcask.engine.config.parse.other_names import SIMILAR
from logitcask.engine.config.section import parse_value
from logitcask.engine.errors import ConfigError

HUB = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision")
"""Fields of the push at the end of a run, which is ours: Trainer would push what is not proved."""

PASSED = frozenset(
    (
        *HUB,
        *("report_to", "run_name", "project", "save_total_limit", "torch_empty_cache_steps"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb"),
        *("ddp_broadcast_buffers", "ddp_static_graph"),
    )
)

COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
"""Fields of the compilation, which is ours: Trainer would compile the model, not its layers."""
BACKENDS = ("inductor", "aot_eager", "eager")
"""Backends of torch.compile; others compute in other numbers, or keep CUDA graphs of one length."""
MODES = ("default", "max-autotune-no-cudagraphs")
"""Modes of inductor; others record a CUDA graph for each length of a pack."""

RECORDED = frozenset(
    (
        *COMPILE,
        *("adam_epsilon", "optim_args", "lr_scheduler_kwargs", "tf32", "full_determinism"),
        "logging_first_step",
    )
)

OURS: Mapping[str, str] = {
    "output_dir": "run.out",
    "logging_dir": "run.out",
    "per_device_train_batch_size": "train.pack_length",
    "auto_find_batch_size": "train.pack_length",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "num_train_epochs": "train.num_train_epochs",
    "max_steps": "train.max_steps",
    "learning_rate": "train.learning_rate",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "warmup_steps": "train.warmup_steps",
    "warmup_ratio": "train.warmup_steps",
    "optim": "train.optim",
    "weight_decay": "train.weight_decay",
    "adam_beta1": "train.adam_beta1",
    "adam_beta2": "train.adam_beta2",
    "max_grad_norm": "train.max_grad_norm",
    "average_tokens_across_devices": "train.aggregation",
    "activation_checkpointing": "train.gradient_checkpointing",
    "activation_checkpointing_kwargs": "train.gradient_checkpointing",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "train.gradient_checkpointing",
    "fsdp": "train.sharding",
    "fsdp_config": "train.sharding",
    "deepspeed": "train.sharding",
    "bf16": "run.dtype",
    "fp16": "run.dtype",
    "use_cpu": "run.device",
    "seed": "run.seed",
    "data_seed": "run.seed",
    "train_sampling_strategy": "run.seed",
    "logging_strategy": "train.logging_steps",
    "logging_steps": "train.logging_steps",
    "save_strategy": "train.save_steps",
    "save_steps": "train.save_steps",
    "eval_strategy": "eval.every",
    "eval_steps": "eval.every",
    "eval_delay": "eval.every",
    "eval_on_start": "eval.prompts",
    "do_eval": "eval.prompts",
    "per_device_eval_batch_size": "run.batch_tokens",
}
"""Field -> our key."""

_LOADER = "the loader yields numbers of packs, and packs are made ahead by a thread of ours"
_EVAL = "evaluation is ours, by the keys of [eval]"
_LOSS = "the loss is that of train.objective"
_BEST = "a student's version counts all its updates; the eval/ lines of metrics.jsonl compare them"
_RESUME = "the same command resumes from the newest sound checkpoint, without lost or double data"
_PROGRESS = "progress and messages are ours, and metrics.jsonl holds the counts"
_PROVED = "the model that was checked would not be the one that trains"
_VERB = "the verb decides what is done"

REFUSED: Mapping[str, str] = {
    "label_smoothing_factor": _LOSS,
    "label_names": _LOSS,
    "neftune_noise_alpha": "p would be of noisy embeddings, not the distribution that was scored",
    "bf16_full_eval": _EVAL,
    "fp16_full_eval": _EVAL,
    "prediction_loss_only": _EVAL,
    "eval_do_concat_batches": _EVAL,
    "eval_use_gather_object": _EVAL,
    "eval_accumulation_steps": _EVAL,
    "include_for_metrics": _EVAL,
    "batch_eval_metrics": _EVAL,
    "use_liger_kernel": _PROVED,
    "liger_kernel_config": _PROVED,
    "use_cache": "a training step has no cache of keys and values",
    "optim_target_modules": "it belongs to GaLore and APOLLO, which are refused",
    "log_on_each_node": _PROGRESS,
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "include_num_input_tokens_seen": _PROGRESS,
    "log_level": _PROGRESS,
    "log_level_replica": _PROGRESS,
    "disable_tqdm": _PROGRESS,
    "skip_memory_metrics": "the report has the peak memory",
    "save_only_model": _RESUME,
    "save_on_each_node": "all processes share the run's folder",
    "enable_jit_checkpoint": _RESUME,
    "ignore_data_skip": _RESUME,
    "restore_callback_states_from_checkpoint": _RESUME,
    "resume_from_checkpoint": _RESUME,
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "hub_token": "the configuration is written to run.json; set HF_TOKEN in the environment",
    "hub_strategy": "only the finished folder is pushed, once it is proved",
    "hub_always_push": "only the finished folder is pushed, once it is proved",
    "accelerator_config": _LOADER,
    "dataloader_drop_last": _LOADER,
    "dataloader_num_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_multiprocessing_context": _LOADER,
    "dataloader_in_order": _LOADER,
    "remove_unused_columns": _LOADER,
    "length_column_name": _LOADER,
    "parallelism_config": "tensor, context and sequence parallelism are not supported",
    "ddp_find_unused_parameters": "every pack reaches every trained parameter",
    "debug": _PROGRESS,
    "do_train": _VERB,
    "do_predict": _VERB,
    "local_rank": "torchrun sets it",
}
"""Field -> reason."""

OPTIMIZERS: Mapping[str, str] = {
    **dict.fromkeys(
        ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"), ""
    ),
    **dict.fromkeys(
        (
            *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
            *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
            *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
            *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
        ),
        "bitsandbytes",
    ),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "torchao"),
    "grokadamw": "grokadamw",
    "stable_adamw": "torch-optimi",
}
"""Name of transformers' optimizers -> the package that it needs beyond torch."""

_BACKWARD = "it updates weights within the backward pass, before the gradient norm is known"
_AVERAGED = "it evaluates and saves an average of the weights, and a version here is the weights"
_LOW_RANK = "it projects the gradients of layers that it names itself"
REFUSED_OPTIMIZERS: Mapping[str, str] = {
    **dict.fromkeys(("lomo", "adalomo"), _BACKWARD),
    **dict.fromkeys(
        (
            *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise"),
            *("galore_adafactor_layerwise", "apollo_adamw_layerwise"),
        ),
        _BACKWARD,
    ),
    **dict.fromkeys(
        ("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw"), _LOW_RANK
    ),
    **dict.fromkeys(("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), _AVERAGED),
    "adamw_torch_xla": "it needs a TPU",
    "adamw_torch_npu_fused": "it needs an NPU",
    "adamw_anyprecision": "its package, torchdistx, is no longer developed",
}
"""Name of transformers' optimizers -> why it is refused."""


def trainer_args(given: Any) -> dict[str, Any]:
    """Return the fields of [train.args], or of `NAME=VALUE` texts.

    Raises ConfigError for a field that is ours, refused or unknown, and names the way out.
    """
    texts = [given] if isinstance(given, str) else given  # of `ablate --vary args=NAME=VALUE`
    fields = dict(given) if isinstance(given, Mapping) else _from_flags(texts)
    for name, value in fields.items():
        if name in OURS:
            raise ConfigError(f"{name} is a key of its own here", hint=f"set {OURS[name]}")
        if name in REFUSED:
            raise ConfigError(f"{name} is refused: {REFUSED[name]}", hint=f"leave {name} out")
        if name not in PASSED | RECORDED:
            raise ConfigError(
                f"{name} is no field of transformers.TrainingArguments", hint=_nearest(name)
            )
        if value is None:
            raise ConfigError(f"{name} has no value", hint=f"leave {name} out for its default")
    _check_values(fields)
    return fields


def _from_flags(texts: Iterable[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for text in texts:
        name, equals, value = str(text).partition("=")
        if not (equals and name.strip()):
            raise ConfigError(
                f"{text} is not NAME=VALUE", hint="e.g. --train-arg report_to=tensorboard"
            )
        fields[name.strip()] = parse_value(value)
    return fields


def _nearest(name: str) -> str:
    known = [*PASSED, *RECORDED, *OURS, *REFUSED]
    near = get_close_matches(str(name).lower(), known, n=1, cutoff=SIMILAR)
    if near and near[0] in OURS:
        return f"the nearest is {near[0]}, which is {OURS[near[0]]} here"
    if near:
        return f"the nearest is {near[0]}"
    return f"fields that pass: {', '.join(sorted(PASSED | RECORDED))}"


def _check_values(fields: Mapping[str, Any]) -> None:
    """Raise ConfigError for values that TrainingArguments would take and Trainer misuse."""
    names = fields.get("report_to", [])
    if "all" in ([names] if isinstance(names, str) else names):
        raise ConfigError(
            "report_to = all would report to whatever is installed",
            hint="name the trackers, such as tensorboard or wandb",
        )
    limit = fields.get("save_total_limit", 2)
    if not isinstance(limit, int) or limit < 2:
        raise ConfigError(
            f"save_total_limit = {limit!r}: a crash during a save needs the checkpoint before",
            hint="give 2 or more",
        )
    if not fields.get(COMPILE[0], False) and (alone := [k for k in COMPILE[1:] if k in fields]):
        raise ConfigError(
            f"{alone[0]} is set, and torch_compile is not", hint="set torch_compile = true"
        )
    backend = fields.get("torch_compile_backend", BACKENDS[0])
    if backend not in BACKENDS:
        raise ConfigError(
            f"torch_compile_backend = {backend!r} is not supported",
            hint=f"one of {', '.join(BACKENDS)}",
        )
    mode = fields.get("torch_compile_mode", MODES[0])
    if mode not in MODES or (mode != MODES[0] and backend != BACKENDS[0]):
        raise ConfigError(
            f"torch_compile_mode = {mode!r} is not supported"
            + ("" if backend == BACKENDS[0] else f" by {backend}"),
            hint=f"leave it out, or with inductor {MODES[1]}",
        )
    if not fields.get("push_to_hub", False) and (alone := [k for k in HUB[1:] if k in fields]):
        raise ConfigError(
            f"{alone[0]} is of a push, and push_to_hub is not set", hint="set push_to_hub = true"
        )


def check_optimizer_name(name: str) -> str:
    """Return the name of a supported optimizer; raises ConfigError for any other."""
    if name in REFUSED_OPTIMIZERS:
        raise ConfigError(
            f"{name} is refused: {REFUSED_OPTIMIZERS[name]}", hint="take another, as adamw_8bit"
        )
    if name not in OPTIMIZERS:
        longer = [each for each in OPTIMIZERS if each.startswith(name.lower())]
        near = longer or get_close_matches(name.lower(), OPTIMIZERS, n=1, cutoff=SIMILAR)
        raise ConfigError(
            f"{name} is no optimizer of transformers",
            hint=f"the nearest is {near[0]}" if near else f"one of {', '.join(OPTIMIZERS)}",
        )
    return name
