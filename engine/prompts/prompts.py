"""Prompt files: JSONL lines -> rendered, tokenised prompts. The only place that opens a tokenizer.

A line is {"id": "...", "prompt": "..."} or {"id": "...", "messages": [{"role": ..., "content":
...}, ...]}, with an optional "answer"; every other key travels with the prompt. Prompts files are
not trusted: lines are bounded, and each error names file, line, field, value, rule and way out.
"""

import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from logitcask.engine.errors import ModelError, PromptError
from logitcask.engine.types import Prompt

MAX_LINE_BYTES = 1 << 20
ROLES = ("system", "developer", "user", "assistant", "tool")
TODAY = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
"""What a template that prints the date is told. With the real one, a run resumed after midnight
would meet other prompts than the ones it began with."""
DATE_PARTS = ("%Y", "%y", "%m", "%-m", "%d", "%-d", "%b", "%B", "%a", "%A", "%j")
TIME_PARTS = ("%H", "%I", "%p", "%M", "%S")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a local folder, without running code from it.

    Raises ModelError where there is none or it cannot be read.
    """
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{path} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there",
            hint="Save the tokenizer beside the weights: tokenizer.save_pretrained(folder).",
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
            hint="Save it again with tokenizer.save_pretrained(folder), without code of its own.",
        ) from error


def render(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """Messages through the tokenizer's chat template, up to where the assistant begins.

    Raises ModelError for a tokenizer without a template, and whatever the template itself raises.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template, "
            "and prompts are to be rendered with one",
            hint="Turn the chat template off (prompts are then literal), or take a chat model.",
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
    """Jinja that shadows strftime_now with one that always says TODAY.

    In Jinja because transformers hands no functions to a template; the empty expression at its end
    keeps Jinja from trimming a newline at the template's beginning.
    """
    parts = "".join(
        f"|replace('{part}', '{TODAY.strftime(part)}')" for part in DATE_PARTS + TIME_PARTS
    )
    return f"{{% macro strftime_now(format) %}}{{{{ format{parts} }}}}{{% endmacro %}}{{{{ '' }}}}"


def chat_template_for(file: Path | str, tokenizer: Any, wanted: bool | None) -> bool:
    """Whether these prompts go through the chat template: as wanted, else what alone makes sense.

    Conversations need it, a tokenizer without a template cannot; plain prompts and a tokenizer that
    has one could mean either. Raises PromptError then.
    """
    if wanted is not None or not tokenizer.chat_template:
        return bool(wanted)
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
        hint="say --chat-template (each prompt becomes a user turn) or --no-chat-template",
    )


def no_file(file: Path, error: OSError) -> PromptError:
    if isinstance(error, FileNotFoundError):
        return PromptError(
            f"there is no prompts file {file}", hint="Give the path of a JSONL file."
        )
    return PromptError(
        f"{file} cannot be read: {error.strerror or error}",
        hint="Give the path of a JSONL file that this user may read.",
    )


def read_prompts(
    file: Path | str,
    tokenizer: Any,
    *,
    chat_template: bool,
    max_prompt_tokens: int,
    change: Callable[["Line"], dict[str, Any]] | None = None,
) -> list[Prompt]:
    """Every prompt of a JSONL file, in the file's order. Blank lines are skipped.

    chat_template True renders "messages" (and "prompt" as one user turn) through the template;
    False takes "prompt" literally and refuses "messages". Special tokens are never added.
    change: gives the keys that are rendered in place of a line's own, which were read before.
    Raises PromptError at the first line that cannot be used.
    """
    file = Path(file)
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    try:
        with file.open("rb") as stream:
            for number, text in read_lines(file, stream):
                line = Line(file, number, text)
                if change is not None:
                    line.keys = change(line)
                prompt = line.prompt(tokenizer, chat_template, max_prompt_tokens)
                if prompt.id in line_of:
                    refuse(
                        file,
                        number,
                        f'field "id": {prompt.id!r} is already the id of line {line_of[prompt.id]}',
                        "Give every prompt an id of its own.",
                    )
                line_of[prompt.id] = number
                prompts.append(prompt)
    except ModelError:  # an OSError too, but about the tokenizer and not about this file
        raise
    except OSError as error:
        raise no_file(file, error) from error
    if not prompts:
        raise PromptError(
            f"{file} holds no prompt",
            hint=Line.FORM,
        )
    return prompts


