"""Prompts of the teacher's kind: its template, no duplicates, and some from elsewhere.

arXiv 2604.13016, section 5.2: the teacher's own prompt template (Fig. 9) and prompts of its own
training (Fig. 10) help; the latter lower the student's entropy, which prompts of another
distribution, mixed in, prevent.

Files are read and written line by line: in memory are BLOCK lines, the ids, the texts or vectors of
`against`, and the mixed prompts.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from logitcask.engine.commands.resolve import columns_of
from logitcask.engine.config.recipes import PromptRecipe
from logitcask.engine.errors import ConfigError, LogitcaskError, PromptError
from logitcask.engine.events import counted
from logitcask.engine.prompts.lines import Line
from logitcask.engine.prompts.source import Source, no_file, open_source
from logitcask.engine.prompts.teacher_context import Template
from logitcask.engine.recipes.duplicates import BLOCK, Nearest, nearest
from logitcask.engine.recipes.prompt_text import (
    Frame,
    frame_of,
    stripped,
    template_named,
    text_of,
    without,
    written,
)

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
            kept = _kept(source, settings, fill, frame, reference, counts)
            for text in counted(f"write {settings.out.name}", kept, unit="prompts"):
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
) -> "tuple[Template | None, Frame, _Reference | None]":
    """Raise what would stop `run_prompt_recipe` before its first line; read templates and
    `against`, and return both.
    """
    _check(settings)
    fill = template_named(settings.template) if settings.template else None
    frame = frame_of(settings.strip_template)
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


def _kept(
    source: Source,
    settings: PromptRecipe,
    fill: Template | None,
    frame: Frame,
    reference: _Reference | None,
    counts: _Counts,
) -> Iterator[str]:
    """Yield the lines of the prompts that are kept, in order."""
    lines = _lines(source)
    while block := list(islice(lines, BLOCK)):
        contents = [stripped(line, frame, strict=True) for line in block]
        texts = [text_of(line, each) for line, each in zip(block, contents, strict=True)]
        counts.read += len(block)
        drop = _duplicates(texts, settings.threshold, reference, counts)
        for line, content, dropped in zip(block, contents, drop, strict=True):
            if not dropped:
                _take_id(line, line.id, counts)
                counts.kept += 1
                yield written(line, content, fill, line.id)


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


def _reference(settings: PromptRecipe, frame: Frame, fill: Template | None) -> _Reference | None:
    if settings.against is None:
        return None
    # These may have either template, or none: the tasks are compared.
    own = frame_of(settings.template) if fill is not None else ("", "")
    texts = []
    for line in _lines(open_source(settings.against)):
        text = text_of(line, stripped(line, frame, strict=False))
        texts.append(without(text, own) or text)
    if not texts:
        raise PromptError(
            f"{settings.against} holds no prompt", hint="give prompts to compare with"
        )
    search, method = nearest(texts, settings.embedding_model)
    return _Reference(frozenset(map(_key, texts)), search, method)


def _key(text: str) -> bytes:
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()[:16]


def _take_id(line: Line, name: str, counts: _Counts) -> None:
    if name in counts.ids:
        line.refuse(
            f'field "id": {name!r} is the id of another prompt of the result',
            "give every prompt a unique id",
        )
    counts.ids.add(name)


def _mixed(
    settings: PromptRecipe, fill: Template | None, frame: Frame, counts: _Counts
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
        content = stripped(line, frame, strict=False)
        texts.append(written(line, content, fill, name, **{MIXED: settings.mix.name}))
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
