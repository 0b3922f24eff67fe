"""Prompts files: JSONL lines -> rendered, tokenized prompts. All tokenizers are loaded here.

A line is {"id": "...", "prompt": "..."} or {"id": "...", "messages": [{"role": ..., "content":
...}, ...]}, with an optional "answer"; other keys are kept with the prompt. Prompts files are not
trusted: lines are bounded, and each error names file, line, field, value, rule and fix.
"""

import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from logitcask.engine.errors import ModelError, PromptError
from logitcask.engine.types import Prompt

MAX_LINE_BYTES = 1 << 20
UNIQUE_ID = "give every prompt a unique id"
ROLES = ("system", "developer", "user", "assistant", "tool")
TODAY = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
"""The date for templates that print it. With the real one, a run resumed after midnight would have
other prompts."""
DATE_PARTS = ("%Y", "%y", "%m", "%-m", "%d", "%-d", "%b", "%B", "%a", "%A", "%j")
TIME_PARTS = ("%H", "%I", "%p", "%M", "%S")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a local folder, without running code from it.

    Raises ModelError where there is none or it cannot be read.
    """
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{path} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there",
            hint="save the tokenizer in the same folder: tokenizer.save_pretrained(folder)",
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, use_fast=True
        )
    # For broken files, transformers and tokenizers raise anything from OSError to bare Exception.
    except Exception as error:
        raise ModelError(
            f"the tokenizer in {path} cannot be loaded: {type(error).__name__}: {error}",
            hint="save it again with tokenizer.save_pretrained(folder), as one without own code",
        ) from error


def render(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """Render messages by the tokenizer's chat template, with the beginning of the response.

    Raises ModelError for a tokenizer without a template, and any error of the template itself.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template, "
            "and prompts are to be rendered with one",
            hint="turn the chat template off (prompts are then literal), or use a chat model",
        )
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = fixed_clock() + template
    text: str = tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
        date_string=TODAY.strftime("%d %b %Y"),
    )
    return text


def fixed_clock() -> str:
    """Return Jinja code that replaces strftime_now by a macro for TODAY.

    In Jinja because transformers passes no functions to a template; the empty expression at the end
    keeps Jinja from trimming a newline at the beginning of the template.
    """
    parts = "".join(
        f"|replace('{part}', '{TODAY.strftime(part)}')" for part in DATE_PARTS + TIME_PARTS
    )
    return f"{{% macro strftime_now(format) %}}{{{{ format{parts} }}}}{{% endmacro %}}{{{{ '' }}}}"


def chat_template_for(file: Path | str, tokenizer: Any, requested: bool | None) -> bool:
    """Return True if these prompts are rendered by the chat template.

    requested: None = True for conversations, False for a tokenizer without a template. Plain
    prompts with a tokenizer that has one are ambiguous: raises PromptError.
    """
    if requested is not None or not tokenizer.chat_template:
        return bool(requested)
    file = Path(file)
    try:
        with file.open("rb") as stream:
            first = next(read_lines(file, stream), None)
    except OSError as error:
        raise no_file(file, error) from error
    if first is None or "messages" in Line(file, *first).keys:
        return True
    raise PromptError(
        f"{file} holds plain prompts, and the tokenizer has a chat template: either could be meant",
        hint="give --chat-template (each prompt becomes a user turn) or --no-chat-template",
    )


def no_file(file: Path, error: OSError) -> PromptError:
    if isinstance(error, FileNotFoundError):
        return PromptError(f"there is no prompts file {file}", hint="give the path of a JSONL file")
    return PromptError(
        f"{file} cannot be read: {error.strerror or error}",
        hint="give the path of a JSONL file that this user may read",
    )


