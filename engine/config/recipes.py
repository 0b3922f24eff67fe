"""Sections of the recipes, which come with the file of `distill`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from logitcask.engine.config.prompts import Columns
from logitcask.engine.config.section import Name, Positive, Section, Share
from logitcask.engine.config.training import Eval
from logitcask.engine.types import SamplingParams


class TeacherText(SamplingParams):
    """Responses of a teacher, arXiv 2604.13016, appendix on the data of the cold start."""

    temperature: float = Field(
        Eval().temperature,
        ge=0,
        description="Temperature at which the teacher samples; 0 = greedy.",
    )
    top_p: Share = Field(Eval().top_p, description="Nucleus from which the teacher samples.")


class ColdStart(TeacherText):
    """A student learns from its teacher's own text before it is distilled."""

    out: Path = Field(description="Folder of the student after its cold start.")
    name: Name = Field(
        "cold-start",
        description="Name of the accepted responses in the store, and of the training on them.",
    )
    sampled: Name = Field(
        "cold-start-sampled",
        description="Name of all responses of the teacher; that of an attempt ends in its number.",
    )
    prompts: Path | None = Field(
        None,
        description="Prompts of the cold start, in any form that `rollout` reads; default: those "
        "of the file. In the paper they are not those of the distillation.",
    )
    n: Positive = Field(1, description="Accepted responses per prompt, at most.")
    max_new_tokens: Positive = Field(
        12288, description="Response tokens at most; a response that reaches it is rejected."
    )
    attempts: Positive = Field(
        3, description="Times that a prompt is sampled until it has its accepted responses."
    )
    require: str = Field(
        "\\boxed",
        description="Text without which a response is rejected; off = none.",
    )
    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Literal["constant", "cosine", "linear"] = Field(
        "cosine", description="Learning rate after the warm-up."
    )
    warmup_share: float = Field(
        0.05, ge=0, lt=1, description="Share of the updates over which the rate rises from 0."
    )
    num_train_epochs: Positive = Field(1, description="Passes over the accepted responses.")
    pack_length: Positive | None = Field(
        None, description="Tokens of one pack, as of `train`; default: by the data."
    )
    gradient_accumulation_steps: Positive = Field(1, description="Packs per optimizer update.")


class BestOfN(TeacherText):
    """One of several responses of a teacher to each prompt, arXiv 2605.09725."""

    name: Name = Field(
        "best-of-n",
        description="Name of the chosen responses in the store, and of the training on them.",
    )
    sampled: Name = Field(
        "best-of-n-sampled",
        description="Name of all responses of the teacher, from which another call may choose "
        "otherwise, under another --name.",
    )
    n: Annotated[int, Field(ge=2)] = Field(2, description="Responses per prompt to choose from.")
    max_new_tokens: Positive = Field(7168, description="Response tokens at most.")
    grader: str = Field(
        Eval().grader,
        description="Grader of the responses, as of `rollout`: the largest reward is chosen.",
    )
    ties: Literal["overlap", "logprob"] = Field(
        "overlap",
        description="Choice among equal rewards: overlap = of the teacher's top-k and the "
        "student's, mean over the response; logprob = the teacher's mean log-prob of its tokens.",
    )
    incorrect: Literal["keep", "drop"] = Field(
        "keep",
        description="Prompts whose largest reward is under 1: keep that response, or drop them.",
    )


class PromptRecipe(Columns):
    """Prompts of the teacher's kind, arXiv 2604.13016, section 5.2."""

    out: Path = Field(description="JSONL file to write.")
    template: str = Field(
        "",
        description="Template of the prompts: boxed (the teacher's of Fig. 9), or a text file with "
        "the field {prompt}; empty = as they are.",
    )
    strip_template: str = Field(
        "",
        description="Template that the prompts have, a name or a file likewise: its text is taken "
        "away first. A prompt without it is refused.",
    )
    against: Path | None = Field(
        None, description="Drop prompts that these prompts have, exactly or nearly."
    )
    embedding_model: str = Field(
        "",
        description="Model of sentence-transformers for near duplicates, a folder or hub id such "
        "as sentence-transformers/all-mpnet-base-v2; needs the extra dedup. Empty = shared "
        "n-grams of characters, which see spelling and not meaning.",
    )
    threshold: float = Field(
        0.6, gt=0, le=1, description="Cosine similarity from which a prompt is a near duplicate."
    )
    mix: Path | None = Field(
        None, description="Prompts to mix in, from outside of the teacher's training."
    )
    share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="Share of the mixed prompts in the result."
    )
    seed: int = Field(0, ge=0, description="Chooses and places the mixed prompts.")


class ColdStartConfig(Section):
    """Sections of `logitcask recipe cold-start`, in addition to those of a distillation."""

    cold_start: ColdStart


class BestOfNConfig(Section):
    """Sections of `logitcask recipe best-of-n`, in addition to those of a distillation."""

    best_of_n: BestOfN = BestOfN()


class PromptRecipeConfig(Section):
    """Sections of `logitcask recipe prompts`."""

    prompt_recipe: PromptRecipe
