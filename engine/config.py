"""Configuration: frozen sections; the only place of a default.

A section's field is a key in TOML (`[rollout] max_new_tokens = 512`), a flag on the command line
(`--max-new-tokens 512`, the key with dashes) and a `--set rollout.max_new_tokens=512`. Its
description is the flag's help, so it says unit and consequence.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from logitcask.engine.types import SamplingParams, ScoreRequest

GIVEN = "ids:"
"""What stands before the name of a file of ids that a teacher is asked at."""
NAME = r"^[a-z0-9][a-z0-9._-]{0,127}$"
Name = Annotated[str, Field(pattern=NAME)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """Frozen, and every key is known."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Student(Section):
    model: str = Field(description="Student: a Hugging Face model folder or hub id.")
    revision: str = Field("", description="Commit or tag of a hub id; empty = its default branch.")


class Teacher(Section):
    model: str = Field(description="Teacher: a Hugging Face model folder or hub id.")
    revision: str = Field("", description="Commit or tag of a hub id; empty = its default branch.")
    name: Name = Field(
        description="Name of this teacher's scores in the store; bound to its weights at first use."
    )


class Prompts(Section):
    file: Path = Field(
        description='JSONL file: {"id", "prompt"} or {"id", "messages"} a line, optional "answer".'
    )
    chat_template: bool | None = Field(
        None,
        description="Render prompts through the tokenizer's chat template, or take their text as "
        "it is. Needed where both make sense: plain prompts and a tokenizer with a template.",
    )


class StoreSection(Section):
    url: str = Field(
        description="The store: a folder, or s3://, gs:// or az:// with bucket and prefix. "
        "`rollout` makes it if it is absent."
    )
    rollouts: Name = Field("main", description="Name of the set of rollouts in the store.")
    profile: Literal["default", "compact", "interop", "raw32"] = Field(
        "default",
        description="How entry log-probs are stored: default = float16; compact = bfloat16, "
        "smaller and 8 times coarser; interop = float16 in codecs that every Zarr reader has; "
        "raw32 = exact, much larger.",
    )


class Rollout(Section):
    n: Positive = Field(4, description="Responses per prompt.")
    temperature: float = Field(
        1.0, ge=0, description="Sampling temperature; 0 = greedy, for evaluation."
    )
    top_p: Share = Field(
        1.0, description="Nucleus that is sampled from. Below 1 the student sees fewer states."
    )
    sample_top_k: int = Field(
        0, ge=0, description="Sample from so many most likely ids; 0 = all. Not --student-k."
    )
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Drop ids under this share of the most likely id's probability.",
    )
    repetition_penalty: float = Field(
        1.0, gt=0, description="Divides the logits of ids already seen; 1 = off."
    )
    max_new_tokens: Positive = Field(
        512, description="Response tokens at most, stop token included."
    )
    student_k: Positive = Field(
        16,
        description="Ids of the student's own top-k kept a position. The teacher is asked at "
        "these, so objectives with the student's support can use no larger k.",
    )
    mc_draws: int = Field(
        0,
        ge=0,
        le=4096,
        description="Ids drawn a position from the student's whole softmax at temperature 1, with "
        "replacement, and kept with its log-probs for objectives on Monte Carlo ids; 0 = none. "
        "Costs a second pass of the student over its responses.",
    )
    grader: str = Field(
        "",
        description="Who gives each response a reward in [0, 1] that is stored with it: exact = "
        'its last \\boxed{}, "Answer:", "####" or line is the prompt\'s "answer"; or '
        "MODULE:FUNCTION, installed code called with (prompt, response). Empty = no rewards.",
    )
    unit_prompts: int = Field(
        0,
        ge=0,
        description="Prompts per segment, the unit of work and of commit; 0 = about 262,144 "
        "positions. Smaller loses less work when killed and makes more files.",
    )

    def sampling(self) -> SamplingParams:
        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.sample_top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_new_tokens=self.max_new_tokens,
        )


