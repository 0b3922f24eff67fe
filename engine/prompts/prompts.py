"""Prompts files: JSONL lines -> rendered, tokenized prompts. All tokenizers are loaded here.

A line is {"id": "...", "prompt": "..."} or {"id": "...", "messages": [{"role": ..., "content":
...}, ...]}, with an optional "answer"; other keys are kept with the prompt. Prompts files are not
trusted: lines are bounded, and each error names file, line, field, value, rule and fix.
"""

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

from logitcask.engine.errors import ModelError, PromptError
from logitcask.engine.events import EventHandler
from logitcask.engine.prompts.encode import Encoder
from logitcask.engine.prompts.lines import FORM, Line, Turns, refuse
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.types import Prompt

MAX_LINE_BYTES = 1 << 20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
OTHER_FORMATS = {
    b"PAR1": (
        "Parquet",
        'python -c "import pandas; pandas.read_parquet({name!r}).to_json('
        "'new.jsonl', orient='records', lines=True)\"",
    ),
    b"ARROW1": ("Arrow", "datasets.Dataset.from_file({name!r}).to_json('new.jsonl')"),
    b"\xff\xff\xff\xff": ("Arrow", "datasets.Dataset.from_file({name!r}).to_json('new.jsonl')"),
    b"\x1f\x8b": ("gzip", "gunzip -c {quoted} > new.jsonl"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstd -dc {quoted} > new.jsonl"),
    b"\xfd7zXZ": ("xz", "xz -dc {quoted} > new.jsonl"),
    b"BZh": ("bzip2", "bzip2 -dc {quoted} > new.jsonl"),
    b"PK\x03\x04": ("zip", "unzip -p {quoted} > new.jsonl"),
    b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 {quoted} > new.jsonl"),
    b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 {quoted} > new.jsonl"),
    b"[": ("a JSON array", "jq -c '.[]' {quoted} > new.jsonl"),
}
"""First bytes of a file -> its format, and the command that makes a JSONL file of it."""

Change = Callable[[Line, str | Turns], str | Turns]
"""Returns other content for a line, to be rendered in place of its own."""


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a local folder, without running code from it.

    Raises ModelError where there is none or it cannot be read.
    """
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{path} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there",
            hint="save the tokenizer in the same folder: tokenizer.save_pretrained(folder)",
        )
    _check_own_files(path)
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


def _check_own_files(path: Path) -> None:
    """Raise ModelError for a tokenizer whose configuration names a file of another folder."""
    try:
        config = json.loads((path / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # transformers reads it too, and raises
    names = config.get("fast_tokenizer_files") if isinstance(config, dict) else None
    for name in names if isinstance(names, list) else []:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(
                f"{path / 'tokenizer_config.json'} names {name!r}, which is no file of its folder",
                hint="save it again with tokenizer.save_pretrained(folder)",
            )


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
    if first is None or Line(file, *first).is_chat:
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
    rendering: Rendering,
    *,
    max_prompt_tokens: int,
    change: Change | None = None,
    limit: int | None = None,
    on_event: EventHandler = lambda line: None,
) -> list[Prompt]:
    """Read the prompts of a JSONL file, in order; blank lines are skipped, and all lines after the
    first `limit` prompts.

    With the chat template a "prompt" is one user turn; without it "messages" are refused, and a
    text begins with the ids that the tokenizer adds before any text. Notes on these go to
    `on_event`. Raises PromptError at the first invalid line.
    """
    file, line_of = Path(file), dict[str, int]()
    prompts: list[Prompt] = []
    encoder = Encoder(tokenizer, rendering)
    try:
        with file.open("rb") as stream, closing(encoder):
            for number, text in read_lines(file, stream):
                if len(prompts) == limit:
                    break
                line = Line(file, number, text)
                if (name := line.id) in line_of:
                    line.refuse(
                        f'field "id": {name!r} is already the id of line {line_of[name]}',
                        "give every prompt a unique id",
                    )
                line_of[name] = number
                content = line.content(drop_last_assistant=rendering.drop_last_assistant)
                if change is not None:
                    content = change(line, content)
                prompts.append(line.prompt(encoder.token_ids(line, content), max_prompt_tokens))
    except ModelError:  # also an OSError, but of the tokenizer and not of this file
        raise
    except OSError as error:
        raise no_file(file, error) from error
    if not prompts:
        raise PromptError(f"{file} holds no prompt", hint=FORM)
    for note in encoder.notes():
        on_event(f"{file}: {note}")
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
        if number == 1:
            _check_format(file, raw)
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


def _check_format(file: Path, first: bytes) -> None:
    """Raise PromptError for a file of another format, by its first line."""
    for magic, (name, command) in OTHER_FORMATS.items():
        if first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(magic):
            raise PromptError(
                f"{file} is {name}, and prompts are read from JSONL",
                hint="convert it: " + command.format(name=file.name, quoted=shlex.quote(file.name)),
            )
