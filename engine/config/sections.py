"""All sections but those of teachers and training, and what each command needs of all."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from logitcask.engine.config.cost import Cost
from logitcask.engine.config.loop import LoopScore, LoopTeacher
from logitcask.engine.config.prompts import GRADER_MEANINGS, Prompts
from logitcask.engine.config.runner import LoopRunner, StageRunner, Work
from logitcask.engine.config.section import NAME, Name, Positive, Section
from logitcask.engine.config.teacher import Score, Teacher
from logitcask.engine.config.training import Ablate, Eval, Loop, Lora, Train
from logitcask.engine.types import BATCH_TOKENS, SamplingParams


class Student(Section):
    model: str = Field(description="Student: a Hugging Face model folder or hub id.")
    revision: str = Field("", description="Commit or tag of a hub id; empty = its default branch.")


class StoreSection(Section):
    url: str = Field(
        description="The store: a folder, s3://, gs:// or az:// with bucket and prefix, or, to "
        "read it, hf://datasets/ORG/NAME. `rollout` makes it if it is absent."
    )
    rollouts: Name = Field("main", description="Name of the set of rollouts in the store.")
    profile: Literal["default", "compact", "interop", "raw32"] = Field(
        "default",
        description="How entry log-probs are stored: default = float16; compact = bfloat16, "
        "smaller and 8 times coarser; interop = float16 in codecs that every Zarr reader has; "
        "raw32 = exact, much larger.",
    )


class Rollout(SamplingParams):
    student_topk: Positive = Field(
        16,
        description="Ids of the student's own top-k kept per position. The teacher scores "
        "these too, so objectives with the student's support can use no larger k.",
    )
    mc_draws: int = Field(
        0,
        ge=0,
        le=4096,
        description="Ids drawn per position from the student's whole softmax at temperature 1, "
        "with replacement, and kept with its log-probs for objectives on Monte Carlo ids; 0 = "
        "none. Costs a second pass of the student over its responses.",
    )
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (),
        description="More ids that end a response, separated by commas, besides those of the "
        "model: eos_token_id of its tokenizer, config.json and generation_config.json.",
    )
    grader: str = Field(
        "",
        description="Grader that gives each response a reward in [0, 1], stored with it: "
        f"{GRADER_MEANINGS} Empty = no rewards.",
    )
    unit_prompts: int = Field(
        0,
        ge=0,
        description="Prompts per segment, the unit of work and of commit; 0 = about 262,144 "
        "positions. Smaller loses less work when killed and makes more files.",
    )

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _divided_by_commas(cls, ids: Any) -> Any:
        """Split the text of a flag."""
        return [each for each in ids.split(",") if each.strip()] if isinstance(ids, str) else ids


class Import(Section):
    """Rollouts of another program."""

    files: tuple[str | Path, ...] = Field(
        description="Files, or folders of JSONL files; with tap the store of a tap."
    )
    format: Literal[
        "neutral",
        "text",
        "nemo-gym",
        "nemo-rl",
        "prime-rl",
        "vllm",
        "tap",
        "axolotl",
        "distillkit",
    ] = Field(
        description="Program that wrote them: neutral = prompt_ids and response_ids; text = "
        "messages, ShareGPT, or prompt and completion, tokenized by the student's tokenizer; "
        "nemo-gym = *.tokens.jsonl; nemo-rl = train_data_step*.jsonl; prime-rl = traces.jsonl or "
        "token_exports; vllm = output of run-batch with return_token_ids; tap = a store of "
        "`logitcask tap`, whose teacher's scores are taken over too; axolotl, distillkit = texts "
        "with log-probs of a teacher.",
    )
    teacher: Name | None = Field(
        None,
        validate_default=True,
        description="With axolotl and distillkit: name of the scores that the files hold.",
    )
    turns: Literal["all", "last"] = Field(
        "all",
        description="With text: assistant turns of a conversation that count in the loss.",
    )
    rewards: bool = Field(True, description="Keep the rewards of the files.")
    student_topk: Positive = Field(
        Rollout().student_topk, description="Ids of the student's own top-k kept per position."
    )
    unit_positions: Positive = Field(
        65_536,
        description="Response tokens of a segment, about: the unit of commit. With tap a segment "
        "is one of the tap.",
    )
    tap_rollouts: str = Field(
        "",
        pattern=rf"{NAME}|^$",
        description="With tap: name of its rollouts; default: the only ones of the store.",
    )
    after: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (),
        max_length=64,
        description="With tap: ids, separated by commas, after which a response begins (after "
        "their last occurrence), for sequences whose request did not give the place.",
    )
    foreign_eos: Literal["refuse", "keep"] = Field(
        Score().foreign_eos,
        description="With tap: as of `score`, responses that end in a stop token that the teacher "
        "does not use.",
    )

    @field_validator("format")
    @classmethod
    def _of_one_store(cls, format: str, info: ValidationInfo) -> str:
        if format == "tap" and len(info.data.get("files", ())) > 1:
            raise ValueError("reads one store at a time, so give one")
        return format

    @field_validator("tap_rollouts", "after", "foreign_eos")
    @classmethod
    def _of_tap(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("format", "tap") != "tap":
            raise ValueError("must be left out with files, whose lines say where a response begins")
        return value

    @field_validator("after", mode="before")
    @classmethod
    def _divided_by_commas(cls, ids: Any) -> Any:
        """Split the text of a flag."""
        return [each for each in ids.split(",") if each.strip()] if isinstance(ids, str) else ids

    @field_validator("teacher")
    @classmethod
    def _of_scores(cls, teacher: str | None, info: ValidationInfo) -> str | None:
        if (teacher is not None) != (info.data.get("format") in ("axolotl", "distillkit")):
            rule = "be given with" if teacher is None else "be left out with all but"
            raise ValueError(f"must {rule} axolotl and distillkit, whose files hold scores")
        return teacher

    @field_validator("turns")
    @classmethod
    def _of_text(cls, turns: str, info: ValidationInfo) -> str:
        if turns != "all" and info.data.get("format") != "text":
            raise ValueError("must be left out with ids, which have a loss mask")
        return turns


class Estimate(Section):
    sample: Positive = Field(
        4096, description="Response tokens to sample and score, about; more takes longer."
    )
    teacher_topk_max: Positive = Field(
        256,
        description="The largest --teacher-topk-max of the table; a server must allow as "
        "many log-probs (--max-logprobs, by default 20).",
    )


class Gc(Section):
    keep_days: float = Field(
        30.0,
        ge=0,
        description="Every snapshot that was the newest within so many days stays readable.",
    )
    lease_hours: float = Field(
        24.0,
        ge=0,
        description="Hours for which a file that no record names is left to its writer; 0 only "
        "while no process writes.",
    )


class Run(Section):
    out: Path = Field(
        Path("run"), description="Folder of the trained model, metrics and checkpoints."
    )
    overwrite: bool = Field(False, description="Empty the folder of an earlier run first.")
    seed: int = Field(0, ge=0, description="Seeds sampling, shuffling and initial adapters.")
    backend: str = Field(
        "auto",
        description="Sampler and scorer: hf (transformers), vllm (in this process), server (a "
        "teacher at a URL); auto = server for a URL, else hf.",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Compute type; auto = bfloat16 on a GPU, and on a CPU with AMX or AVX512-BF16 "
        "where config.json names bfloat16 (not for vllm); else float32. Trained weights are "
        "float32 in any case.",
    )
    batch_tokens: Positive = Field(
        BATCH_TOKENS, description="Tokens of one batch when sampling or scoring. Bounds memory."
    )


class RolloutConfig(Section):
    """Sections of `logitcask rollout`."""

    student: Student
    prompts: Prompts
    store: StoreSection
    rollout: Rollout = Rollout()
    work: Work = Work()
    runner: StageRunner = StageRunner()
    run: Run = Run()


class ImportConfig(Section):
    """Sections of `logitcask import`."""

    student: Student
    store: StoreSection
    imported: Import
    run: Run = Run()


class ScoreConfig(Section):
    """Sections of `logitcask score`."""

    teacher: Teacher
    store: StoreSection
    score: Score = Score()
    work: Work = Work()
    runner: StageRunner = StageRunner()
    run: Run = Run()


class EstimateConfig(Section):
    """Sections of `logitcask store estimate`."""

    student: Student
    teacher: Teacher
    prompts: Prompts
    rollout: Rollout = Rollout()
    score: Score = Score()
    estimate: Estimate = Estimate()
    cost: Cost = Cost()
    run: Run = Run()


class CostConfig(Section):
    """Sections of the costs of a recipe."""

    cost: Cost = Cost()


class AblateConfig(Section):
    """Sections of `logitcask ablate`, in addition to those of a training."""

    ablate: Ablate


class GcConfig(Section):
    """Sections of `logitcask store gc`."""

    gc: Gc = Gc()


class TrainConfig(Section):
    """Sections of `logitcask train`."""

    student: Student
    store: StoreSection
    train: Train = Train()
    lora: Lora = Lora()
    eval: Eval = Eval()
    run: Run = Run()


class EvaluateConfig(Section):
    """Sections of `logitcask evaluate`."""

    student: Student
    store: StoreSection
    train: Train = Train()
    eval: Eval = Eval()
    work: Work = Work()
    run: Run = Run()


class RunConfig(Section):
    """A whole distillation: the file that `logitcask distill` reads."""

    student: Student
    teacher: LoopTeacher
    prompts: Prompts
    store: StoreSection
    rollout: Rollout = Rollout()
    score: LoopScore = LoopScore()
    train: Train = Train()
    lora: Lora = Lora()
    eval: Eval = Eval()
    loop: Loop
    runner: LoopRunner = LoopRunner()
    work: Work = Work()
    run: Run = Run()