class Score(Section):
    role: Literal["teacher", "base", "context"] = Field(
        "teacher",
        description="What the scores are for: of a teacher; of the model that a teacher was made "
        "from, for objectives that extrapolate; or of a teacher that is shown other prompts, "
        "--context. Each needs a name of its own.",
    )
    context: Path | None = Field(
        None,
        description="With --role context: JSONL file of prompts as for `rollout`, one for every id "
        "of the rollouts. The teacher scores the same responses after these.",
    )
    prompt_template: Path | None = Field(
        None,
        description="With --role context, in place of --context: text file with the fields "
        "{prompt} and {answer} ({{ }} for braces), filled in from --prompts. It replaces a "
        "prompt's text, or that of its last user turn.",
        validate_default=True,
    )
    prompts: Path | None = Field(
        None,
        description="With --prompt-template: the prompts file that `rollout` read.",
        validate_default=True,
    )
    entry_kind: Literal["topp", "topk", "sampled"] = Field(
        "topp",
        description="Which of the teacher's ids are kept: its best up to --top-p, its best "
        "--k-max, or --draws of its own. Drawn ones need a name of their own.",
    )
    draws: int = Field(
        0,
        ge=0,
        le=4096,
        description="With --entry-kind sampled: ids drawn a position from the teacher's whole "
        "softmax at temperature 1, with replacement, seeded by --seed.",
        validate_default=True,
    )
    top_p: Share = Field(
        0.999,
        description="Teacher's ids are kept a position until their mass reaches this, "
        "between --k-min and --k-max.",
    )
    k_min: Positive = Field(
        16, description="Ids kept at least: the teacher's top-k is exact for every k up to this."
    )
    k_max: Positive = Field(
        64,
        description="Ids kept at most: bounds the bytes of unsure positions.",
        validate_default=True,
    )
    at: str = Field(
        "student",
        pattern=rf"{NAME}|^{GIVEN}.",
        description="Ids that the teacher is asked at: student = the student's stored top ids; mc "
        "= also those that it drew (rollout --mc-draws), kept in float32; NAME = also the top ids "
        "of these other scores in the store, a later student's say; ids:FILE = also those of a "
        'JSONL file, {"prompt", "sample", "ids"} a response: a list of ids for each token.',
    )

    @field_validator("context")
    @classmethod
    def _has_role(cls, context: Path | None, info: ValidationInfo) -> Path | None:
        if context is not None and info.data.get("role") != "context":
            raise ValueError("must be given with role = context, and with no other")
        return context

    @field_validator("prompt_template")
    @classmethod
    def _is_the_context(cls, template: Path | None, info: ValidationInfo) -> Path | None:
        has_context = info.data.get("role") == "context"
        if has_context and (template is None) == (info.data.get("context") is None):
            raise ValueError("role = context needs --context or --prompt-template, one of them")
        if template is not None and not has_context:
            raise ValueError("must be given with role = context, and with no other")
        return template

    @field_validator("prompts")
    @classmethod
    def _fills_template(cls, prompts: Path | None, info: ValidationInfo) -> Path | None:
        if (prompts is None) != (info.data.get("prompt_template") is None):
            raise ValueError("must be given with prompt_template, and only then")
        return prompts

    @field_validator("draws")
    @classmethod
    def _has_kind(cls, draws: int, info: ValidationInfo) -> int:
        if (draws > 0) != (info.data.get("entry_kind") == "sampled"):
            raise ValueError("must be 1 or more with entry_kind = sampled, and 0 with any other")
        return draws

    @field_validator("at")
    @classmethod
    def _adds_to_best(cls, at: str, info: ValidationInfo) -> str:
        if at != "student" and info.data.get("entry_kind") == "sampled":
            raise ValueError("must be left out with entry_kind = sampled: draws are not added to")
        return at

    @field_validator("k_max")
    @classmethod
    def _holds_k_min(cls, k_max: int, info: ValidationInfo) -> int:
        # Training takes k_min at its word: every row must be able to hold so many.
        if k_max < info.data.get("k_min", 0):
            raise ValueError(f"must be k_min = {info.data['k_min']} or more")
        return k_max

    def request(self, seed: int = 0) -> ScoreRequest:
        """seed: of ids that are drawn."""
        if self.entry_kind == "sampled":
            return ScoreRequest(entry_kind="sampled", draws=self.draws, seed=seed, at_student=False)
        if self.entry_kind == "topk":
            return ScoreRequest(entry_kind="topk", top_p=1.0, k_min=self.k_max, k_max=self.k_max)
        return ScoreRequest(top_p=self.top_p, k_min=self.k_min, k_max=self.k_max)

    def asked_at(self) -> str | None:
        """`at` of the scoring stage, where it is a name."""
        return None if self.at == "student" or self.ids_file() else self.at

    def ids_file(self) -> Path | None:
        """The file of `at`, where it is one."""
        return Path(self.at.removeprefix(GIVEN)) if self.at.startswith(GIVEN) else None


