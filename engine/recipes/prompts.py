"""Prompts of the teacher's kind: its template, no duplicates, and some from elsewhere.

arXiv 2604.13016, section 5.2: the teacher's own prompt template (Fig. 9) and prompts of its own
training (Fig. 10) help; the latter lower the student's entropy, which prompts of another
distribution, mixed in, prevent.

Files are read and written line by line: in memory are BLOCK lines, the ids, the texts or vectors of
`against`, and the mixed prompts.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from logitcask.engine.commands.resolve import columns_of
from logitcask.engine.config.recipes import PromptRecipe
from logitcask.engine.errors import ConfigError, LogitcaskError, PromptError
from logitcask.engine.prompts.lines import Line, Turns
from logitcask.engine.prompts.source import Source, no_file, open_source
from logitcask.engine.prompts.teacher_context import Template, read_template
from logitcask.engine.recipes.duplicates import BLOCK, Nearest, nearest

TEMPLATES = {
    "boxed": Template(
        (
            ("", "prompt"),
            (" Please reason step by step, and put your final answer within \\boxed{}.", None),
        )
    )
}
"""The teacher's template of Fig. 9 (JustRL)."""

MIXED = "mixed_from"
"""Key of a mixed prompt: the name of its file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptReport:
    out: Path
    read: int
    """Prompts of the input."""
    exact_duplicates: int
    """Dropped, as `against` has their text; `near_duplicates`: one that is similar."""
    near_duplicates: int
    kept: int
    mixed: int
    share: float
    """Of the mixed prompts in the result."""
    method: str
    """Of the search for near duplicates; "" without one."""
    template: str


@dataclass
class _Counts:
    read: int = 0
    exact: int = 0
    near: int = 0
    kept: int = 0
    ids: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Reference:
    """The prompts that are dropped."""

    exact: frozenset[bytes]
    search: Nearest
    method: str


def run_prompt_recipe(file: Path, settings: PromptRecipe) -> PromptReport:
    """Write the prompts of `file` with another template, without duplicates, and mixed.

    Raises ConfigError for settings without effect and for a missing package, PromptError for an
    invalid line, a prompt without the template that it is said to have, an id that two prompts
    have, and fewer prompts to mix than are needed.
    """
    fill, frame, reference = check_prompt_recipe(file, settings)
    counts = _Counts()
    part = settings.out.with_name(f".{settings.out.name}.part")
    try:
        with part.open("w", encoding="utf-8") as written:
            source = open_source(file, columns_of(settings))
            for text in _kept(source, settings, fill, frame, reference, counts):
                written.write(text)
        if not counts.kept:
            raise PromptError(
                f"{file}: none of {counts.read} prompts is left",
                hint="compare with other prompts by --against, or give a larger --threshold",
            )
        mixed = _mixed(settings, fill, frame, counts) if settings.mix is not None else []
        if mixed:
            _interleave(part, mixed, counts.kept, settings.seed)
        part.replace(settings.out)
    finally:
        part.unlink(missing_ok=True)
    return PromptReport(
        out=settings.out,
        read=counts.read,
        exact_duplicates=counts.exact,
        near_duplicates=counts.near,
        kept=counts.kept,
        mixed=len(mixed),
        share=len(mixed) / (counts.kept + len(mixed)),
        method="" if reference is None else reference.method,
        template=settings.template,
    )


def check_prompt_recipe(
    file: Path, settings: PromptRecipe
) -> "tuple[Template | None, tuple[str, str], _Reference | None]":
    """Raise what would stop `run_prompt_recipe` before its first line; read templates and
    `against`, and return both.
    """
    _check(settings)
    fill = _template(settings.template) if settings.template else None
    frame = _frame(settings.strip_template)
    for source in _sources(file, settings):
        if next(_lines(source), None) is None:
            raise PromptError(f"{source.file} holds no prompt", hint="give a file with prompts")
    return fill, frame, _reference(settings, frame, fill)


def _sources(file: Path, settings: PromptRecipe) -> list[Source]:
    """Return the input, and the prompts to mix."""
    mix = [] if settings.mix is None else [open_source(settings.mix)]
    return [open_source(file, columns_of(settings)), *mix]


def _lines(source: Source) -> Iterator[Line]:
    try:
        yield from source.lines()
    except LogitcaskError:  # some are an OSError too, but none of this file
        raise
    except OSError as error:
        raise no_file(source.file, error) from error


def _check(settings: PromptRecipe) -> None:
    cause = hint = ""
    if settings.out.exists():
        cause, hint = f"--out {settings.out}: it exists", "remove it, or give another path"
    elif not (settings.template or settings.strip_template or settings.against or settings.mix):
        cause = "none of --template, --strip-template, --against and --mix is given"
        hint = "give at least one: nothing would change"
    elif settings.embedding_model and settings.against is None:
        cause = f"--embedding-model {settings.embedding_model} without --against"
        hint = "give the prompts to compare with: --against FILE"
    if cause:
        raise ConfigError(cause, hint=hint)


def _template(name: str) -> Template:
    """Return a template by its name or from its file."""
    return TEMPLATES[name] if name in TEMPLATES else read_template(Path(name))


def _frame(name: str) -> tuple[str, str]:
    """Return the texts before and after the prompt in a template; "" = none."""
    if not name:
        return "", ""
    parts = _template(name).parts
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


def _kept(
    source: Source,
    settings: PromptRecipe,
    fill: Template | None,
    frame: tuple[str, str],
    reference: _Reference | None,
    counts: _Counts,
) -> Iterator[str]:
    """Yield the lines of the prompts that are kept, in order."""
    lines = _lines(source)
    while block := list(islice(lines, BLOCK)):
        contents = [_stripped(line, frame, strict=True) for line in block]
        texts = [_text(line, each) for line, each in zip(block, contents, strict=True)]
        counts.read += len(block)
        drop = _duplicates(texts, settings.threshold, reference, counts)
        for line, content, dropped in zip(block, contents, drop, strict=True):
            if not dropped:
                _take_id(line, line.id, counts)
                counts.kept += 1
                yield _written(line, content, fill, line.id)


def _duplicates(
    texts: list[str], threshold: float, reference: _Reference | None, counts: _Counts
) -> list[bool]:
    if reference is None:
        return [False] * len(texts)
    exact = [_key(text) in reference.exact for text in texts]
    near = [bool(each) for each in reference.search(texts) >= threshold]
    counts.exact += sum(exact)
    counts.near += sum(b and not a for a, b in zip(exact, near, strict=True))
    return [a or b for a, b in zip(exact, near, strict=True)]


def _reference(
    settings: PromptRecipe, frame: tuple[str, str], fill: Template | None
) -> _Reference | None:
    if settings.against is None:
        return None
    # These may have either template, or none: the tasks are compared.
    own = _frame(settings.template) if fill is not None else ("", "")
    texts = []
    for line in _lines(open_source(settings.against)):
        text = _text(line, _stripped(line, frame, strict=False))
        texts.append(_without(text, own) or text)
    if not texts:
        raise PromptError(
            f"{settings.against} holds no prompt", hint="give prompts to compare with"
        )
    search, method = nearest(texts, settings.embedding_model)
    return _Reference(frozenset(map(_key, texts)), search, method)


def _key(text: str) -> bytes:
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()[:16]


def _stripped(line: Line, frame: tuple[str, str], *, strict: bool) -> str | Turns:
    """Return the content of a line without the text of a template around its prompt.

    strict: raise PromptError for a prompt without that text.
    """
    content = line.content(drop_last_assistant=True)
    if frame == ("", ""):
        return content
    text = _text(line, content)
    found = _without(text, frame)
    if found is None:
        if strict:
            line.refuse(
                f"the prompt {text!r:.80} does not have the text of --strip-template",
                "leave it out, or give the template that these prompts have",
            )
        return content
    return _with(content, found)


def _without(text: str, frame: tuple[str, str]) -> str | None:
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


def _text(line: Line, content: str | Turns) -> str:
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


def _written(
    line: Line, content: str | Turns, fill: Template | None, name: str, **more: Any
) -> str:
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


def _take_id(line: Line, name: str, counts: _Counts) -> None:
    if name in counts.ids:
        line.refuse(
            f'field "id": {name!r} is the id of another prompt of the result',
            "give every prompt a unique id",
        )
    counts.ids.add(name)


def _mixed(
    settings: PromptRecipe, fill: Template | None, frame: tuple[str, str], counts: _Counts
) -> list[str]:
    """Return the lines of the mixed prompts, chosen by the seed, in the order of their file."""
    assert settings.mix is not None, "a file"
    needed = round(counts.kept * settings.share / (1 - settings.share))
    if needed == 0:
        raise ConfigError(
            f"--share {settings.share:g} of {counts.kept} prompts is less than half a prompt",
            hint="give a larger --share, or more prompts",
        )
    # Algorithm R: every subset of that size is equally likely, whatever the length of the file.
    draw, found = random.Random(settings.seed), list[tuple[int, Line]]()
    seen = 0
    for seen, line in enumerate(_lines(open_source(settings.mix)), 1):
        if len(found) < needed:
            found.append((seen, line))
        elif (place := draw.randrange(seen)) < needed:
            found[place] = (seen, line)
    if len(found) < needed:
        raise PromptError(
            f"{settings.mix} has {seen} prompts, and a share of {settings.share:g} besides "
            f"{counts.kept} prompts needs {needed}",
            hint="give a smaller --share, or more prompts to mix",
        )
    texts = []
    for _, line in sorted(found, key=lambda each: each[0]):
        # Ids that are line numbers would be those of the input.
        name = line.id if "id" in line.keys else f"{settings.mix.stem}-{line.id}"
        _take_id(line, name, counts)
        content = _stripped(line, frame, strict=False)
        texts.append(_written(line, content, fill, name, **{MIXED: settings.mix.name}))
    return texts


def _interleave(part: Path, mixed: list[str], kept: int, seed: int) -> None:
    """Put the mixed lines at places that the seed chooses; both keep their order."""
    total = kept + len(mixed)
    places = set(random.Random(f"places {seed}").sample(range(total), len(mixed)))
    whole, rest = part.with_name(f"{part.name}.mixed"), iter(mixed)
    try:
        with part.open(encoding="utf-8") as lines, whole.open("w", encoding="utf-8") as written:
            for place in range(total):
                written.write(next(rest) if place in places else next(lines))
        whole.replace(part)
    finally:
        whole.unlink(missing_ok=True)