def read_lines(
    file: Path, stream: BinaryIO, most: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of every line that is not blank and has at most `most` bytes."""
    number = 0
    while raw := stream.readline(most + 1):
        number += 1
        if len(raw) > most:
            refuse(
                file,
                number,
                f"the line is longer than {most} bytes",
                "Shorten it, or check that each line ends in a newline.",
            )
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            refuse(file, number, f"byte {error.start} is not UTF-8", "Save the file as UTF-8.")
        if text.strip():
            yield number, text


def refuse(file: Path, number: int, what: str, hint: str) -> NoReturn:
    raise PromptError(f"{file}, line {number}: {what}", hint=hint)


class Line:
    """One line of a prompts file on its way to a prompt; every refusal names the place."""

    FORM = 'Write one JSON object per line: {"id": "...", "prompt": "..."}.'

    def __init__(self, file: Path, number: int, text: str) -> None:
        self.file, self.number = file, number
        self.keys = self.parse(text)

    def refuse(self, what: str, hint: str) -> NoReturn:
        refuse(self.file, self.number, what, hint)

    def parse(self, text: str) -> dict[str, Any]:
        def no_constant(name: str) -> NoReturn:
            raise ValueError(f"{name} is not JSON")

        try:
            keys = json.loads(text, parse_constant=no_constant)
        except RecursionError:
            self.refuse("the JSON is nested too deeply", "Flatten it.")
        except ValueError as error:
            self.refuse(f"not valid JSON: {error}", self.FORM)
        if not isinstance(keys, dict):
            self.refuse(f"the line is {kind(keys)}, not an object", self.FORM)
        return keys

    def string(self, field: str, value: Any, place: str = "") -> str:
        where = f'field "{place}{field}"'
        if not isinstance(value, str):
            self.refuse(f"{where}: {value!r:.80} is {kind(value)}, not a string", "Quote it.")
        if not value.strip():
            self.refuse(f"{where}: {value!r:.80} is empty", "Fill it in, or remove the line.")
        try:
            value.encode()
        except UnicodeEncodeError:
            self.refuse(
                f"{where}: holds half a surrogate pair, which is no text", "Repair the escape."
            )
        return value

    def prompt(self, tokenizer: Any, chat_template: bool, max_prompt_tokens: int) -> Prompt:
        if "id" not in self.keys:
            self.refuse('field "id" is missing', "Give every prompt an id of its own.")
        name = self.string("id", self.keys["id"])
        if ("prompt" in self.keys) == ("messages" in self.keys):
            both = "both are there" if "prompt" in self.keys else "neither is there"
            self.refuse(
                f'fields "prompt" and "messages": {both}, and exactly one is needed',
                'Write "prompt" for plain text or "messages" for a conversation.',
            )
        answer = self.keys.get("answer")
        if answer is not None and not isinstance(answer, str):
            self.refuse(
                f'field "answer": {answer!r:.80} is {kind(answer)}, not a string', "Quote it."
            )
        field = "prompt" if "prompt" in self.keys else "messages"
        text = self.text(tokenizer, field, chat_template)
        token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not token_ids:
            self.refuse(
                f'field "{field}": {text!r:.80} gives no token', "Fill it in, or remove the line."
            )
        if len(token_ids) > max_prompt_tokens:
            self.refuse(
                f'field "{field}": {len(token_ids)} tokens, at most {max_prompt_tokens} may be',
                "Shorten the prompt, or lower max_new_tokens: both share the model's context.",
            )
        known = ("id", "prompt", "messages", "answer")
        extra = {key: value for key, value in self.keys.items() if key not in known}
        return Prompt(id=name, token_ids=tuple(token_ids), answer=answer, extra=extra)

    def text(self, tokenizer: Any, field: str, chat_template: bool) -> str:
        if field == "prompt":
            text = self.string("prompt", self.keys["prompt"])
            if not chat_template:
                return text
            messages = [{"role": "user", "content": text}]
        else:
            if not chat_template:
                self.refuse(
                    'field "messages": a conversation needs the chat template, which is turned off',
                    'Turn the chat template on, or write the rendered text as "prompt".',
                )
            messages = self.messages(self.keys["messages"])
        try:
            return render(tokenizer, messages)
        except ModelError:
            raise
        # A template is a program of the model's author: it may raise anything at all.
        except Exception as error:
            self.refuse(
                f'field "{field}": the chat template refuses it: {type(error).__name__}: {error}',
                "Give the turns in the order and with the roles that the template expects.",
            )

    def messages(self, turns: Any) -> list[dict[str, Any]]:
        if not isinstance(turns, list) or not turns:
            self.refuse(
                f'field "messages": {turns!r:.80} is not a list of turns',
                'Write [{"role": "user", "content": "..."}].',
            )
        for i, turn in enumerate(turns):
            place = f"messages[{i}]."
            if not isinstance(turn, dict):
                self.refuse(
                    f'field "messages[{i}]": {turn!r:.80} is {kind(turn)}, not an object',
                    'Write {"role": "user", "content": "..."}.',
                )
            role = turn.get("role")
            if role not in ROLES:
                self.refuse(
                    f'field "{place}role": {role!r:.80} is none of {", ".join(ROLES)}',
                    "Use one of these roles.",
                )
            # An assistant that only calls tools has no text.
            if turn.get("content") is not None or not turn.get("tool_calls"):
                self.string("content", turn.get("content"), place)
        if turns[-1]["role"] not in ("user", "tool"):
            self.refuse(
                f'field "messages[{len(turns) - 1}].role": a conversation may not end with '
                f"{turns[-1]['role']!r}: the response is what follows",
                "End it in a user or tool turn.",
            )
        return turns


def kind(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
