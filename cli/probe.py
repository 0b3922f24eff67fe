"""`logitcask probe`: measurements from a store."""

from pathlib import Path
from typing import Any

import rich_click as click

from logitcask.cli.options import config_from_flags, config_options, dry_run_option, format_option
from logitcask.cli.output import print_event, print_probe, print_table, visible
from logitcask.cli.probe_drift import DRIFT_PROBES
from logitcask.cli.probe_models import MODEL_PROBES
from logitcask.cli.probe_store import STORE_PROBES
from logitcask.cli.progress import progress_bar
from logitcask.engine.config.parse.toml import to_toml
from logitcask.engine.config.probes import Probe, ProbeConfig


@click.group("probe", context_settings={"help_option_names": ["-h", "--help"]})
def probe_command() -> None:
    """Measure from stored rows, without a teacher and without training.

    Example: logitcask probe metrics --model ./run --store ./store
    """


@probe_command.command("metrics")
@config_options(
    ProbeConfig,
    {
        "student": ["model", "revision"],
        "store": ["url", "rollouts"],
        "probe": list(Probe.model_fields),
        "run": ["device"],
    },
)
@click.option(
    "--objective",
    "objectives",
    multiple=True,
    metavar="NAME",
    help="Preset whose loss is shown too, with its k if one is given; repeatable.",
    panel="Measurement",
)
@click.option(
    "--per-sequence",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="Write the sums of each sequence too, for `probe compare`.",
    panel="Measurement",
)
@format_option
@dry_run_option
def metrics_command(
    form: str,
    dry_run: bool,
    objectives: tuple[str, ...],
    per_sequence: Path | None,
    **flags: Any,
) -> None:
    """Measure every metric that training logs, for any checkpoint, on the rows of a snapshot.

    One line per metric: its mean over all rows, then over each range of positions. Metrics
    of the paper's released code are named *_released. kl/forward_bound and kl/reverse_bound are
    lower bounds from the stored ids; with --teacher-model the divergences themselves are there too.

    Example: logitcask probe metrics --model ./run --store ./store --objective overlap --bins 4
    """
    job = config_from_flags(ProbeConfig, flags)
    if dry_run:
        click.echo(to_toml(job))
        return
    from logitcask.engine.commands.probe import run_probe

    with progress_bar() as progress:
        bins = run_probe(
            job, objectives, per_sequence=per_sequence, progress=progress, on_event=print_event
        )
    heads = ["all", *(f"{each.start}..{each.end - 1}" for each in bins[1:])]
    if len(bins) == 2:
        heads, bins = heads[:1], bins[:1]
    rows: dict[str, list[float | None]] = {"rows": [float(each.rows) for each in bins]}
    rows |= {name: [each.means[name] for each in bins] for name in bins[0].means}
    print_table(
        [{"metric": name, **dict(zip(heads, row, strict=True))} for name, row in rows.items()],
        form,
    )


@probe_command.command("compare")
@click.argument("first", type=click.Path(path_type=Path), metavar="A.jsonl")
@click.argument("second", type=click.Path(path_type=Path), metavar="B.jsonl")
@format_option
def compare_command(form: str, first: Path, second: Path) -> None:
    """Compare two checkpoints on the same sequences, paired.

    A.jsonl and B.jsonl are files of `probe metrics --per-sequence` on the same snapshot. One line
    per metric: the mean per token of both, b / a, b - a with its standard error over prompts, and
    z, their ratio. No model is loaded.

    Example: logitcask probe compare before.jsonl after.jsonl
    """
    from dataclasses import asdict

    from logitcask.engine.commands.probe import run_compare

    report = run_compare(first, second)
    if form == "json":
        print_probe("compare", report)
        return
    print_table([asdict(each) for each in report.differences], form)
    click.echo(
        f"a is {visible(str(report.a['model']))}, b is {visible(str(report.b['model']))}; "
        f"{report.sequences} sequences of {report.prompts} prompts, {report.tokens:g} tokens"
    )


for each in (*STORE_PROBES, *DRIFT_PROBES, *MODEL_PROBES):
    probe_command.add_command(each)
