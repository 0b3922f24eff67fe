"""`logitcask store`: look into a store, check it, keep it, move it."""

from typing import Any

import rich_click as click

from logitcask.cli.options import format_option
from logitcask.cli.output import print_event, print_result, print_segments, print_table, visible
from logitcask.cli.progress import progress_bar
from logitcask.cli.store_change import CHANGE_VERBS
from logitcask.cli.store_estimate import estimate_command
from logitcask.cli.store_export import export_command
from logitcask.cli.store_provenance import provenance_command
from logitcask.cli.store_transfer import TRANSFER_VERBS

MORE_VERBS = (estimate_command, export_command, provenance_command)


@click.group("store", context_settings={"help_option_names": ["-h", "--help"]})
def store_command() -> None:
    """Look into a store, check it, keep it, move it.

    Example: logitcask store info ./store
    """


for command in (*CHANGE_VERBS, *TRANSFER_VERBS, *MORE_VERBS):
    store_command.add_command(command)


@store_command.command("info")
@click.argument("url")
@format_option
def info(url: str, form: str) -> None:
    """Show totals: segments, positions, bytes per position, names, tags.

    Example: logitcask store info ./store
    """
    from logitcask.engine.store import open_store
    from logitcask.engine.store.inspect import summary

    with progress_bar():
        found = summary(open_store(url))
    if form == "json":
        print_result(found, form)
        return
    spans = found.pop("spans", {})
    print_result(found, form)
    for teacher, words in spans.items():
        click.echo(f"\n{visible(teacher)}: another tokenizer, so its scores are of spans")
        print_result(words, form)


@store_command.command("ls")
@click.argument("url")
@format_option
def ls(url: str, form: str) -> None:
    """List one line per segment, by kind and name, in the order of commits.

    Fields that all segments of a name share stand once above them; --format json repeats them for
    each segment, with whole ids.

    Layouts: rollouts with (`student`) or without (`plain`) the student's own scores, or with ids
    that the student drew too (`mc`); `+reward` with a grader's rewards. A teacher's first scores
    without the student's ids twice (`dedup`), its own list alone (`full`), or drawn ids
    (`sampled`); `+bounds` of a teacher that returned only top-k log-probs, `+rows` of some
    positions. Later entries for the same rows are an `extension`. `spans` are of a teacher with
    another tokenizer; `+starts` and `+ends` have its best ids at one row of each span.

    Example: logitcask store ls ./store
    """
    from logitcask.engine.store import open_store
    from logitcask.engine.store.inspect import list_segments

    with progress_bar():
        found = list_segments(open_store(url))
    print_segments(found, form)


@store_command.command("verify")
@click.argument("url")
@click.option("--deep", is_flag=True, help="Decode every array too, and check that it makes sense.")
@format_option
def verify(url: str, deep: bool, form: str) -> None:
    """Compare every file with its digest; exit 4 and the files' names where one is damaged.

    Orphans are files that no record names: of writers that died, or not of this store. They are
    harmless, and gc removes those of this store.

    Example: logitcask store verify ./store --deep
    """
    from logitcask.engine.store import open_store
    from logitcask.engine.store.verify import verify as verify_store

    with progress_bar() as progress:
        report = verify_store(open_store(url), deep=deep, on_damage=_damaged, progress=progress)
    print_result(report, form)


def _damaged(error: Exception) -> None:
    print_event(f"damaged: {str(error).splitlines()[0]}")


@store_command.command("snapshot")
@click.argument("url")
@click.option("--at", help="Log number or tag; default: the newest.")
@format_option
def snapshot(url: str, at: str | None, form: str) -> None:
    """Show a snapshot for `train --snapshot`: a log number that always reads the same.

    Example: logitcask store snapshot ./store
    """
    from logitcask.engine.commands.resolve import snapshot_of
    from logitcask.engine.store import open_store
    from logitcask.engine.store.inspect import snapshot_summary

    store = open_store(url)
    print_result(snapshot_summary(store, snapshot_of(store, at)), form)


