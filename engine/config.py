"""Configuration: frozen sections, read from TOML, overridden by flags; the only place of a default.

A section's field is a key in TOML (`[rollout] max_new_tokens = 512`), a flag on the command line
(`--max-new-tokens 512`, the key with dashes) and a `--set rollout.max_new_tokens=512`. Its
description is the flag's help, so it says unit and consequence. An unknown key is an error that
names the nearest known one.
"""

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from logitcask.engine.errors import ConfigError
from logitcask.engine.types import SamplingParams, ScoreRequest

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]
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
        "smaller and 8 times coarser; interop = float16 in codecs that every Zarr reader has, "
        "larger; raw32 = exact, much larger.",
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
    at: Name | None = Field(
        None,
        description="Ask the teacher also at the top ids of these other scores in the store, a "
        "later student's say; it must have scored the rollouts before.",
    )

    @field_validator("k_max")
    @classmethod
    def _holds_k_min(cls, k_max: int, info: ValidationInfo) -> int:
        # Training takes k_min at its word: every row must be able to hold so many.
        if k_max < info.data.get("k_min", 0):
            raise ValueError(f"must be k_min = {info.data['k_min']} or more")
        return k_max

    def request(self) -> ScoreRequest:
        return ScoreRequest(top_p=self.top_p, k_min=self.k_min, k_max=self.k_max)


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
    pin: str | None = Field(
        None,
        description="Log number or tag of the store to train on; default: the newest when the run "
        "begins. `logitcask store pin` shows it.",
    )
    objective: str = Field(
        "overlap", description="Preset of the loss; --list-objectives shows all."
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
    save_steps: Positive = Field(100, description="Updates between checkpoints.")
    partial: bool = Field(False, description="Train on what is scored although units are missing.")
    foreign_student: bool = Field(
        False,
        description="Allow a frozen student support although another model made the rollouts.",
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


class GcJob(Section):
    """What `logitcask store gc` needs."""

    gc: Gc = Gc()


class TrainJob(Section):
    """What `logitcask train` needs."""

    student: Student
    store: StoreSection
    train: Train = Train()
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
    loop: Loop
    run: Run = Run()


Job = TypeVar("Job", bound=Section)


def validate(kind: type[Job], values: Mapping[str, Any], *, source: str) -> Job:
    """`values` ({section: {key: value}}) as a frozen `kind`; ConfigError names key, value, rule."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = list(_keys(kind))
            near = get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{source}: unknown key {key}", remedy=f"the nearest known key is {near}"
            ) from None
        if first["type"] == "missing":
            raise ConfigError(
                f"{source}: {key} is missing", remedy=f"give {key}: {_describe(kind, first['loc'])}"
            ) from None
        raise ConfigError(
            f"{source}: {key} = {first['input']!r}: {first['msg']}",
            remedy=f"{key}: {_describe(kind, first['loc'])}",
        ) from None


def read_toml(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """A RunConfig from a TOML file and `section.key=value` overrides; paths are relative to it."""
    try:
        with path.open("rb") as file:
            values: dict[str, Any] = tomllib.load(file)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}", remedy="give the path of a TOML file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}", remedy="mend the file there") from error
    for text in overrides:
        _override(values, text)
    return _resolved(validate(RunConfig, values, source=str(path)), path.parent)


def to_toml(config: Section) -> str:
    """The resolved configuration as TOML that `read_toml` reads back to the same."""
    lines: list[str] = []
    for section, content in config.model_dump(mode="json").items():
        lines.append(f"[{section}]")
        # JSON's strings, numbers and booleans are TOML's too; a key without a value is left out.
        lines += [f"{k} = {json.dumps(v)}" for k, v in content.items() if v is not None]
        lines.append("")
    return "\n".join(lines)


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        raise ConfigError(f"--set {text}: not section.key=value", remedy="e.g. --set train.lr=1e-5")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word or path is text
    content = values.setdefault(section, {})
    if not isinstance(content, dict):
        raise ConfigError(
            f"--set {text}: {section} is not a section", remedy=f"write [{section}] in the file"
        )
    content[name] = parsed


def _resolved(config: RunConfig, base: Path) -> RunConfig:
    def under(path: Path) -> Path:
        return path if path.is_absolute() else base / path

    def folder(name: str) -> str:
        # A hub id and a relative folder look alike: it is a folder if there is one.
        return str(base / name) if (base / name).is_dir() else name

    url = config.store.url
    return config.model_copy(
        update={
            "student": config.student.model_copy(update={"model": folder(config.student.model)}),
            "teacher": config.teacher.model_copy(update={"model": folder(config.teacher.model)}),
            "prompts": config.prompts.model_copy(update={"file": under(config.prompts.file)}),
            "store": config.store.model_copy(
                update={"url": url if "://" in url else str(under(Path(url)))}
            ),
            "run": config.run.model_copy(update={"out": under(config.run.out)}),
        }
    )


def _keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield prefix + name
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _keys(inner, f"{prefix}{name}.")


def _describe(kind: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    field = kind.model_fields.get(str(loc[0]))
    if field is None:
        return "see the README's configuration table"
    inner = field.annotation
    if isinstance(inner, type) and issubclass(inner, BaseModel):
        if len(loc) > 1:
            return _describe(inner, loc[1:])
        return "a section with " + ", ".join(inner.model_fields)
    return field.description or str(loc[0])
