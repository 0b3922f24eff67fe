"""Privileged context by a template: the prompts of the rollouts, in other words for the teacher.

A template is UTF-8 text with the fields {prompt} and {answer}, and {{ }} for braces; a newline at
its end is not part of it. It takes the place of a prompt's text, or of its last user turn's.
"""

import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcask.engine.errors import IdentityError, PromptError
from logitcask.engine.prompts.prompts import Line, read_prompts
from logitcask.engine.types import Prompt

FIELDS = ("prompt", "answer")


@dataclass(frozen=True, slots=True)
class Template:
    parts: tuple[tuple[str, str | None], ...]
    """Literal text and the field behind it; None where no field follows."""

    def of(self, line: Line) -> dict[str, Any]:
        """The keys of a line of a prompts file, with the text in the template's words.

        Raises PromptError where there is no user turn, or no answer that is asked for.
        """
        keys = line.keys
        if "messages" not in keys:
            return {**keys, "prompt": self._filled(line, keys["prompt"])}
        turns = list(keys["messages"])
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
        if last is None:
            line.refuse(
                'field "messages": no turn is the user\'s, and the template replaces the last one',
                "Give this prompt a user turn.",
            )
        text = line.string("content", turns[last].get("content"), f"messages[{last}].")
        turns[last] = {**turns[last], "content": self._filled(line, text)}
        return {**keys, "messages": turns}

    def _filled(self, line: Line, prompt: str) -> str:
        answer = line.keys.get("answer")
        if answer is None and any(field == "answer" for _, field in self.parts):
            line.refuse(
                'field "answer" is missing, and the template asks for it',
                "Give every prompt an answer, or leave {answer} out of the template.",
            )
        values = {"prompt": prompt, "answer": answer, None: ""}
        return "".join(f"{literal}{values[field]}" for literal, field in self.parts)


def read_template(file: Path) -> Template:
    """Raises PromptError for a file that cannot be read, and for anything but its two fields."""
    try:
        text = file.read_text("utf-8-sig").removesuffix("\n")
        parts = list(string.Formatter().parse(text))
    except OSError as error:
        raise PromptError(
            f"{file} cannot be read: {error.strerror or error}",
            hint="Give the path of a text file: --prompt-template FILE.",
        ) from error
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{file}: byte {error.start} is not UTF-8", hint="Save the file as UTF-8."
        ) from error
    except ValueError as error:
        raise PromptError(f"{file}: {error}", hint="Write {{ and }} for braces.") from error
    for _, field, spec, conversion in parts:
        if field is not None and (field not in FIELDS or spec or conversion):
            shown = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise PromptError(
                f"{file}: {{{shown}}} is none of the fields {{prompt}} and {{answer}}",
                hint="Write these alone, and {{ and }} for braces.",
            )
    return Template(tuple((literal, field) for literal, field, _, _ in parts))


def templated(
    file: Path,
    template: Template,
    stored: Iterable[Prompt],
    tokenizer: Any,
    *,
    chat_template: bool,
    max_prompt_tokens: int,
) -> dict[str, Prompt]:
    """id -> the prompt of that line of a prompts file in the template's words.

    stored: the prompts of the rollouts, which the file's must be without the template. Raises
    PromptError for a file that lacks one, IdentityError for one that it says otherwise.
    """
    told: dict[str, Any] = {"chat_template": chat_template, "max_prompt_tokens": max_prompt_tokens}
    plain = {prompt.id: prompt for prompt in read_prompts(file, tokenizer, **told)}
    for prompt in stored:
        if prompt.id not in plain:
            raise PromptError(
                f"{file} has no prompt {prompt.id!r}, which the rollouts answer",
                hint="Give the prompts file that `logitcask rollout` read.",
            )
        if plain[prompt.id].token_ids != prompt.token_ids:
            raise IdentityError(
                f"{file}: prompt {prompt.id!r} is not the one that the rollouts answer: rendered "
                "for this teacher it has other tokens",
                hint="Give the prompts file that `logitcask rollout` read, and a teacher with "
                "the student's chat template; else write the prompts out, for --context.",
            )
    changed = read_prompts(file, tokenizer, **told, change=template.of)
    return {prompt.id: prompt for prompt in changed}
