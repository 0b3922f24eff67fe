"""`logitcask doctor`: what works, and how to repair what does not."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich_click as click

from logitcask.cli.doctor_tokenizers import tokenizers_command
from logitcask.cli.options import format_option
from logitcask.cli.output import print_result, visible
from logitcask.engine.errors import IdentityError


@click.group("doctor")
def doctor_command() -> None:
    """Check what a run depends on.

    Example: logitcask doctor teacher http://127.0.0.1:8000
    """


doctor_command.add_command(tokenizers_command)


@doctor_command.command("teacher")
@click.argument("url")
@click.option(
    "--served", default="", help="The server's name of the teacher, if it serves several."
)
@click.option(
    "--server",
    type=click.Choice(["auto", "vllm", "sglang"]),
    default="auto",
    show_default=True,
    help="What the server is; auto: what its /v1/models says.",
)
@click.option(
    "--tokenizer",
    default="",
    help="Folder or hub id with the teacher's tokenizer and config.json; default: the source that "
    "the server names.",
)
@click.option("--revision", default="", help="The revision that the server should declare.")
@click.option(
    "--student",
    default="",
    help="Model folder or hub id of the student: tokens, stop ids and chat template are compared.",
)
@click.option(
    "--against",
    default="",
    help="Model folder or hub id of the weights that it should serve: they are loaded here, and "
    "the log-probs compared.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Compute type of --against.",
)
@click.option(
    "--server-wait",
    "wait_s",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Seconds to wait for a server that does not answer.",
)
@click.option(
    "--teacher-topk-max",
    "k_max",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Log-probs per position that scoring will request.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="File with the API key; default: the environment's LOGITCASK_API_KEY.",
)
@format_option
def teacher_command(url: str, form: str, **settings: Any) -> None:
    """Check a server as a teacher, with hints on its flags.

    Exit code 1 if a check finds a fault: nothing should be scored then.

    Example: logitcask doctor teacher http://127.0.0.1:8000
    """
    from logitcask.engine.teachers.server_check import ServerCheck, check_server

    found = []
    for each in check_server(ServerCheck(url=url, **settings)):
        found.append(each)
        if form == "text":
            click.echo(f"{each.state:<5}  {each.check:<10}  {visible(each.message)}")
            if each.hint:
                click.echo(f"{'':<19}hint: {visible(each.hint)}")
    if form == "json":
        print_result({"checks": [asdict(each) for each in found]}, form)
    faults = [each for each in found if each.state == "fault"]
    if faults:
        raise IdentityError(
            f"{len(faults)} of {len(found)} checks found a fault, the first: {faults[0].check}",
            hint=faults[0].hint,
        )
