"""`logitcask recipe`: remedies and controls of the paper, one command each."""

from pathlib import Path
from typing import Any

import rich_click as click

from logitcask.cli.approve import approve_with, yes_option
from logitcask.cli.options import (
    config_file_arguments,
    config_from_flags,
    config_options,
    dry_run_option,
    format_option,
)
from logitcask.cli.output import print_event, print_result
from logitcask.cli.progress import progress_bar
from logitcask.cli.recipe_co_evolve import co_evolve_command
from logitcask.cli.recipe_named import NAMED
from logitcask.engine.config.parse.toml import read_toml, to_toml
from logitcask.engine.config.recipes import (
    BestOfN,
    BestOfNConfig,
    ColdStart,
    ColdStartConfig,
    PromptRecipe,
    PromptRecipeConfig,
)


@click.group("recipe", context_settings={"help_option_names": ["-h", "--help"]})
def recipe_command() -> None:
    """Change what goes into a distillation, by the recipes of arXiv 2604.13016.

    Recipes with models read the TOML file of `distill`, so one file describes the distillation, its
    cold start and its controls.

    `list` and `show` are of named settings, with which `distill --recipe NAME` begins.

    Example: logitcask recipe cold-start distill.toml --out ./cold
    """


for _command in NAMED:
    recipe_command.add_command(_command)


@recipe_command.command("cold-start")
@config_file_arguments
@config_options(ColdStartConfig, {"cold_start": list(ColdStart.model_fields)})
@click.option(
    "--then", is_flag=True, help="Run `distill` with the file from this student on at once."
)
@yes_option
@format_option
@dry_run_option
def cold_start_command(
    config: Path,
    overrides: tuple[str, ...],
    then: bool,
    yes: bool,
    form: str,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Fine-tune the student on accepted responses of its teacher, before it is distilled.

    The teacher of the file samples; truncated and degenerate responses are rejected and their
    prompts sampled again; the student learns the others by cross-entropy (section 5.1). Rerun the
    same command to resume. The last line is the command that distils this student.

    Example: logitcask recipe cold-start distill.toml --prompts sft.jsonl --out ./cold
    """
    resolved = read_toml(config, overrides)
    sections = config_from_flags(ColdStartConfig, flags)
    if dry_run:
        from logitcask.engine.recipes.cold_start import prove_cold_start

        with progress_bar():
            prove_cold_start(resolved, sections.cold_start, print_event)
        click.echo(to_toml(resolved) + "\n" + to_toml(sections))
        return
    from logitcask.engine.recipes.cold_start import run_cold_start, shown

    with progress_bar() as progress:
        report = run_cold_start(
            resolved,
            sections.cold_start,
            file=str(config),
            progress=progress,
            on_event=print_event,
            approve=approve_with(yes),
        )
    if not then:
        print_result(report if form == "json" else shown(report), form)
        return
    for name, value in shown(report).items():
        print_event(f"{name}: {value}")
    distill(config, (*overrides, *report.overrides), form, yes=yes)


@recipe_command.command("best-of-n")
@config_file_arguments
@config_options(BestOfNConfig, {"best_of_n": list(BestOfN.model_fields)})
@yes_option
@format_option
@dry_run_option
def best_of_n_command(
    config: Path, overrides: tuple[str, ...], yes: bool, form: str, dry_run: bool, **flags: Any
) -> None:
    """Keep one of several responses of the teacher to each prompt, as rollouts to train on.

    A correct one first, then the one most similar to the student (arXiv 2605.09725). The teacher's
    scores go with them, so `train` needs no more. Rerun the same command to resume.

    Example: logitcask recipe best-of-n distill.toml --n 4 --incorrect drop
    """
    resolved = read_toml(config, overrides)
    sections = config_from_flags(BestOfNConfig, flags)
    if dry_run:
        from logitcask.engine.recipes.best_of_n import prove_best_of_n

        with progress_bar():
            prove_best_of_n(resolved, sections.best_of_n, print_event)
        click.echo(to_toml(resolved) + "\n" + to_toml(sections))
        return
    from logitcask.engine.recipes.best_of_n import run_best_of_n

    with progress_bar() as progress:
        report = run_best_of_n(
            resolved,
            sections.best_of_n,
            progress=progress,
            on_event=print_event,
            approve=approve_with(yes),
        )
    print_result(report, form)


@recipe_command.command("prompts")
@click.argument("file", type=click.Path(path_type=Path))
@config_options(PromptRecipeConfig, {"prompt_recipe": list(PromptRecipe.model_fields)})
@format_option
@dry_run_option
def prompts_command(file: Path, form: str, dry_run: bool, **flags: Any) -> None:
    """Give prompts the teacher's template, drop duplicates, and mix others in.

    FILE is read in any form that `rollout` reads; the columns are those of FILE. The result is
    JSONL with the same ids (section 5.2).

    Example: logitcask recipe prompts prompts.jsonl --template boxed --out boxed.jsonl
    """
    sections = config_from_flags(PromptRecipeConfig, flags)
    if dry_run:
        from logitcask.engine.recipes.prompts import check_prompt_recipe

        check_prompt_recipe(file, sections.prompt_recipe)
        click.echo(to_toml(sections))
        return
    from logitcask.engine.recipes.prompts import run_prompt_recipe

    with progress_bar():
        report = run_prompt_recipe(file, sections.prompt_recipe)
    print_result(report, form)


recipe_command.add_command(co_evolve_command)


@recipe_command.command("reverse")
@config_file_arguments
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="The TOML file to write; one with other contents is not replaced.",
)
@click.option("--run", is_flag=True, help="Run `distill` with the written file at once.")
@yes_option
@format_option
@dry_run_option
def reverse_command(
    config: Path,
    overrides: tuple[str, ...],
    out: Path,
    run: bool,
    yes: bool,
    form: str,
    dry_run: bool,
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

        with progress_bar():
            prove(found, print_event)
        click.echo(to_toml(found))
        return
    write_once(out, to_toml(found))
    if run:
        print_event(f"written: {out}")
        distill(out, (), form, yes=yes)
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


def distill(file: Path, overrides: tuple[str, ...], form: str, *, yes: bool) -> None:
    """Run `logitcask distill FILE` in this process."""
    from logitcask.cli.distill import distill_command

    assert distill_command.callback is not None, "a command"
    distill_command.callback(
        config=file,
        overrides=overrides,
        recipe=None,
        runner__kind=None,
        role=None,
        index=None,
        yes=yes,
        form=form,
        dry_run=False,
    )
