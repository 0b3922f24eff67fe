"""Sections of teachers, what they are asked, and the workers that ask them."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from logitcask.engine.config.section import NAME, Name, Positive, Section, Share
from logitcask.engine.types import ScoreParams

GIVEN = "ids:"
"""What stands before the name of a file of ids that a teacher is asked at."""


class Teacher(Section):
    model: str = Field(
        description="Teacher: a Hugging Face model folder or hub id; or the URL of a vLLM server, "
        "http://HOST:PORT, several of one teacher divided by commas."
    )
    revision: str = Field(
        "",
        description="Commit or tag of a hub id; empty = its default branch. With a URL: what the "
        "server is said to serve, part of the teacher's identity.",
    )
    name: Name = Field(
        description="Name of this teacher's scores in the store; bound to its weights at first use."
    )
    tokenizer: str = Field(
        "",
        description="With a URL: folder or hub id that holds the teacher's tokenizer and "
        "config.json; empty = what the server says that it serves, where that can be found here.",
    )
    student_tokenizer: str = Field(
        "",
        description="For a teacher whose tokenizer is not the student's: folder or hub id with the "
        "student's, and the two are compared id by id. Ids that are other tokens to the one than "
        "to the other are listed, and refused where they occur.",
    )
    served: str = Field(
        "",
        description="With a URL: the name that the server has for the teacher; empty = the only "
        "one that it serves.",
    )
    api_key_file: Path | None = Field(
        None,
        description="With a URL: file that holds the server's API key; left out, the environment's "
        "LOGITCASK_API_KEY, if any. The key is never printed or stored.",
    )
    server_wait: float = Field(
        600.0,
        ge=0,
        description="With a URL: seconds that all servers may be away, restarting say, before the "
        "run gives up.",
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
        description="With --entry-kind sampled: ids drawn per position from the teacher's whole "
        "softmax at temperature 1, with replacement, seeded by --seed.",
        validate_default=True,
    )
    top_p: Share = Field(
        0.999,
        description="Of each position the teacher's best ids are kept until their mass reaches "
        "this, between --k-min and --k-max.",
    )
    k_min: Positive = Field(
        16, description="Ids kept at least: the teacher's top-k is exact for every k up to this."
    )
    k_max: Positive = Field(
        64,
        description="Ids kept at most: bounds the bytes of unsure positions.",
        validate_default=True,
    )
    exact: bool = Field(
        False,
        description="With --backend vllm: score from its hidden states, which gives entropy and "
        "tail exactly, and answers at any ids; without, the teacher's own best log-probs are told, "
        "and entropy is an interval.",
    )
    at: str = Field(
        "student",
        pattern=rf"{NAME}|^{GIVEN}.",
        description="Ids that the teacher is asked at: student = the student's stored top ids; mc "
        "= also those that it drew (rollout --mc-draws), kept in float32; NAME = also the top ids "
        "of these other scores in the store, a later student's say; ids:FILE = also those of a "
        'JSONL file, one {"prompt", "sample", "ids"} per response: a list of ids for each token.',
    )

    eos_rows: Literal["refuse", "keep"] = Field(
        "refuse",
        description="Responses that end in a stop token that the teacher does not use: refuse; or "
        "keep, though it has next to no probability, one huge KL row in every such response.",
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

    def request(self, seed: int = 0) -> ScoreParams:
        """seed: of ids that are drawn."""
        if self.entry_kind == "sampled":
            return ScoreParams(entry_kind="sampled", draws=self.draws, seed=seed, at_student=False)
        if self.entry_kind == "topk":
            return ScoreParams(entry_kind="topk", top_p=1.0, k_min=self.k_max, k_max=self.k_max)
        return ScoreParams(top_p=self.top_p, k_min=self.k_min, k_max=self.k_max)

    def asked_at(self) -> str | None:
        """`at` of the scoring stage, where it is a name."""
        return None if self.at == "student" or self.ids_file() else self.at

    def ids_file(self) -> Path | None:
        """The file of `at`, where it is one."""
        return Path(self.at.removeprefix(GIVEN)) if self.at.startswith(GIVEN) else None


class Work(Section):
    """How a worker that watches a store behaves among others."""

    watch: bool = Field(
        False,
        description="Stay, and do what is missing as it appears, beside any number of workers on "
        "the same store. SIGTERM ends it after the unit in hand, Ctrl-C at once.",
    )
    worker: str = Field(
        "",
        max_length=128,
        description="With --watch: name of this worker in claims and failures; empty = host-pid.",
    )
    lease: float = Field(
        600.0,
        gt=0,
        description="With --watch: seconds after which the unit of a worker that shows no life is "
        "taken over. Less than a stall of the store, and units are done twice.",
    )
    poll: float = Field(
        2.0,
        gt=0,
        description="With --watch: seconds between two looks at a store with nothing to do.",
    )
    attempts: Positive = Field(
        3,
        description="With --watch: failures of a unit, of all workers together, after which it is "
        "left alone until `store retry-failed`; the command then ends with exit code 3.",
    )
    idle_exit: float = Field(
        0.0,
        ge=0,
        description="With --watch: seconds with nothing to do after which the command ends; "
        "0 = never.",
    )
    max_unscored: int = Field(
        0,
        ge=0,
        description="With --watch: begin no unit while more than so many units of the name have no "
        "scores by any teacher; 0 = sample on. Bounds how far rollouts run ahead.",
    )
