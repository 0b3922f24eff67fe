"""`logitcask probe`: measurements that sample and score with models."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich_click as click

from logitcask.cli.approve import approve_with, yes_option
from logitcask.cli.options import MODEL_KEYS, config_from_flags, config_options, format_option
from logitcask.cli.output import print_event, print_probe, print_table
from logitcask.cli.probe_store import figure_option
from logitcask.cli.progress import progress_bar
from logitcask.engine.config.probes import (
    CompatibilityConfig,
    Continuation,
    ContinuationConfig,
    FewPrompts,
)
from logitcask.engine.types import SamplingParams

SAMPLING = [*SamplingParams.model_fields, "grader", "stop_token_ids", "unit_prompts"]


@click.command("compatibility")
@click.option(
    "--teacher-model",
    "compatibility__teacher_models",
    multiple=True,
    required=True,
    metavar="[NAME=]MODEL",
    help="Candidate teacher: a model folder, a hub id or the URL of a server; repeatable. A name "
    "for its scores goes before it. A server scores, but does not sample here.",
    panel="Teacher",
)
@config_options(
    CompatibilityConfig,
    {
        "student": ["model", "revision"],
        "prompts": list(FewPrompts.model_fields),
        "rollout": SAMPLING,
        "compatibility": ["tokenizer", "k", "correct_from", "foreign_eos"],
        "store": ["url", "rollouts", "profile"],
        "run": MODEL_KEYS,
    },
)
@figure_option
@yes_option
@format_option
def compatibility_command(yes: bool, form: str, figure: Path | None, **flags: Any) -> None:
    """Try candidate teachers on a few prompts, before a distillation is paid for.

    The student samples, each teacher scores its responses and, with --grader, samples the same
    prompts itself. Overlap, entropies and KL show whether the thinking patterns agree, the graded
    responses what the teacher knows. Each teacher gets an assessment, which may be "cannot tell".
    The same command resumes: all goes into a store, which other probes read too.

    Example: logitcask probe compatibility --model ./student --teacher-model ./teacher --prompts
    prompts.jsonl --grader exact
    """
    from logitcask.engine.commands.probes.compatibility import run_compatibility_probe

    config = config_from_flags(CompatibilityConfig, flags)
    with progress_bar() as progress:
        report = run_compatibility_probe(
            config, figure, progress=progress, on_event=print_event, approve=approve_with(yes)
        )
    values = asdict(report)
    if form == "json":
        print_probe("compatibility", values)
        return
    teachers = values["teachers"]
    names = [
        name for name in teachers[0]["measures"] if any(t["measures"].get(name) for t in teachers)
    ]
    rows = [
        {"measure": name, **{t["name"]: shown(t["measures"].get(name)) for t in teachers}}
        for name in names
    ]
    if values["student_accuracy"]:
        rows.append(
            {
                "measure": "accuracy/student",
                **dict.fromkeys((t["name"] for t in teachers), shown(values["student_accuracy"])),
            }
        )
    rows.append(
        {"measure": "ahead of the next", **{t["name"]: shown(t["ahead"]) for t in teachers}}
    )
    print_table(rows, form)
    click.echo()
    for each in teachers:
        click.echo(f"{each['rank']}. {each['name']}: {each['assessment']}; {each['because']}")
    click.echo(
        f"\nin the paper, at k = 16 on math (here k = {report.k}, {report.prompts} prompts):"
    )
    for what, level in report.references:
        click.echo(f"  {what}: {level}")
    click.echo(report.reading)


@click.command("continuation")
@config_options(
    ContinuationConfig,
    {
        "student": ["model", "revision"],
        "continuation": list(Continuation.model_fields),
        "store": ["url", "rollouts"],
        "run": MODEL_KEYS,
    },
)
@figure_option
@format_option
def continuation_command(form: str, figure: Path | None, **flags: Any) -> None:
    """Let student and teacher continue stored responses of the student, and grade both.

    The responses are cut after --at tokens, and both models go on from the exact ids, sampled as
    the rollouts were. The difference of their accuracies shows up to which length the teacher can
    still repair what the student began.

    Example: logitcask probe continuation --model ./student --teacher-model ./teacher --store
    ./store --at 0,256,1024
    """
    from logitcask.engine.commands.probes.continuation import run_continuation_probe

    with progress_bar() as progress:
        report = run_continuation_probe(
            config_from_flags(ContinuationConfig, flags), figure, progress=progress
        )
    values = asdict(report)
    if form == "json":
        print_probe("continuation", values)
        return
    names = ("student", "teacher", "advantage")
    print_table(
        [
            {
                "tokens": each["at"],
                "prompts": each["prompts"],
                **{name: shown(each[name]) for name in names},
            }
            for each in values["cuts"]
        ],
        form,
    )
    click.echo(report.reading)


def shown(each: Mapping[str, Any] | None) -> str:
    """Return an estimate as `mean ± standard error`."""
    if each is None:
        return "-"
    return f"{each['mean']:.4f}" + ("" if each["se"] is None else f" ± {each['se']:.4f}")


MODEL_PROBES = (compatibility_command, continuation_command)
