"""Sections of `logitcask probe`, and what each of its commands needs of all."""

from pydantic import Field

from logitcask.engine.config.section import Name, Positive, Section
from logitcask.engine.config.sections import Run, StoreSection, Student
from logitcask.engine.types import PACK_LENGTH


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
