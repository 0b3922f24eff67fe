"""Suggestions for an unknown name: a key that other libraries call so, else a similar spelling."""

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches

SIMILAR = 0.7
"""Least similarity (difflib) of a suggestion: a bad one is worse than the list of all names."""

OTHER_NAMES: Mapping[str, str] = {
    "student.model": "student student_model actor_model model_name_or_path model_name model_path "
    "base_model pretrained_model_name_or_path",
    "teacher.model": "teacher_model teacher_model_name_or_path teacher_path model_name_or_path "
    "model_name model_path base_url",
    "teacher.name": "teacher_name",
    "prompts.file": "dataset dataset_name dataset_path data data_path train_file train_files",
    "prompts.limit": "max_samples max_prompts num_prompts max_train_samples num_examples",
    "prompts.split": "dataset_split train_split dataset_train_split",
    "prompts.subset": "dataset_config dataset_config_name config_name",
    "prompts.prompt_column": "prompt_key prompt_field input_key text_column messages_column "
    "dataset_text_field",
    "prompts.answer_column": "answer_key answer_field label_key",
    "prompts.system_prompt": "system_message default_system",
    "prompts.chat_template": "apply_chat_template",
    "store.url": "cache cache_dir store_path store_dir",
    "rollout.max_new_tokens": "max_tokens max_completion_length max_response_length "
    "response_length max_length max_output_tokens",
    "rollout.n": "num_generations num_samples num_return_sequences n_samples",
    "rollout.top_k": "sample_top_k",
    "rollout.student_topk": "student_k student_top_k logprobs",
    "score.teacher_topk_max": "k_max top_logprobs num_logprobs prompt_logprobs logprobs top_k topk",
    "score.teacher_topk_min": "k_min",
    "score.teacher_top_p": "top_p",
    "score.selection": "entry_kind",
    "score.teacher_kind": "role",
    "score.extra_ids": "at",
    "score.foreign_eos": "eos_rows",
    "train.objective": "loss loss_type kl kl_type kl_penalty divergence distillation_loss",
    "train.loss_topk": "k topk top_k loss_top_k",
    "train.learning_rate": "lr",
    "train.lr_scheduler_type": "schedule scheduler lr_scheduler lr_schedule",
    "train.warmup_steps": "warmup num_warmup_steps lr_warmup_steps warmup_ratio",
    "train.adam_beta1": "beta1",
    "train.adam_beta2": "beta2",
    "train.max_grad_norm": "grad_clip clip_grad gradient_clipping clip_grad_norm",
    "train.num_train_epochs": "epochs num_epochs total_epochs",
    "train.max_steps": "steps num_steps max_train_steps total_training_steps",
    "train.pack_length": "per_device_train_batch_size train_batch_size batch_size micro_batch_size "
    "max_seq_length max_seq_len max_length sequence_len cutoff_len tokens_per_batch",
    "train.gradient_accumulation_steps": "accumulation grad_accum gradient_accumulation "
    "accumulate_grad_batches",
    "train.save_steps": "save_freq save_interval save_every",
    "train.logging_steps": "log_steps log_interval log_every",
    "train.metrics_fraction": "metric_share",
    "train.metrics_steps": "metrics_every metric_steps",
    "train.staleness_action": "hard_bound",
    "train.snapshot": "pin",
    "train.allow_off_lineage": "foreign_student",
    "lora.r": "lora lora_rank lora_dim",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "lora_target lora_modules lora_target_modules",
    "lora.modules_to_save": "lora_modules_to_save",
    "train.optim": "optimizer optimizer_type",
    "train.args": "training_args trainer_args report_to wandb_project logger trackers",
    "eval.every": "eval_steps eval_interval test_freq",
    "work.worker": "watch",
    "work.max_attempts": "attempts retries max_retries",
    "work.lease_seconds": "lease",
    "run.out": "output output_dir save_dir save_path default_local_dir",
    "run.overwrite": "overwrite_output_dir force",
    "run.dtype": "torch_dtype precision bf16 fp16",
    "run.batch_tokens": "tokens_per_batch max_num_batched_tokens per_device_eval_batch_size "
    "eval_batch_size batch_size",
}
"""Our key -> its names in transformers, TRL, verl, vLLM, axolotl and earlier versions of ours."""


def keys_named(name: str) -> list[str]:
    """Return our keys for a name of another library, written with - or _."""
    plain = name.lower().replace("-", "_")
    return [key for key, others in OTHER_NAMES.items() if plain in others.split()]


def suggest(name: str, known: Collection[str], same: Iterable[str] = ()) -> str:
    """Return the known names that `name` may mean, as the text of a hint; empty without any.

    same: names of the same thing, of which the known ones are suggested first.
    """
    if found := [each for each in same if each in known]:
        return f"{name} is {' or '.join(found)} here"
    # Without sections, which would make all keys of one similar.
    spelled = {each.lower().rpartition(".")[2]: each for each in known}
    near = get_close_matches(name.lower().rpartition(".")[2], spelled, n=1, cutoff=SIMILAR)
    return f"the nearest is {spelled[near[0]]}" if near else ""
