"""`logitcask probe`: measurements from a store."""

from typing import Any

import rich_click as click

from logitcask.cli.options import config_from_flags, config_options, dry_run_option, format_option
from logitcask.cli.output import print_table
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
@format_option
@dry_run_option
def metrics_command(form: str, dry_run: bool, objectives: tuple[str, ...], **flags: Any) -> None:
    """Measure every metric that training logs, for any checkpoint, on the rows of a snapshot.

    One line per metric: its mean over all rows, then over each range of positions. Metrics
    of the paper's released code are named *_released.

    Example: logitcask probe metrics --model ./run --store ./store --objective overlap --bins 4
    """
    job = config_from_flags(ProbeConfig, flags)
    if dry_run:
        click.echo(to_toml(job))
        return
    from logitcask.engine.commands.probe import run_probe

    with progress_bar() as progress:
        bins = run_probe(job, objectives, progress=progress)
    heads = ["all", *(f"{each.start}..{each.end - 1}" for each in bins[1:])]
    if len(bins) == 2:
        heads, bins = heads[:1], bins[:1]
    rows: dict[str, list[float | None]] = {"rows": [float(each.rows) for each in bins]}
    rows |= {name: [each.means[name] for each in bins] for name in bins[0].means}
    print_table(
        [{"metric": name, **dict(zip(heads, row, strict=True))} for name, row in rows.items()],
        form,
    )


for each in STORE_PROBES:
    probe_command.add_command(each)
