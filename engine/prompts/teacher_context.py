"""Teacher context by a template: other prompts for the teacher, made from those of the rollouts.

A template is UTF-8 text with the fields {prompt} and {answer}, and {{ }} for braces; a newline at
its end is not part of it. It replaces the text of a prompt, or of its last user turn.
"""

import string
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from logitcask.engine.errors import IdentityError, PromptError
from logitcask.engine.prompts.lines import Line, Turns
from logitcask.engine.prompts.prompts import read_prompts
from logitcask.engine.prompts.source import Source
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.types import Prompt

FIELDS = ("prompt", "answer")


@dataclass(frozen=True, slots=True)
class Template:
    parts: tuple[tuple[str, str | None], ...]
    """Literal text and the field after it; None where no field follows."""

    def fill(self, line: Line, content: str | Turns) -> str | Turns:
        """Return the content of a line of a prompts file, with its text in the template.

        Raises PromptError where there is no user turn, or no answer that the template needs.
        """
        if isinstance(content, str):
            return self._text(line, content)
        last = max((i for i, turn in enumerate(content) if turn["role"] == "user"), default=None)
        if last is None:
            line.refuse(
                f'field "{line.field}": no turn is the user\'s, and the template replaces the last '
                "one",
                "give this prompt a user turn",
            )
        place = f"{line.field}[{last}].content"
        text = self._text(line, line.string(place, content[last].get("content")))
        return [*content[:last], {**content[last], "content": text}, *content[last + 1 :]]

    def _text(self, line: Line, prompt: str) -> str:
        answer = line.answer
        if answer is None and any(field == "answer" for _, field in self.parts):
            line.refuse(
                'field "answer" is missing, and the template contains it',
                "give every prompt an answer, or leave {answer} out of the template",
            )
        values = {"prompt": prompt, "answer": answer, None: ""}
        return "".join(f"{literal}{values[field]}" for literal, field in self.parts)


def read_template(file: Path) -> Template:
    """Read a template; raises PromptError for an unreadable file, and for any other field."""
    try:
        text = file.read_text("utf-8-sig").removesuffix("\n")
        parts = list(string.Formatter().parse(text))
    except OSError as error:
        raise PromptError(
            f"{file} cannot be read: {error.strerror or error}",
            hint="give the path of a text file: --prompt-template FILE",
        ) from error
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{file}: byte {error.start} is not UTF-8", hint="save the file as UTF-8"
        ) from error
    except ValueError as error:
        raise PromptError(f"{file}: {error}", hint="write {{ and }} for braces") from error
    for _, field, spec, conversion in parts:
        if field is not None and (field not in FIELDS or spec or conversion):
            shown = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise PromptError(
                f"{file}: {{{shown}}} is none of the fields {{prompt}} and {{answer}}",
                hint="write these alone, and {{ and }} for braces",
            )
    return Template(tuple((literal, field) for literal, field, _, _ in parts))


def templated(
    source: Source,
    template: Template | None,
    stored: Iterable[Prompt],
    tokenizer: Any,
    rendering: Rendering,
    *,
    max_prompt_tokens: int,
    student: tuple[Any, Rendering] | None = None,
) -> dict[str, Prompt]:
    """Return id -> prompt of a prompts file, with the template; None = without one.

    stored: the prompts of the rollouts, equal to those of the file without the template. student:
    tokenizer and rendering of these; None = those of the teacher. Raises PromptError for a file
    that lacks one, IdentityError for one with other tokens.
    """
    read = partial(read_prompts, source, tokenizer, rendering, max_prompt_tokens=max_prompt_tokens)
    if student is None:
        _check_stored(source, read(), stored, "this teacher")
    else:
        # The teacher's limit of tokens is not the student's.
        plain = read_prompts(source, *student, max_prompt_tokens=1 << 62)
        _check_stored(source, plain, stored, "the student")
    change = None if template is None else template.fill
    return {prompt.id: prompt for prompt in read(change=change)}


def _check_stored(
    source: Source, read: Iterable[Prompt], stored: Iterable[Prompt], of: str
) -> None:
    """Raise as `templated` unless the prompts of a file are those of the rollouts."""
    plain = {prompt.id: prompt for prompt in read}
    for prompt in stored:
        if prompt.id not in plain:
            raise PromptError(
                f"{source.file} has no prompt {prompt.id!r}, which the rollouts contain",
                hint="give the prompts file that `logitcask rollout` read",
            )
        if plain[prompt.id].token_ids != prompt.token_ids:
            raise IdentityError(
                f"{source.file}: prompt {prompt.id!r} differs from the prompt of the rollouts: "
                f"rendered for {of} it has other tokens",
                hint="give the prompts file that `logitcask rollout` read, and a teacher with "
                "the student's chat template; or write the rendered prompts to a --context file",
            )