class Estimate(Section):
    sample: Positive = Field(
        4096, description="Response tokens to sample and score, about; more takes longer."
    )


class Gc(Section):
    keep_days: float = Field(
        30.0, ge=0, description="Every pin that was the newest within so many days stays readable."
    )
    lease_hours: float = Field(
        24.0,
        ge=0,
        description="What no record names is left to its writer for so long; 0 only when nobody "
        "writes.",
    )


class Train(Section):
    teacher: Name | None = Field(
        None, description="Whose scores to train on; may be left out when the store has one."
    )
    base: Name | None = Field(
        None,
        description="Scores of the model that the teacher was made from (score --role base), for "
        "objectives that look at them.",
    )
    pin: str | None = Field(
        None,
        description="Log number or tag of the store to train on; default: the newest when the run "
        "begins. `logitcask store pin` shows it.",
    )
    objective: str = Field(
        "overlap",
        description="Preset of the loss, with fields or modifiers as in gkd(parameter=0.1) or "
        "sampled_token+importance(cap=5); `logitcask objectives` shows all.",
    )
    k: Positive | None = Field(
        None, description="Size of the objective's top-k support; default: the preset's own."
    )
    lr: float = Field(1e-6, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="What the learning rate does after the warm-up."
    )
    warmup_steps: int = Field(0, ge=0, description="Updates over which the rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    beta2: float = Field(0.999, gt=0, lt=1, description="AdamW's second-moment decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    epochs: Positive = Field(1, description="Passes over the pinned rollouts.")
    tokens_per_batch: Positive = Field(
        16384,
        description="Tokens of one packed row, prompts included: one forward pass. Bounds memory.",
    )
    accumulation: Positive = Field(
        1, description="Packed rows per optimizer update and process; the loss is their token mean."
    )
    lora: int = Field(
        0,
        ge=0,
        description="Rank of LoRA adapters that are trained instead of all weights; 0 = off. The "
        "saved model has them merged.",
    )
    metric_share: float = Field(
        1 / 16,
        gt=0,
        le=1,
        description="Share of the positions that metrics are taken of, for objectives whose loss "
        "does not need the whole vocabulary; others take them of all.",
    )
    save_steps: Positive = Field(100, description="Updates between checkpoints.")
    aggregation: Literal["token-mean", "sequence-mean", "sequence-sum"] = Field(
        "token-mean",
        description="Of an update's losses: over all tokens, or over sequences the mean of their "
        "means or of their sums. With the last two long responses count less or more a token.",
    )
    hard_bound: Literal["off", "skip", "stop"] = Field(
        "off",
        description="Beyond --min-coverage or --max-drift, whichever the objective depends on: "
        "only warn, give a position no gradient, or end the run (exit code 3) by an update's mean.",
    )
    min_coverage: float = Field(
        0.80,
        ge=0,
        le=1,
        description="Least share of the live student's mass that must have a score, for supports "
        "in which the student has a say.",
    )
    max_drift: float = Field(
        0.2, gt=0, description="Largest drift from the student that drew, nats of k3, for draws."
    )
    partial: bool = Field(False, description="Train on what is scored although units are missing.")
    foreign_student: bool = Field(
        False,
        description="Allow a frozen student support although another model made the rollouts.",
    )


class Eval(Section):
    prompts: Path | None = Field(
        None,
        description="Evaluate on this prompts file before the first update and after the last; "
        "left out, no response is graded.",
    )
    store: str | None = Field(
        None,
        description="At the same moments, also take the objective's loss and all metrics of a "
        "store that is not trained on: folder or URL. Left out with --eval-rollouts, the store "
        "itself.",
    )
    rollouts: Name | None = Field(
        None,
        description="Set of rollouts that they are taken of; may be left out when there is one.",
    )
    teacher: Name | None = Field(
        None, description="Whose scores they are taken by; may be left out when there is one."
    )
    pin: str | None = Field(
        None,
        description="Log number or tag of that store; default: the newest when the run begins.",
    )
    grader: str = Field(
        "exact",
        description="Who gives a response its reward in [0, 1]: exact = its last \\boxed{}, "
        '"Answer:", "####" or line is the prompt\'s "answer"; or MODULE:FUNCTION, installed code '
        "called with (prompt, response).",
    )
    n: Positive = Field(16, description="Responses per evaluation prompt.")
    every: int = Field(
        0, ge=0, description="Evaluate also every so many updates; 0 = at both ends only."
    )
    temperature: float = Field(
        0.7, ge=0, description="Sampling temperature of evaluation; 0 = greedy."
    )
    top_p: Share = Field(0.95, description="Nucleus that evaluation samples from.")
    max_new_tokens: Positive = Field(
        512, description="Tokens of an evaluation response at most, stop token included."
    )

    def sampling(self) -> SamplingParams:
        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
        )


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