def read_prompts(
    file: Path | str,
    tokenizer: Any,
    *,
    chat_template: bool,
    max_prompt_tokens: int,
    change: Callable[["Line"], dict[str, Any]] | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Read the prompts of a JSONL file, in order; blank lines are skipped, and all lines after the
    first `limit` prompts.

    chat_template: True renders "messages" (and "prompt" as one user turn) by the template; False
    takes "prompt" literally and rejects "messages". Special tokens are never added. change: returns
    other keys for a line, to be rendered instead. Raises PromptError at the first invalid line.
    """
    file = Path(file)
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    try:
        with file.open("rb") as stream:
            for number, text in read_lines(file, stream):
                if len(prompts) == limit:
                    break
                line = Line(file, number, text)
                if change is not None:
                    line.keys = change(line)
                prompt = line.prompt(tokenizer, chat_template, max_prompt_tokens)
                if prompt.id in line_of:
                    refuse(
                        file,
                        number,
                        f'field "id": {prompt.id!r} is already the id of line {line_of[prompt.id]}',
                        UNIQUE_ID,
                    )
                line_of[prompt.id] = number
                prompts.append(prompt)
    except ModelError:  # also an OSError, but of the tokenizer and not of this file
        raise
    except OSError as error:
        raise no_file(file, error) from error
    if not prompts:
        raise PromptError(f"{file} holds no prompt", hint=Line.FORM)
    return prompts


def read_lines(
    file: Path, stream: BinaryIO, most: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of every line that is not blank.

    Raises PromptError for a line of more than `most` bytes, or of other text than UTF-8.
    """
    number = 0
    while raw := stream.readline(most + 1):
        number += 1
        if len(raw) > most:
            refuse(
                file,
                number,
                f"the line is longer than {most} bytes",
                "shorten it, or check that each line ends in a newline",
            )
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            refuse(file, number, f"byte {error.start} is not UTF-8", "save the file as UTF-8")
        if text.strip():
            yield number, text


def refuse(file: Path, number: int, cause: str, hint: str) -> NoReturn:
    raise PromptError(f"{file}, line {number}: {cause}", hint=hint)


class Line:
    """One line of a prompts file; every error names file and line."""

    FORM = 'write one JSON object per line: {"id": "...", "prompt": "..."}'

    def __init__(self, file: Path, number: int, text: str) -> None:
        self.file, self.number = file, number
        self.keys = self.parse(text)

    def refuse(self, cause: str, hint: str) -> NoReturn:
        refuse(self.file, self.number, cause, hint)

    def parse(self, text: str) -> dict[str, Any]:
        def no_constant(name: str) -> NoReturn:
            raise ValueError(f"{name} is not JSON")

        try:
            keys = json.loads(text, parse_constant=no_constant)
        except RecursionError:
            self.refuse("the JSON is nested too deeply", "flatten it")
        except ValueError as error:
            self.refuse(f"not valid JSON: {error}", self.FORM)
        if not isinstance(keys, dict):
            self.refuse(f"the line is {kind(keys)}, not an object", self.FORM)
        return keys

    def string(self, field: str, value: Any, place: str = "") -> str:
        where = f'field "{place}{field}"'
        if not isinstance(value, str):
            self.refuse(f"{where}: {value!r:.80} is {kind(value)}, not a string", "quote it")
        if not value.strip():
            self.refuse(f"{where}: {value!r:.80} is empty", "fill it in, or remove the line")
        try:
            value.encode()
        except UnicodeEncodeError:
            self.refuse(
                f"{where}: holds half a surrogate pair, which is no text", "repair the escape"
            )
        return value

    def prompt(self, tokenizer: Any, chat_template: bool, max_prompt_tokens: int) -> Prompt:
        """Return the prompt, rendered and tokenized."""
        if "id" not in self.keys:
            self.refuse('field "id" is missing', UNIQUE_ID)
        name = self.string("id", self.keys["id"])
        if ("prompt" in self.keys) == ("messages" in self.keys):
            found = "both are present" if "prompt" in self.keys else "both are missing"
            self.refuse(
                f'fields "prompt" and "messages": {found}, and exactly one is needed',
                'write "prompt" for plain text or "messages" for a conversation',
            )
        answer = self.keys.get("answer")
        if answer is not None and not isinstance(answer, str):
            self.refuse(
                f'field "answer": {answer!r:.80} is {kind(answer)}, not a string', "quote it"
            )
        field = "prompt" if "prompt" in self.keys else "messages"
        text = self.text(tokenizer, field, chat_template)
        token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not token_ids:
            self.refuse(
                f'field "{field}": {text!r:.80} gives no token', "fill it in, or remove the line"
            )
        if len(token_ids) > max_prompt_tokens:
            self.refuse(
                f'field "{field}": {len(token_ids)} tokens, at most {max_prompt_tokens} may be',
                "shorten the prompt, or lower max_new_tokens: both share the model's context",
            )
        known = ("id", "prompt", "messages", "answer")
        extra = {key: value for key, value in self.keys.items() if key not in known}
        return Prompt(id=name, token_ids=tuple(token_ids), answer=answer, extra=extra)

    def text(self, tokenizer: Any, field: str, chat_template: bool) -> str:
        """Return the rendered text of a field."""
        if field == "prompt":
            text = self.string("prompt", self.keys["prompt"])
            if not chat_template:
                return text
            messages = [{"role": "user", "content": text}]
        else:
            if not chat_template:
                self.refuse(
                    'field "messages": a conversation needs the chat template, which is turned off',
                    'turn the chat template on, or write the rendered text as "prompt"',
                )
            messages = self.messages(self.keys["messages"])
        try:
            return render(tokenizer, messages)
        except ModelError:
            raise
        # A template is a program of the model's author: it may raise any exception.
        except Exception as error:
            self.refuse(
                f'field "{field}": the chat template refuses it: {type(error).__name__}: {error}',
                "give the turns in the order and with the roles that the template expects",
            )

    def messages(self, turns: Any) -> list[dict[str, Any]]:
        """Check the turns of a conversation."""
        if not isinstance(turns, list) or not turns:
            self.refuse(
                f'field "messages": {turns!r:.80} is not a list of turns',
                'write [{"role": "user", "content": "..."}]',
            )
        for i, turn in enumerate(turns):
            place = f"messages[{i}]."
            if not isinstance(turn, dict):
                self.refuse(
                    f'field "messages[{i}]": {turn!r:.80} is {kind(turn)}, not an object',
                    'write {"role": "user", "content": "..."}',
                )
            role = turn.get("role")
            if role not in ROLES:
                self.refuse(
                    f'field "{place}role": {role!r:.80} is none of {", ".join(ROLES)}',
                    "use one of these roles",
                )
            # The turn of an assistant that only calls tools has no text.
            if turn.get("content") is not None or not turn.get("tool_calls"):
                self.string("content", turn.get("content"), place)
        if turns[-1]["role"] not in ("user", "tool"):
            self.refuse(
                f'field "messages[{len(turns) - 1}].role": a conversation may not end with '
                f"{turns[-1]['role']!r}: the response follows it",
                "end it in a user or tool turn",
            )
        return turns


def kind(value: Any) -> str:
    """Return the JSON name of a value's type, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