@store_command.command("show")
@click.argument("url")
@click.option("--rollouts", help="Name of a set of rollouts; may be left out when there is one.")
@click.option("--teacher", help="Whose scores; may be left out when there is one.")
@click.option(
    "--sequence", type=click.IntRange(min=0), default=0, show_default=True, help="Which sequence."
)
@click.option("--tokenizer", help="Model folder or hub id whose tokenizer turns ids into text.")
@click.option(
    "--top", type=click.IntRange(1, 64), default=3, show_default=True, help="Teacher's ids shown."
)
@format_option
def show(
    url: str,
    rollouts: str | None,
    teacher: str | None,
    sequence: int,
    tokenizer: str | None,
    top: int,
    form: str,
) -> None:
    """Show one sequence: prompt and response as text, then a line for each row.

    A row has the sampled token, log-probs and entropies in nats, and the teacher's ids. The text is
    that of --tokenizer, else of the recorded student, where its folder or its snapshot in the hub
    cache is here.

    Example: logitcask store show ./store --sequence 3
    """
    from logitcask.engine.store import open_store
    from logitcask.engine.store.inspect import show_sequence

    found = show_sequence(
        open_store(url), rollouts=rollouts, teacher=teacher, sequence=sequence, top=top
    )
    _add_text(found, tokenizer)
    if form == "json":
        print_result(found, form)
        return
    for name in ("prompt", "response"):
        if (text := found.pop(f"{name}_text", None)) is not None:
            # Indented: no line of it can be mistaken for one of ours.
            lines = "\n".join(f"  {visible(line)}" for line in text.split("\n"))
            click.echo(f"{name}:\n{lines}\n")
    found["student"] = found["student"]["name"]
    head = {name: value for name, value in found.items() if name not in ("rows", "prompt_tokens")}
    print_result(head, form)
    click.echo()
    print_table([_for_table(row) for row in found["rows"]], form)


def _add_text(found: dict[str, Any], name: str | None) -> None:
    """Add the text of all ids, by a tokenizer with the digest of the student's.

    Raises IdentityError for another tokenizer; without `name` it prints a note.
    """
    from logitcask.engine.errors import IdentityError, ModelError
    from logitcask.engine.models.identity import resolve_model, tokenizer_digest
    from logitcask.engine.prompts.prompts import load_tokenizer

    of = found["student"]
    try:
        if name is None:
            path = resolve_model(of["name"], of["revision"], weights=False, download=False)
        else:
            path = resolve_model(name, weights=False)
        tokenizer = load_tokenizer(path)
        if tokenizer_digest(tokenizer) != of["tokenizer"]:
            raise IdentityError(
                f"the tokenizer of {path} is not that of these rollouts, {of['tokenizer']}",
                hint="give the student's, a folder or hub id, with --tokenizer",
            )
    except (IdentityError, ModelError) as error:
        if name is not None:
            raise
        print_event(f"note: no text, only ids: {visible(error.cause)}; give --tokenizer")
        return
    found["prompt_text"] = tokenizer.decode(found["prompt_tokens"])
    found["response_text"] = tokenizer.decode([row["token"] for row in found["rows"]])
    for row in found["rows"]:
        row["text"] = tokenizer.decode([row["token"]])
        for entry in row.get("teacher_top", []):
            if "text" not in entry:  # a teacher with another tokenizer has the text of its own
                entry["text"] = tokenizer.decode([entry["id"]])


def _for_table(row: dict[str, Any]) -> dict[str, Any]:
    """Format a row of `show`: text with each token id, an entropy interval as one value."""
    hidden = ("text", "teacher_top", "teacher_entropy_hi")
    cells = {name: value for name, value in row.items() if name not in hidden}
    if "text" in row:
        cells["token"] = f"{row['token']} {row['text']!r}"
    if (most := row.get("teacher_entropy_hi")) is not None:
        cells["teacher_entropy"] = f"{row['teacher_entropy']:.4g}-{most:.4g}"
    if (spelled := row.get("teacher_tokens")) is not None:
        cells["teacher_tokens"] = [repr(each["text"]) for each in spelled]
    if "teacher_top" in row:
        cells["teacher_top"] = [
            f"{e['text']!r}:{e['lp']:.3f}" if "text" in e else f"{e['id']}:{e['lp']:.3f}"
            for e in row["teacher_top"]
        ]
    return cells
