"""Values of a configuration as TOML for people: each key below its help, defaults as comments."""

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from logitcask.engine.config.parse.toml import fields_of, toml_value
from logitcask.engine.config.sections import RunConfig

WIDTH = 96
"""Characters of a comment line."""

SHOWN: Mapping[str, tuple[str, ...]] = {
    "student": ("model",),
    "teacher": ("model", "name"),
    "prompts": ("file", "chat_template"),
    "store": ("url", "rollouts"),
    "rollout": ("n", "max_new_tokens", "temperature", "student_topk"),
    "score": ("teacher_topk_min", "teacher_topk_max"),
    "train": ("objective", "learning_rate", "pack_length", "gradient_checkpointing"),
    "lora": ("r",),
    "eval": ("prompts", "every", "max_new_tokens"),
    "loop": ("rounds", "prompts_per_round", "updates_per_round"),
    "runner": ("kind",),
    "run": ("out", "device", "dtype"),
}
"""Section -> keys that a first run may need; one that is not set is shown as a comment."""

EXAMPLES: Mapping[tuple[str, str], Any] = {
    ("prompts", "chat_template"): True,
    ("train", "pack_length"): 8192,
    ("eval", "prompts"): "heldout.jsonl",
    ("lora", "r"): 16,
}
"""Values in comments for keys whose default says little."""


def commented_toml(values: Mapping[str, Mapping[str, Any]], head: str) -> str:
    """Return the values as TOML, below `head` as a comment.

    values: section -> key -> value. Every comment is the first sentence of the key's own help.
    """
    lines = [*_comment(head)]
    for section in RunConfig.model_fields:
        keys = values.get(section, {})
        shown = SHOWN.get(section, ())
        names = [*shown, *(key for key in keys if key not in shown)]
        if not names:
            continue
        lines += ["", f"[{section}]"]
        fields = fields_of(section)
        for name in names:
            lines += _comment(first_sentence(fields[name].description or ""))
            if name in keys:
                lines.append(f"{name} = {toml_value(keys[name])}")
            else:
                example = EXAMPLES.get((section, name), fields[name].default)
                lines.append(f"# {name} = {toml_value(example)}")
    return "\n".join(lines) + "\n"


def first_sentence(text: str) -> str:
    """Return a help text up to the end of its first sentence."""
    return re.split(r"(?<=[.]) +(?=[A-Z])", " ".join(text.split()), maxsplit=1)[0]


def _comment(text: str) -> Iterator[str]:
    for paragraph in text.splitlines():
        for line in textwrap.wrap(paragraph, WIDTH - 2, break_on_hyphens=False) or [""]:
            yield f"# {line}".rstrip()