class Probe(Section):
    teacher: Name | None = Field(
        None, description="Whose scores to measure by; may be left out when the store has one."
    )
    pin: str | None = Field(
        None, description="Log number or tag of the store to measure on; default: the newest."
    )
    bins: Positive = Field(
        1, description="Ranges of positions in the response that are shown apart, equally wide."
    )
    tokens_per_batch: Positive = Field(
        16384,
        description="Tokens of one packed row, prompts included: one forward pass. Bounds memory.",
    )


class Loop(Section):
    rounds: Positive = Field(description="Rounds of rollout, score, update.")
    prompts_per_round: Positive = Field(
        64, description="Prompts of one round, taken in order and from the start again at the end."
    )
    updates_per_round: Positive = Field(
        1, description="Optimizer updates per round; 1 is strictly on policy."
    )


class Run(Section):
    out: Path = Field(
        Path("run"), description="Folder of the trained model, metrics and checkpoints."
    )
    overwrite: bool = Field(False, description="Empty the folder of an earlier run first.")
    seed: int = Field(0, ge=0, description="Seeds sampling, shuffling and initial adapters.")
    backend: str = Field("hf", description="Who samples and scores: hf (transformers).")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Compute type; auto = bfloat16 on a GPU, float32 on a CPU. Trained weights are "
        "float32 in any case.",
    )
    batch_tokens: Positive = Field(
        16384, description="Tokens of one batch when sampling or scoring. Bounds memory."
    )


class RolloutJob(Section):
    """What `logitcask rollout` needs."""

    student: Student
    prompts: Prompts
    store: StoreSection
    rollout: Rollout = Rollout()
    run: Run = Run()


class ScoreJob(Section):
    """What `logitcask score` needs."""

    teacher: Teacher
    store: StoreSection
    score: Score = Score()
    run: Run = Run()


class EstimateJob(Section):
    """What `logitcask store estimate` needs."""

    student: Student
    teacher: Teacher
    prompts: Prompts
    rollout: Rollout = Rollout()
    score: Score = Score()
    estimate: Estimate = Estimate()
    run: Run = Run()


class AblateJob(Section):
    """What `logitcask ablate` needs beside a TrainJob."""

    ablate: Ablate


class GcJob(Section):
    """What `logitcask store gc` needs."""

    gc: Gc = Gc()


class TrainJob(Section):
    """What `logitcask train` needs."""

    student: Student
    store: StoreSection
    train: Train = Train()
    eval: Eval = Eval()
    run: Run = Run()


class ProbeJob(Section):
    """What `logitcask probe metrics` needs."""

    student: Student
    store: StoreSection
    probe: Probe = Probe()
    run: Run = Run()


class RunConfig(Section):
    """A whole distillation: the file that `logitcask distill` reads."""

    student: Student
    teacher: Teacher
    prompts: Prompts
    store: StoreSection
    rollout: Rollout = Rollout()
    score: Score = Score()
    train: Train = Train()
    eval: Eval = Eval()
    loop: Loop
    run: Run = Run()
