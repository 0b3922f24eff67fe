"""Sections of `logitcask probe`, and what each of its commands needs of all."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from logitcask.engine.config.prompts import Prompts
from logitcask.engine.config.section import Name, Positive, Section
from logitcask.engine.config.sections import Rollout, Run, StoreSection, Student
from logitcask.engine.config.teacher import Score
from logitcask.engine.types import PACK_LENGTH, SamplingParams

MOST_PROMPTS = 64
"""Of probes that sample."""


class StoredScores(Section):
    """Scores that a probe reads."""

    teacher: Name | None = Field(
        None, description="Whose scores to read; may be left out when the store has one."
    )
    snapshot: str | None = Field(
        None, description="Log number or tag of the store to read; default: the newest."
    )


class Probe(StoredScores):
    bins: Positive = Field(
        1, description="Ranges of positions in the response that are shown apart, equally wide."
    )
    pack_length: Positive = Field(
        PACK_LENGTH,
        description="Tokens of one pack, prompts included: one forward pass. Bounds memory.",
    )
    teacher_model: str | None = Field(
        None,
        description="Folder or hub id of the teacher itself, for kl/forward and kl/reverse over "
        "the whole vocabulary, from the logits of both models in float32.",
    )
    teacher_revision: str = Field("", description="Commit of a hub id of that teacher.")


class RewardProbe(StoredScores):
    correct_from: float = Field(
        1.0, gt=0, le=1, description="Least reward of a response that counts as correct."
    )


class PositionProbe(StoredScores):
    bins: Positive = Field(8, description="Ranges of positions in the response, equally wide.")


class CorrectnessProbe(RewardProbe):
    """Keys of [correctness]: those of [reward]."""


class RegionProbe(StoredScores):
    k: int | None = Field(
        None,
        ge=2,
        description="Ids of the top-k of both models; default: 16, or as many as are stored.",
    )


class TopkProbe(StoredScores):
    model: str | None = Field(
        None,
        description="Student, a Hugging Face model folder or hub id: with --teacher-model, also "
        "measure bias and variance of gradient estimators on a sample, from all logits.",
    )
    teacher_model: str | None = Field(
        None, description="Teacher for that, over the student's tokenizer."
    )
    positions: Positive = Field(
        512, description="Response positions of that sample, of up to 64 responses."
    )


class DriftProbe(StoredScores):
    pack_length: Positive = Field(
        PACK_LENGTH,
        description="Tokens of one pack, prompts included: one forward pass. Bounds memory.",
    )


class FewPrompts(Prompts):
    limit: Positive | None = Field(
        MOST_PROMPTS, description="Read only the first prompts, so many."
    )


class KeptStore(StoreSection):
    url: str = Field(
        "compatibility",
        description="Store of the responses and scores: the same command resumes, and other "
        "probes read it.",
    )


class Compatibility(Section):
    teacher_models: tuple[str, ...] = Field(
        min_length=1,
        description="Candidate teacher: a model folder, a hub id or the URL of a server; "
        "NAME=MODEL names its scores. Repeatable. A server scores, but does not sample here.",
    )
    tokenizer: str = Field("", description="As of `score`, for candidates at a URL.")
    k: int = Field(16, ge=1, le=64, description="k of the overlap; 16 is that of the paper.")
    correct_from: float = Field(
        1.0, gt=0, le=1, description="Least reward of a response that counts as correct."
    )
    foreign_eos: Literal["refuse", "keep"] = Field(
        Score().foreign_eos,
        description="As of `score`: responses that end in a stop token that the teacher does not "
        "use.",
    )


class Continuation(Section):
    teacher_model: str = Field(
        description="Teacher: a model folder or a hub id with the student's tokenizer."
    )
    at: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 16, 64),
        min_length=1,
        description="Tokens of the student's response after which both go on, divided by commas; "
        "0 = from the prompt. Of each prompt the first response that is longer counts.",
    )
    n: Positive = Field(SamplingParams().n, description="Continuations of each prefix.")
    limit: Positive = Field(MOST_PROMPTS, description="Prompts of each length, at most.")
    grader: str = Field(
        "", description="As of `rollout`; empty = the grader that the rollouts record."
    )
    correct_from: float = Field(
        1.0, gt=0, le=1, description="Least reward of a response that counts as correct."
    )
    snapshot: str | None = Field(
        None, description="Log number or tag of the store to read; default: the newest."
    )

    @field_validator("at", mode="before")
    @classmethod
    def _divided_by_commas(cls, at: Any) -> Any:
        """Split the text of a flag."""
        return [each for each in at.split(",") if each.strip()] if isinstance(at, str) else at


class ProbeConfig(Section):
    """Sections of `logitcask probe metrics`."""

    student: Student
    store: StoreSection
    probe: Probe = Probe()
    run: Run = Run()


class RewardProbeConfig(Section):
    """Sections of `logitcask probe reward`."""

    store: StoreSection
    reward: RewardProbe = RewardProbe()


class PositionProbeConfig(Section):
    """Sections of `logitcask probe positions`."""

    store: StoreSection
    positions: PositionProbe = PositionProbe()


class CorrectnessProbeConfig(Section):
    """Sections of `logitcask probe correctness`."""

    store: StoreSection
    correctness: CorrectnessProbe = CorrectnessProbe()


class RegionProbeConfig(Section):
    """Sections of `logitcask probe regions`."""

    store: StoreSection
    regions: RegionProbe = RegionProbe()


class TopkProbeConfig(Section):
    """Sections of `logitcask probe k`."""

    store: StoreSection
    topk: TopkProbe = TopkProbe()
    run: Run = Run()


class DriftProbeConfig(Section):
    """Sections of `logitcask probe drift`."""

    store: StoreSection
    drift: DriftProbe = DriftProbe()
    run: Run = Run()


class CompatibilityConfig(Section):
    """Sections of `logitcask probe compatibility`."""

    student: Student
    compatibility: Compatibility
    prompts: FewPrompts
    store: KeptStore = KeptStore()
    rollout: Rollout = Rollout()
    run: Run = Run()


class ContinuationConfig(Section):
    """Sections of `logitcask probe continuation`."""

    student: Student
    continuation: Continuation
    store: StoreSection
    run: Run = Run()
