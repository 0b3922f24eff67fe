"""Sections of teachers, of their scores, and of several teachers at once."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from logitcask.engine.config.section import NAME, Name, Names, Positive, Section, Share
from logitcask.engine.types import ALL_POSITIONS, ScoreParams

FILE = "file:"
"""Beginning of `positions` that are listed in a file, before its path."""


def is_file(positions: str) -> bool:
    """Return True for `positions` that name a file."""
    return positions.startswith(FILE) and positions != FILE


class Teacher(Section):
    model: str = Field(
        description="Teacher: a Hugging Face model folder or hub id; or the URL of a server of "
        "vLLM or SGLang, http://HOST:PORT, several of one teacher divided by commas."
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
        "config.json; empty = the model that the server declares, if it can be found here.",
    )
    student_tokenizer: str = Field(
        "",
        description="For a teacher whose tokenizer is not the student's: folder or hub id with the "
        "student's; empty = the student's recorded name. Given, two that agree on half of all ids "
        "are compared id by id: ids that are other tokens to the one than to the other are listed, "
        "and refused where they occur. All others score spans of equal bytes.",
    )
    by_spans: bool = Field(
        False,
        description="Score spans of equal bytes also where the tokenizers of teacher and student "
        "agree on half of all ids or more: for ids that differ and occur.",
    )
    served: str = Field(
        "",
        description="With a URL: the name that the server has for the teacher; empty = the only "
        "one that it serves.",
    )
    server: Literal["auto", "vllm", "sglang"] = Field(
        "auto",
        description="With a URL: what the server is; auto = what its /v1/models says.",
    )
    api_key_file: Path | None = Field(
        None,
        description="With a URL: file that holds the server's API key; left out, the environment's "
        "LOGITCASK_API_KEY, if any. The key is never printed or stored.",
    )
    server_wait: float = Field(
        600.0,
        ge=0,
        description="With a URL: seconds that all servers may be unavailable, for example in a "
        "restart, before the run gives up.",
    )


class Score(Section):
    teacher_kind: Literal["teacher", "base", "context"] = Field(
        "teacher",
        description="What the scores are for: of a teacher; of the model that a teacher was made "
        "from, for objectives that extrapolate; or of a teacher that is shown other prompts, "
        "--context. Each needs a name of its own.",
    )
    context: Path | None = Field(
        None,
        description="With --teacher-kind context: prompts in any form that `rollout --prompts` "
        "takes, with our keys, one for every id of the rollouts. The teacher scores the same "
        "responses after these.",
    )
    prompt_template: Path | None = Field(
        None,
        description="With --teacher-kind context, in place of --context: text file with the fields "
        "{prompt} and {answer} ({{ }} for braces), filled in from --prompts. It replaces a "
        "prompt's text, or that of its last user turn.",
        validate_default=True,
    )
    prompts: Path | None = Field(
        None,
        description="The prompts file that `rollout` read: for --prompt-template, and for a "
        "teacher with another tokenizer, whose own chat template then renders them.",
        validate_default=True,
    )
    selection: Literal["top-p", "top-k", "sampled"] = Field(
        "top-p",
        description="Which of the teacher's ids are kept: its best up to --teacher-top-p, its "
        "best --teacher-topk-max, or --draws of its own. Drawn ones need a name of their own.",
    )
    draws: int = Field(
        0,
        ge=0,
        le=4096,
        description="With --selection sampled: ids drawn per position from the teacher's whole "
        "softmax at temperature 1, with replacement, seeded by --seed.",
        validate_default=True,
    )
    teacher_top_p: Share = Field(
        ScoreParams().top_p,
        description="Of each position the teacher's best ids are kept until their mass reaches "
        "this, between --teacher-topk-min and "
        "--teacher-topk-max.",
    )
    teacher_topk_min: Positive = Field(
        ScoreParams().k_min,
        description="Ids kept at least: the teacher's top-k is exact for every k up to this.",
    )
    teacher_topk_max: Positive = Field(
        ScoreParams().k_max,
        description="Ids kept at most: bounds the bytes of unsure positions.",
        validate_default=True,
    )
    span_topk: Literal["starts", "ends", "none"] = Field(
        "starts",
        description="For a teacher with another tokenizer: the row of each span that has its best "
        "ids, that of its first token or of its last; none = log-probs of its tokens alone, a few "
        "bytes a position.",
    )
    same_texts: str = Field(
        "",
        pattern=rf"{NAME}|^$",
        description="With --span-topk none: name of this teacher's scores over spans of the same "
        "texts in another student's tokens. Log-probs of equal texts are taken from there, and the "
        "teacher scores the others alone.",
        validate_default=True,
    )
    chat_template: bool | None = Field(
        None,
        description="For a teacher with another tokenizer: render the prompts file, --prompts, by "
        "its own chat template; or let it read the bytes of the stored prompts, which were plain "
        "texts. Default: as the rollouts record.",
    )
    control_tokens: Literal["refuse", "cut"] = Field(
        "refuse",
        description="For a teacher with another tokenizer, responses with a control token of the "
        "student that is no end of the response: refuse; or cut, and the teacher reads them up to "
        "there: what follows is in no span and has no loss.",
    )
    exact: bool = Field(
        False,
        description="With --backend vllm: score from its hidden states, which gives entropy and "
        "tail exactly, and answers at any ids; without, only the teacher's own top-k log-probs are "
        "returned, and entropy is an interval.",
    )
    extra_ids: str = Field(
        "",
        pattern=rf"{NAME}|^$",
        description="Ids that the teacher scores besides the student's stored top ids: mc = those "
        "that the student drew (rollout --mc-draws), kept in float32; NAME = the top ids of these "
        "other scores in the store, for example of a later student.",
    )
    positions: str = Field(
        ALL_POSITIONS,
        description="Response positions that get a score: all; first:N of each response; every:N, "
        "its first and then each N-th; entropy-top:SHARE, those of the largest entropy of the "
        "student in a segment, as 0.2; or file:PATH, a JSONL file that lists them. The others have "
        "no loss; a later call with all adds them.",
    )
    foreign_eos: Literal["refuse", "keep"] = Field(
        "refuse",
        description="Responses that end in a stop token that the teacher does not use: refuse; or "
        "keep, though it has next to no probability, one huge KL row in every such response.",
    )

    @field_validator("context")
    @classmethod
    def _has_role(cls, context: Path | None, info: ValidationInfo) -> Path | None:
        if context is not None and info.data.get("teacher_kind") != "context":
            raise ValueError("must be given with teacher_kind = context, and with no other")
        return context

    @field_validator("prompt_template")
    @classmethod
    def _is_the_context(cls, template: Path | None, info: ValidationInfo) -> Path | None:
        has_context = info.data.get("teacher_kind") == "context"
        if has_context and (template is None) == (info.data.get("context") is None):
            raise ValueError(
                "teacher_kind = context needs --context or --prompt-template, one of them"
            )
        if template is not None and not has_context:
            raise ValueError("must be given with teacher_kind = context, and with no other")
        return template

    @field_validator("prompts")
    @classmethod
    def _fills_template(cls, prompts: Path | None, info: ValidationInfo) -> Path | None:
        if prompts is None and info.data.get("prompt_template") is not None:
            raise ValueError("must be given with prompt_template")
        if prompts is not None and info.data.get("context") is not None:
            raise ValueError("must be left out with context, which has the teacher's prompts")
        return prompts

    @field_validator("draws")
    @classmethod
    def _has_kind(cls, draws: int, info: ValidationInfo) -> int:
        if (draws > 0) != (info.data.get("selection") == "sampled"):
            raise ValueError("must be 1 or more with selection = sampled, and 0 with any other")
        return draws

    @field_validator("same_texts")
    @classmethod
    def _has_no_rows(cls, same_texts: str, info: ValidationInfo) -> str:
        if same_texts and info.data.get("span_topk") != "none":
            raise ValueError(
                "must be given with span_topk = none: best ids lie at rows that depend on the "
                "student's tokens"
            )
        return same_texts

    @field_validator("extra_ids")
    @classmethod
    def _adds_to_best(cls, extra_ids: str, info: ValidationInfo) -> str:
        if extra_ids and info.data.get("selection") == "sampled":
            raise ValueError("must be left out with selection = sampled: draws are not added to")
        return extra_ids

    @field_validator("positions")
    @classmethod
    def _is_a_choice(cls, positions: str, info: ValidationInfo) -> str:
        kind, _, value = positions.partition(":")
        if kind == "entropy-top" and re.fullmatch(r"[01]?\.?[0-9]{1,9}", value):
            share = float(value)
            chosen = f"{kind}:{share:g}" if 0 < share <= 1 else ""
        elif kind in ("first", "every") and re.fullmatch(r"[1-9][0-9]{0,8}", value):
            chosen = ALL_POSITIONS if positions == "every:1" else positions
        else:
            chosen = positions if positions == ALL_POSITIONS or is_file(positions) else ""
        if not chosen:
            raise ValueError(
                "must be all, first:N, every:N, entropy-top:SHARE or file:PATH, as first:100"
            )
        if chosen != ALL_POSITIONS and info.data.get("extra_ids"):
            raise ValueError("must be all with extra_ids, which extend the scores of all positions")
        return chosen

    @field_validator("teacher_topk_max")
    @classmethod
    def _holds_k_min(cls, most: int, info: ValidationInfo) -> int:
        # Training relies on teacher_topk_min: every row must be able to hold so many.
        least = info.data.get("teacher_topk_min", 0)
        if most < least:
            raise ValueError(f"must be teacher_topk_min = {least} or more")
        return most

    def params(self, seed: int) -> ScoreParams:
        """Return the parameters of a scoring; `seed` is for drawn ids."""
        if self.selection == "sampled":
            return ScoreParams(entry_kind="sampled", draws=self.draws, seed=seed, at_student=False)
        most = self.teacher_topk_max
        if self.selection == "top-k":
            return ScoreParams(entry_kind="topk", top_p=1.0, k_min=most, k_max=most)
        return ScoreParams(top_p=self.teacher_top_p, k_min=self.teacher_topk_min, k_max=most)


class TeacherMix(Section):
    """Several teachers of one position: their weights, and what the loss compares with."""

    teacher_weighting: Literal["fixed", "entropy", "agreement", "accuracy", "confidence"] = Field(
        "fixed",
        description="With NAME+NAME: where the weights of the teachers come from. fixed = "
        "--teacher; the others are the softmax of a score: minus the entropy of the teacher at a "
        "position, minus its mean divergence from the other teachers on a response, its accuracy "
        "on a prompt (--teacher-rollouts), or its confidence (--teacher-confidence).",
    )
    teacher_weighting_temperature: float = Field(
        1.0,
        gt=0,
        description="The score of --teacher-weighting is divided by this before the softmax: near "
        "0 the best teacher alone, large = equal weights.",
        validate_default=True,
    )
    teacher_rollouts: Names | None = Field(
        None,
        description="With --teacher-weighting accuracy: NAME=ROLLOUTS,NAME=ROLLOUTS, for every "
        "teacher its own rollouts of the same prompts in this store, sampled with --grader.",
        validate_default=True,
    )
    teacher_confidence: str | None = Field(
        None,
        description="With --teacher-weighting confidence: key of the prompts file that holds "
        'numbers from 0 to 100 by teacher, as {"a": 90, "b": 60}.',
        validate_default=True,
    )
    mixture: Literal["sum", "arithmetic", "geometric"] = Field(
        "sum",
        description="What a loss with several teachers is: the weighted sum of their losses, which "
        "is as exact as that of one teacher; or the loss from their arithmetic or normalised "
        "geometric mean, which is exact at the ids that all of them scored.",
    )

    @field_validator("teacher_weighting_temperature")
    @classmethod
    def _divides_a_score(cls, temperature: float, info: ValidationInfo) -> float:
        if temperature != 1 and info.data.get("teacher_weighting") == "fixed":
            raise ValueError("must be left out with teacher_weighting = fixed, which has no score")
        return temperature

    @field_validator("teacher_rollouts", "teacher_confidence")
    @classmethod
    def _is_read(cls, text: str | None, info: ValidationInfo) -> str | None:
        needs = {"teacher_rollouts": "accuracy", "teacher_confidence": "confidence"}
        kind = needs[info.field_name or ""]
        if (text is not None) != (info.data.get("teacher_weighting") == kind):
            raise ValueError(f"must be given with teacher_weighting = {kind}, and only then")
        return text
