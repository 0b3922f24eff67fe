"""`logitcask probe`: measurements from a store."""

from pathlib import Path
from typing import Any

import rich_click as click

from logitcask.cli.options import config_from_flags, config_options, dry_run_option, format_option
from logitcask.cli.output import print_result, print_table
from logitcask.cli.progress import progress_bar
from logitcask.engine.config.sections import PositionProbeConfig, ProbeConfig, RewardProbeConfig
from logitcask.engine.config.toml import to_toml
from logitcask.engine.config.training import PositionProbe, Probe, RewardProbe

figure_option = click.option(
    "--figure",
    type=click.Path(path_type=Path),
    help="File for the picture: .svg, .png or .pdf. Needs the extra figures.",
    panel="Measurement",
)


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


@probe_command.command("reward")
@config_options(
    RewardProbeConfig,
    {"store": ["url", "rollouts"], "reward": list(RewardProbe.model_fields)},
)
@figure_option
@format_option
def reward_command(form: str, figure: Path | None, **flags: Any) -> None:
    """Compare the teacher's reward of correct and incorrect responses.

    The reward of a response is its mean of log q - log p, teacher less sampling student, in nats a
    token. AUROC is the probability that a correct response has a larger one than an incorrect one;
    standard errors are over prompts. Reads the store alone: no model is loaded.

    Example: logitcask probe reward --store ./store --figure reward.svg
    """
    from logitcask.engine.commands.probe import run_reward_probe

    print_result(run_reward_probe(config_from_flags(RewardProbeConfig, flags), figure), form)


@probe_command.command("positions")
@config_options(
    PositionProbeConfig,
    {"store": ["url", "rollouts"], "positions": list(PositionProbe.model_fields)},
)
@figure_option
@format_option
def positions_command(form: str, figure: Path | None, **flags: Any) -> None:
    """Measure teacher and sampling student by position in the response.

    Entropies, KL and overlap of each range of positions; with --format json of each version of the
    student too. Reads the store alone: no model is loaded.

    Example: logitcask probe positions --store ./store --bins 4 --figure positions.svg
    """
    from dataclasses import asdict

    from logitcask.engine.commands.probe import run_position_probe

    report = run_position_probe(config_from_flags(PositionProbeConfig, flags), figure)
    if form == "json":
        print_result(asdict(report), form)
        return
    heads = [f"{each.start}..{each.end - 1}" for each in report.ranges]
    rows: dict[str, list[float | None]] = {"rows": [float(each.rows) for each in report.ranges]}
    rows |= {name: [each.means[name] for each in report.ranges] for name in report.ranges[0].means}
    print_table(
        [{"metric": name, **dict(zip(heads, row, strict=True))} for name, row in rows.items()],
        form,
    )
    click.echo(f"overlap at k = {report.k}; {report.reading}")
