"""The text of a prompt: its template put around it or taken away, and its line in a file."""

import json
from pathlib import Path
from typing import Any

from logitcask.engine.errors import ConfigError
from logitcask.engine.prompts.lines import Line, Turns
from logitcask.engine.prompts.teacher_context import Template, read_template

Frame = tuple[str, str]
"""Texts before and after the prompt in a template; both empty = none."""

TEMPLATES = {
    "boxed": Template(
        (
            ("", "prompt"),
            (" Please reason step by step, and put your final answer within \\boxed{}.", None),
        )
    )
}
"""The teacher's template of Fig. 9 (JustRL)."""


def template_named(name: str) -> Template:
    """Return a template by its name or from its file."""
    return TEMPLATES[name] if name in TEMPLATES else read_template(Path(name))


def frame_of(name: str) -> Frame:
    """Return the texts before and after the prompt in a template; "" = none."""
    if not name:
        return "", ""
    parts = template_named(name).parts
    fields = [each for _, each in parts if each is not None]
    if fields != ["prompt"]:
        raise ConfigError(
            f"--strip-template {name}: it has the fields {fields}",
            hint="give a template with {prompt} once and no other field, or its text cannot be "
            "taken away",
        )
    at = next(i for i, (_, each) in enumerate(parts) if each is not None)
    before = "".join(text for text, _ in parts[: at + 1])
    return before, "".join(text for text, _ in parts[at + 1 :])


def stripped(line: Line, frame: Frame, *, strict: bool) -> str | Turns:
    """Return the content of a line without the text of a template around its prompt.

    strict: raise PromptError for a prompt without that text.
    """
    content = line.content(drop_last_assistant=True)
    if frame == ("", ""):
        return content
    text = text_of(line, content)
    found = without(text, frame)
    if found is None:
        if strict:
            line.refuse(
                f"the prompt {text!r:.80} does not have the text of --strip-template",
                "leave it out, or give the template that these prompts have",
            )
        return content
    return _with(content, found)


def without(text: str, frame: Frame) -> str | None:
    """Return a text without what a template has before and after it; None where it lacks that."""
    before, after = frame
    inner = text.strip()
    if len(inner) < len(before) + len(after):
        return None
    if not (inner.startswith(before.lstrip()) and inner.endswith(after.rstrip())):
        return None
    return inner.removeprefix(before.lstrip()).removesuffix(after.rstrip()).strip() or None


def _last_user(content: Turns) -> int:
    # The turn that a template replaces; a conversation without one is refused there.
    return max((i for i, turn in enumerate(content) if turn["role"] == "user"), default=-1)


def text_of(line: Line, content: str | Turns) -> str:
    """Return the text of a prompt, of a conversation that of its last user turn."""
    if isinstance(content, str):
        return content
    at = _last_user(content)
    return line.string(f"{line.field}[{at % len(content)}].content", content[at].get("content"))


def _with(content: str | Turns, text: str) -> str | Turns:
    """Return the content with another text."""
    if isinstance(content, str):
        return text
    at = _last_user(content)
    turns = list(content)
    turns[at] = {**turns[at], "content": text}
    return turns


def written(line: Line, content: str | Turns, fill: Template | None, name: str, **more: Any) -> str:
    """Return a line of ours: id, prompt or messages, answer, and the other keys of the line."""
    if fill is not None:
        content = fill.fill(line, content)
    own = line.columns
    used = {"id", "prompt", "messages", "answer", own.prompt_column, own.answer_column}
    keys = {"id": name, "prompt" if isinstance(content, str) else "messages": content}
    if line.answer is not None:
        keys["answer"] = line.answer
    others = {key: value for key, value in line.keys.items() if key not in used | {own.id_column}}
    return json.dumps({**keys, **others, **more}, ensure_ascii=False) + "\n"
