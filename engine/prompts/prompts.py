"""Lines of prompts -> rendered, tokenized prompts. All tokenizers are loaded here.

A line is {"id": "...", "prompt": "..."} or {"id": "...", "messages": [{"role": ..., "content":
...}, ...]}, with an optional "answer"; other keys are kept with the prompt. Prompts files are not
trusted: lines are bounded, and each error names file, line, field, value, rule and fix.
"""

import json
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from logitcask.engine.errors import LogitcaskError, ModelError, PromptError
from logitcask.engine.events import EventHandler, counted
from logitcask.engine.prompts.encode import Encoder
from logitcask.engine.prompts.lines import FORM, Line, Turns
from logitcask.engine.prompts.source import Source, no_file, open_source
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.types import Prompt

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
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


def chat_template_for(source: Source, tokenizer: Any, requested: bool | None) -> bool:
    """Return True if these prompts are rendered by the chat template.

    requested: None = True for conversations, False for a tokenizer without a template. Plain
    prompts with a tokenizer that has one are ambiguous: raises PromptError.
    """
    if requested is not None or not tokenizer.chat_template:
        return bool(requested)
    try:
        first = next(source.lines(), None)
    except OSError as error:
        raise no_file(source.file, error) from error
    if first is None or first.is_chat:
        return True
    raise PromptError(
        f"{source.file} holds plain prompts, and the tokenizer has a chat template: either could "
        "be meant",
        hint="give --chat-template (each prompt becomes a user turn) or --no-chat-template",
    )


def read_prompts(
    source: Source | Path | str,
    tokenizer: Any,
    rendering: Rendering,
    *,
    max_prompt_tokens: int,
    change: Change | None = None,
    limit: int | None = None,
    on_event: EventHandler = lambda line: None,
) -> list[Prompt]:
    """Read the prompts of a source, in order, and no line after the first `limit` prompts.

    With the chat template a "prompt" is one user turn; without it "messages" are refused, and a
    text begins with the ids that the tokenizer adds before any text. Notes on these go to
    `on_event`. Raises PromptError at the first invalid line.
    """
    source = source if isinstance(source, Source) else open_source(source, limit=limit)
    file, number_of = source.file, dict[str, int]()
    prompts: list[Prompt] = []
    encoder = Encoder(tokenizer, rendering)
    try:
        with closing(encoder):
            # A line after the limit is not read: it may be no prompt.
            lines = islice(source.lines(), limit)
            for line in counted(f"read {file.name}", lines, unit="prompts"):
                if (name := line.id) in number_of:
                    line.refuse(
                        f'field "id": {name!r} is already the id of {line.unit} {number_of[name]}',
                        "give every prompt a unique id",
                    )
                number_of[name] = line.number
                content = line.content(drop_last_assistant=rendering.drop_last_assistant)
                if change is not None:
                    content = change(line, content)
                prompts.append(line.prompt(encoder.token_ids(line, content), max_prompt_tokens))
    except LogitcaskError:  # some are an OSError too, but none of this file
        raise
    except OSError as error:
        raise no_file(file, error) from error
    if not prompts:
        raise PromptError(f"{file} holds no prompt", hint=FORM)
    for note in encoder.notes():
        on_event(f"{file}: {note}")
    return prompts
