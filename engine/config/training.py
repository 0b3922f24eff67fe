"""Sections of learning and measuring."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from logitcask.engine.config.prompts import GRADER_MEANINGS, Columns
from logitcask.engine.config.section import Name, Names, Positive, Section, Share
from logitcask.engine.config.teacher import TeacherMix
from logitcask.engine.config.trainer_args import check_optimizer_name, trainer_args
from logitcask.engine.errors import ConfigError
from logitcask.engine.types import SamplingParams


class Train(TeacherMix):
    teacher: Names | None = Field(
        None,
        description="Scores to train on; may be left out when the store has one teacher. "
        "VALUE=NAME,VALUE=NAME trains the prompts of each value of --teacher-field on a teacher of "
        "their own, NAME=WEIGHT,NAME=WEIGHT every prompt on the mean of the teachers' losses, "
        "NAME+NAME with equal weights.",
    )
    teacher_field: str | None = Field(
        None,
        description="Key of the prompts file whose value chooses the teacher of a prompt, for "
        "example domain.",
    )
    base: Name | None = Field(
        None,
        description="Scores of the model that the teacher was made "
        "from (score --teacher-kind base), for "
        "objectives that look at them.",
    )
    snapshot: str | None = Field(
        None,
        description="Log number or tag of the store to train on; default: the newest when the run "
        "begins. `logitcask store snapshot` shows it.",
    )
    objective: str = Field(
        "overlap",
        description="Preset of the loss, with fields or modifiers as in gkd(parameter=0.1) or "
        "sampled_token+importance(cap=5); `logitcask objectives` shows all.",
    )
    loss_topk: Positive | None = Field(
        None, description="Size of the objective's top-k support; default: the preset's own."
    )
    optim: Annotated[str, AfterValidator(check_optimizer_name)] = Field(
        "adamw_torch_fused",
        description="Optimizer, by transformers' name: adamw_torch, adafactor, sgd, adagrad, "
        "rmsprop, or with their packages adamw_8bit and others of bitsandbytes, adamw_torch_8bit "
        "of torchao.",
    )
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="Learning rate after the warm-up."
    )
    warmup_steps: int = Field(0, ge=0, description="Updates over which the rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0, description="The optimizer's weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="First-moment decay of Adam's kind.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Second-moment decay of them.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    num_train_epochs: Positive = Field(1, description="Passes over the rollouts of the snapshot.")
    max_steps: Positive | None = Field(
        None,
        description="Stop after so many optimizer updates, for a trial run; default: all of the "
        "epochs. The learning-rate schedule ends there too.",
    )
    pack_length: Positive | None = Field(
        None,
        description="Tokens of one pack, prompts included: one forward pass. Bounds memory. "
        "Default: 1/64 of the tokens of the rollouts, so that a small store makes many updates "
        "too; the longest sequence at least, 16384 at most. distill: 16384.",
    )
    gradient_accumulation_steps: Positive = Field(
        1, description="Packs per optimizer update and process; the loss is their token mean."
    )
    metrics_fraction: Share | None = Field(
        None,
        description="Share of the positions with metrics, for objectives whose loss does not need "
        "the whole vocabulary; others take them of all. Default: about 32 positions of an update, "
        "1/16 of the first and the last and with --staleness-action stop.",
    )
    metrics_steps: Positive | None = Field(
        None,
        description="Updates from one with metrics to the next, for the same objectives. Default: "
        "40, less in runs of under 800; 1 with --metrics-fraction or --staleness-action stop.",
    )
    attn_implementation: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = Field(
        "auto",
        description="Attention of transformers; auto = flash attention where it is installed and "
        "the run is bfloat16 on a GPU, else sdpa or eager sequence by sequence.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute activations twice: less memory, about a third more time.",
    )
    save_steps: Positive = Field(100, description="Updates between checkpoints.")
    save_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Type of the weights of the saved student; auto = bfloat16 where the student "
        "was in bfloat16 before, else float32. Training and checkpoints are float32 in any case.",
    )
    keep_checkpoints: bool = Field(
        False,
        description="Keep the checkpoints of a finished run, from which a damaged result is "
        "repaired; otherwise they are removed once the student is saved.",
    )
    logging_steps: Positive = Field(1, description="Updates per line of metrics.jsonl.")
    aggregation: Literal["token-mean", "sequence-mean", "sequence-sum"] = Field(
        "token-mean",
        description="Of an update's losses: over all tokens, or over sequences the mean of their "
        "means or of their sums. With the last two a token of a long response counts less or more.",
    )
    dropout: bool = Field(
        False,
        description="Train with the dropout and the router noise of the student's configuration. "
        "Then p of the loss is another distribution than the one that was sampled and scored.",
    )
    staleness_action: Literal["off", "skip", "stop", "resample"] = Field(
        "off",
        description="Beyond --min-coverage or --max-drift, whichever the objective depends on: "
        "only warn, give a position no gradient, end the run (exit code 3) by an update's mean, or "
        "(distill alone) delete a unit by its mean before the first update of its round: the "
        "newest student samples it again.",
    )
    min_coverage: float = Field(
        0.80,
        ge=0,
        le=1,
        description="Least share of the current student's mass that must have a score, for "
        "supports that depend on the student.",
    )
    max_drift: float = Field(
        0.2,
        gt=0,
        description="Largest approximate KL (k3, nats) between the student that sampled and the "
        "current one, for objectives on sampled ids.",
    )
    sharding: Literal["none", "fsdp2", "zero3"] = Field(
        "none",
        description="Divide weights, gradients and moments over the processes of torchrun or "
        "`accelerate launch`, so that each holds its share: fsdp2 = by torch, zero3 = by "
        "DeepSpeed; none = whole in each.",
    )
    cpu_offload: bool = Field(
        False,
        description="Keep the shards of fsdp2 in the memory of the CPU between their uses: slow.",
    )
    partial: bool = Field(False, description="Train although some units have no scores yet.")
    allow_off_lineage: bool = Field(
        False,
        description="Allow a stored student support although another model made the rollouts.",
    )
    args: Annotated[dict[str, Any], BeforeValidator(trainer_args)] = Field(
        {},
        description="Any other field of transformers.TrainingArguments, as report_to=tensorboard, "
        "adam_epsilon=1e-6 or push_to_hub=true; repeatable. Fields that have a key of their own "
        "here, or no right meaning, are refused.",
    )

    @model_validator(mode="after")
    def _looks_at_every_update(self) -> Self:
        """Refuse a bound that would miss updates."""
        if self.staleness_action == "stop" and (self.metrics_steps or 1) > 1:
            raise ConfigError(
                "metrics_steps > 1: staleness_action = stop needs the metrics of every update",
                hint="leave --metrics-steps out",
            )
        return self


def _names(given: Any) -> Any:
    """Split the text of a flag into names; a regular expression stays text."""
    if isinstance(given, str) and given != "all-linear":
        parts = [part.strip() for part in given.split(",")]
        if all(re.fullmatch(r"[\w.]+", part) for part in parts):
            return tuple(parts)
    return tuple(given) if isinstance(given, list) else given


class Lora(Section):
    """Low-rank adapters, in the names of `peft.LoraConfig`."""

    r: int = Field(
        0,
        ge=0,
        description="Rank of LoRA adapters that are trained in place of all weights; 0 = off. The "
        "saved model has them merged.",
    )
    alpha: Positive | None = Field(
        None, description="LoRA scale times the rank; default: twice the rank."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout of the adapters' input in training."
    )
    target_modules: Annotated[str | tuple[str, ...], BeforeValidator(_names)] = Field(
        "all-linear",
        description="Layers with adapters: all-linear = every linear layer but the head, last "
        "parts of names divided by commas, as q_proj,v_proj, or a regular expression of names.",
    )
    modules_to_save: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (),
        description="Last parts of the names of modules that are trained whole, with the "
        "adapters, divided by commas, such as norm,lm_head.",
    )
    use_rslora: bool = Field(
        False, description="Divide the scale by the root of the rank (arXiv 2312.03732)."
    )
    use_dora: bool = Field(
        False, description="Train the magnitudes of the weights too (DoRA, arXiv 2402.09353)."
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="Biases of the model that are trained too."
    )
    load_in_4bit: bool = Field(
        False,
        description="Keep the weights without adapters in 4 bits (NF4; QLoRA, arXiv 2305.14314). "
        "That is another distribution than the student's that sampled: cache/approx_kl has the "
        "difference from the first update on. The saved folder has the 4-bit values as plain "
        "numbers, with the adapters merged.",
    )
    save_adapter: bool = Field(
        False,
        description="Save the adapters too, in OUT/adapter, for peft and vLLM on the base model; "
        "the folder itself always holds the merged model.",
    )

    @model_validator(mode="after")
    def _needs_a_rank(self) -> Self:
        """Refuse settings of adapters that are off."""
        names = list(self.model_dump(exclude={"r"}, exclude_defaults=True))
        if names and not self.r:
            raise ConfigError(
                f"lora.{names[0]} is set, and lora.r = 0 trains all weights without adapters",
                hint="set lora.r (--lora-r 16), or leave the other keys of [lora] out",
            )
        if self.load_in_4bit and self.use_dora:
            raise ConfigError(
                "lora.use_dora with lora.load_in_4bit: DoRA reads the weights themselves",
                hint="leave one of them out",
            )
        return self


class Eval(SamplingParams, Columns):
    prompts: Path | None = Field(
        None,
        description="Evaluate on these prompts, in any form that `rollout --prompts` takes, before "
        "the first update and after the last; without it no response is graded.",
    )
    store: str | None = Field(
        None,
        description="At the same moments, also compute the objective's loss and all metrics on a "
        "store that is not trained on: folder or URL. Without it, with --eval-rollouts: the "
        "training store.",
    )
    rollouts: Name | None = Field(
        None, description="Set of rollouts for that; optional when the store has one."
    )
    teacher: Names | None = Field(
        None,
        description="Teacher whose scores are used for that, or several as in --teacher; optional "
        "when there is one.",
    )
    snapshot: str | None = Field(
        None,
        description="Log number or tag of that store; default: the newest when the run begins.",
    )
    grader: str = Field(
        "exact",
        description=f"Grader of the responses, rewards in [0, 1]: {GRADER_MEANINGS}",
    )
    every: int = Field(
        0, ge=0, description="Evaluate also every so many updates; 0 = at both ends only."
    )
    n: Positive = Field(16, description="Responses per evaluation prompt.")
    temperature: float = Field(
        0.7, ge=0, description="Sampling temperature of evaluation; 0 = greedy."
    )
    top_p: Share = Field(0.95, description="Nucleus that evaluation samples from.")

    def held_out_names(self) -> tuple[str | None, ...]:
        """Return the keys that name held-out rows: there are such rows if one of them is set."""
        return self.store, self.rollouts, self.teacher, self.snapshot


class Ablate(Section):
    seeds: Positive = Field(
        1, description="Runs of every combination, with run.seed and the numbers after it."
    )
    out: Path = Field(description="Folder of the runs, ablate.json and ablate.md.")
    skip_refused: bool = Field(
        False,
        description="Go on without combinations that cannot be trained, and say why in the table; "
        "otherwise one of them stops all before anything is trained.",
    )
    teacher_accuracy: float | None = Field(
        None,
        ge=0,
        le=1,
        description="The teacher's avg@n on the evaluation prompts, for the gap recovery (after - "
        "before) / (teacher - before).",
    )


class Loop(Section):
    rounds: Positive = Field(description="Rounds of rollout, score, update.")
    prompts_per_round: Positive = Field(
        64, description="Prompts of one round, taken in order and from the start again at the end."
    )
    updates_per_round: Positive = Field(
        1, description="Optimizer updates per round; 1 is strictly on policy."
    )
    max_age: int = Field(
        0,
        ge=0,
        description="Updates by which the student that samples a round may be older than the "
        "student at the first update of this round; 0 = sample each round by the newest student. "
        "More than 0 lets rollout, score and train run at once, as processes.",
    )
    max_unscored_bytes: Positive = Field(
        1 << 30,
        description="With processes: begin no rollout unit while so many bytes of rollouts wait "
        "for their scores.",
    )

    def record(self) -> dict[str, Any]:
        """Return the keys on which the student depends; later ones only where they are set."""
        left_out = {"max_unscored_bytes"} | ({"max_age"} if not self.max_age else set())
        return self.model_dump(exclude=left_out)
