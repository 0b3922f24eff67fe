"""Sections of prompts: where they are read, by which columns, how they are rendered and graded."""

import json
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field, field_validator

from logitcask.engine.config.parse.strict_json import parse_json
from logitcask.engine.config.section import Positive, Section

HUB = "hub:"
"""Beginning of a data set on the Hub, in place of a path: hub:ORG/NAME or hub:ORG/NAME@REVISION."""
GRADER_NAMES = {
    "exact": 'its last \\boxed{}, "Answer:", "####" or line is the prompt\'s "answer"',
    "contains": "it contains the words of the answer",
    "normalised": "its final answer is equal after case, blanks, LaTeX and the form of numbers",
}
"""Name -> when a response is right. The functions: engine/prompts/graders.py."""

LISTED_GRADERS = ", ".join(map(repr, GRADER_NAMES))
GRADER_MEANINGS = (
    "; ".join(f"{name} = {meaning}" for name, meaning in GRADER_NAMES.items())
    + "; or MODULE:FUNCTION, installed code called with (prompt, response)."
)
"""For the help of a key that names a grader."""


class Columns(Section):
    """The part of a data set that is read, and the names of its columns."""

    split: str = Field(
        "",
        description="Split of a data set, as train; may be left out where it has one only.",
    )
    subset: str = Field(
        "", description="Subset (configuration) of a data set on the Hub; empty = its default."
    )
    prompt_column: str = Field(
        "",
        description="Column or JSON key that holds the prompt, as text or as a list of turns; "
        'empty = "prompt" or "messages". A point leads into an object: reward_model.ground_truth.',
    )
    answer_column: str = Field(
        "", description='Column or key that holds the answer for graders; empty = "answer".'
    )
    id_column: str = Field(
        "",
        description='Column or key that holds the id; empty = "id", or the number of the line or '
        "row.",
    )


class Prompts(Columns):
    file: Path = Field(
        description="Prompts: a JSONL file, "
        'one {"id", "prompt"} or {"id", "messages"} per line, optional "answer"; Parquet, a file '
        "or a folder; a folder that `datasets` saved; or hub:ORG/NAME[@REVISION]."
    )
    limit: Positive | None = Field(
        None,
        description="Read only the first prompts of the file, so many, for a trial run; default: "
        "all. They make another set than all prompts do, which needs its own --rollouts name.",
    )
    system_prompt: str = Field(
        "",
        description="System turn before every prompt that has none of its own, rendered by the "
        "chat template.",
    )
    chat_template: bool | None = Field(
        None,
        description="Render prompts through the tokenizer's chat template, or take their text as "
        "it is. Needed where both make sense: plain prompts and a tokenizer with a template.",
    )
    chat_template_kwargs: str = Field(
        "",
        description="Variables of the chat template for every prompt, as a JSON object such as "
        '{"enable_thinking": false}, or a table in TOML; a line\'s own "chat_template_kwargs" '
        "override them.",
    )
    drop_last_assistant: bool = Field(
        False,
        description="Leave out the assistant turn at the end of a conversation, as of a dataset "
        "for fine-tuning; the response takes its place.",
    )

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _is_an_object(cls, given: Any) -> Any:
        """Return an object or its JSON as JSON, and "" for an empty one."""
        values = parse_json(given) if isinstance(given, str) and given.strip() else given or {}
        if not isinstance(values, dict):
            raise ValueError('must be a JSON object, such as {"enable_thinking": false}')
        text = json.dumps(values, sort_keys=True, allow_nan=False, default=_no_json)
        # A table of TOML may hold numbers and depths that a line of a prompts file may not.
        return text if parse_json(text) else ""


def is_hub(file: Path) -> bool:
    """Return True for a data set on the Hub."""
    return str(file).startswith(HUB)


def _no_json(value: Any) -> NoReturn:
    raise ValueError(f"{value} is no JSON value")
