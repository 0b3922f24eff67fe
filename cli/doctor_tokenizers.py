"""`logitcask doctor tokenizers`: two tokenizers over the same texts."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import rich_click as click

from logitcask.cli.options import format_option
from logitcask.cli.output import print_result, visible
from logitcask.engine.errors import ConfigError

MOST_BYTES = 1 << 20
_SHOWN = 5


@click.command("tokenizers")
@click.argument("student")
@click.argument("teacher")
@click.option(
    "--texts",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="File with one text a line, of at most 1 MiB each; the bytes are taken as they are.",
)
@format_option
def tokenizers_command(student: str, teacher: str, texts: Path, form: str) -> None:
    """Show how two tokenizers divide the same texts, byte by byte.

    STUDENT and TEACHER are folders or hub ids; their weights are not read. A span is the smallest
    piece of a text that is whole tokens to both: of a teacher with another tokenizer `score` stores
    the log-probs of spans. The more are one to one, the more its best ids say to the student.

    Example: logitcask doctor tokenizers Qwen/Qwen3-1.7B google/gemma-3-1b-it --texts texts.txt
    """
    from logitcask.engine.alignment.compare import compare_tokenizers
    from logitcask.engine.alignment.encode import ByteEncoder
    from logitcask.engine.models.identity import resolve_model
    from logitcask.engine.prompts.prompts import load_tokenizer

    ours, theirs = (
        ByteEncoder(load_tokenizer(resolve_model(each, weights=False)))
        for each in (student, teacher)
    )
    found = compare_tokenizers(ours, theirs, _lines(texts))
    if form == "json":
        print_result({**asdict(found), "share_one_to_one": found.share_one_to_one}, form)
        return
    tokens = found.student_tokens
    print_result(
        {
            "texts": f"{found.texts:,} of {found.bytes:,} bytes, {len(found.refused)} refused",
            "tokens": f"{tokens:,} of the student, {found.teacher_tokens:,} of the teacher",
            "spans": f"{found.spans:,}, {found.spans / tokens:.3f} a token of the student",
            "one to one": f"{found.share_one_to_one:.1%} of the student's tokens",
            "largest span": f"{found.largest_span:,} tokens of the student",
            "patched": f"{found.patched:,} tokens that the teacher's tokenizer would not choose",
            "common tokens": f"{found.common_tokens:,} byte strings",
            "same ids": "yes: each id has the same bytes" if found.same_bytes else "no",
        },
        form,
    )
    for each in found.refused[:_SHOWN]:
        click.echo(f"refused: line {each.text}: {visible(each.cause)}")
    if found.same_bytes:
        return
    command = f"logitcask score --model {teacher} --student-tokenizer {student}"
    click.echo(f"next: {visible(command)} --store STORE --teacher NAME")
    click.echo(
        "      and --prompts FILE where a chat template renders the prompts; then `train` with"
    )
    click.echo("      an objective over spans, which `logitcask objectives` lists")


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (number from 1, bytes without the end of the line)."""
    try:
        with file.open("rb") as opened:
            for number, line in enumerate(iter(lambda: opened.readline(MOST_BYTES + 1), b""), 1):
                if len(line) > MOST_BYTES:
                    raise ConfigError(
                        f"{file}, line {number}: more than {MOST_BYTES:,} bytes",
                        hint="divide this text into several lines",
                    )
                yield str(number), line.removesuffix(b"\n").removesuffix(b"\r")
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}", hint="give a file with one text a line"
        ) from error
