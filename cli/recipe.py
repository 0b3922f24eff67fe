"""`logitcask recipe`: remedies and controls of the paper, one command each."""

from pathlib import Path

import rich_click as click

from logitcask.cli.options import config_file_arguments, dry_run_option, format_option
from logitcask.cli.output import print_event, print_result
from logitcask.cli.recipe_named import NAMED
from logitcask.engine.config.parse.toml import read_toml, to_toml


@click.group("recipe", context_settings={"help_option_names": ["-h", "--help"]})
def recipe_command() -> None:
    """Change what goes into a distillation, by the recipes of arXiv 2604.13016.

    Each recipe reads the TOML file of `distill`, so one file describes the distillation and its
    controls.

    `list` and `show` are of named settings, with which `distill --recipe NAME` begins.

    Example: logitcask recipe reverse distill.toml --out reverse.toml
    """


for _command in NAMED:
    recipe_command.add_command(_command)


@recipe_command.command("reverse")
@config_file_arguments
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="The TOML file to write; one with other contents is not replaced.",
)
@click.option("--run", is_flag=True, help="Run `distill` with the written file at once.")
@format_option
@dry_run_option
def reverse_command(
    config: Path, overrides: tuple[str, ...], out: Path, run: bool, form: str, dry_run: bool
) -> None:
    """Write the control in which student and teacher change places.

    A student after RL that learns from a weaker teacher should fall back (section 3.3, Fig. 5).
    Rollouts, scores and output get names that end in -reverse; all other settings stay.

    Example: logitcask recipe reverse distill.toml --out reverse.toml
    """
    from logitcask.engine.recipes.reverse import reverse

    found = reverse(read_toml(config, overrides))
    if dry_run:
        from logitcask.engine.commands.prove import prove

        prove(found, print_event)
        click.echo(to_toml(found))
        return
    write_once(out, to_toml(found))
    if run:
        from logitcask.cli.distill import distill_command

        print_event(f"written: {out}")
        assert distill_command.callback is not None, "a command"
        distill_command.callback(
            config=out,
            overrides=(),
            recipe=None,
            runner__kind=None,
            role=None,
            index=None,
            form=form,
            dry_run=False,
        )
        return
    print_result(
        {
            "out": out,
            "student": found.student.model,
            "teacher": found.teacher.model,
            "next": f"logitcask distill {out}",
        },
        form,
    )


def write_once(path: Path, text: str) -> None:
    """Write a file; raises ConfigError where it has other contents already."""
    from logitcask.engine.errors import ConfigError
    from logitcask.engine.models.digests import replace_text

    if path.exists() and path.read_text() != text:
        raise ConfigError(
            f"--out {path}: it has other contents", hint="remove it, or give another path"
        )
    replace_text(path, text)
