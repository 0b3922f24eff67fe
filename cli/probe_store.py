"""`logitcask probe`: measurements that read a store alone."""

from pathlib import Path
from typing import Any

import rich_click as click

from logitcask.cli.options import config_from_flags, config_options, format_option
from logitcask.cli.output import print_probe, print_result, print_table
from logitcask.cli.progress import progress_bar
from logitcask.engine.config.probes import (
    CorrectnessProbe,
    CorrectnessProbeConfig,
    PositionProbe,
    PositionProbeConfig,
    RegionProbe,
    RegionProbeConfig,
    RewardProbe,
    RewardProbeConfig,
)

figure_option = click.option(
    "--figure",
    type=click.Path(path_type=Path),
    help="File for the picture: .svg, .png or .pdf. Needs the extra figures.",
    panel="Measurement",
)


@click.command("reward")
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

    config = config_from_flags(RewardProbeConfig, flags)
    with progress_bar():
        report = run_reward_probe(config, figure)
    if form == "json":
        print_probe("reward", report)
        return
    print_result(report, form)


@click.command("positions")
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

    from logitcask.engine.commands.probe import run_position_probe

    config = config_from_flags(PositionProbeConfig, flags)
    with progress_bar():
        report = run_position_probe(config, figure)
    if form == "json":
        print_probe("positions", report)
        return
    heads = [f"{each.start}..{each.end - 1}" for each in report.ranges]
    rows: dict[str, list[float | None]] = {"rows": [float(each.rows) for each in report.ranges]}
    rows |= {name: [each.means[name] for each in report.ranges] for name in report.ranges[0].means}
    print_table(
        [{"metric": name, **dict(zip(heads, row, strict=True))} for name, row in rows.items()],
        form,
    )
    click.echo(f"overlap at k = {report.k}; {report.reading}")


@click.command("correctness")
@config_options(
    CorrectnessProbeConfig,
    {"store": ["url", "rollouts"], "correctness": list(CorrectnessProbe.model_fields)},
)
@figure_option
@format_option
def correctness_command(form: str, figure: Path | None, **flags: Any) -> None:
    """Compare teacher and student on correct and incorrect responses: where does the signal point?

    The measures of `probe positions`, and sign and size of log q - log p at the sampled token, in
    both groups, with standard errors over prompts. Reads the store alone: no model is loaded.

    Example: logitcask probe correctness --store ./store --figure correctness.svg
    """
    from dataclasses import asdict

    from logitcask.engine.commands.probe import run_correctness_probe

    config = config_from_flags(CorrectnessProbeConfig, flags)
    with progress_bar():
        report = run_correctness_probe(config, figure)
    if form == "json":
        print_probe("correctness", report)
        return
    print_table([{"measure": name, **asdict(each)} for name, each in report.measures.items()], form)
    click.echo(
        f"{report.correct} correct and {report.incorrect} incorrect responses, overlap at k = "
        f"{report.k}; {report.reading}"
    )


@click.command("regions")
@config_options(
    RegionProbeConfig,
    {"store": ["url", "rollouts"], "regions": list(RegionProbe.model_fields)},
)
@figure_option
@format_option
def regions_command(form: str, figure: Path | None, **flags: Any) -> None:
    """Measure the mass and the gradient on the overlap of both top-k, and outside of it.

    The gradient is that of opd (Eq. 5 of the paper) and of opd_released by the logits of the
    student that sampled. Reads the store alone: no model is loaded.

    Example: logitcask probe regions --store ./store --figure regions.svg
    """
    from dataclasses import asdict

    from logitcask.engine.commands.probes.topk import run_region_probe

    config = config_from_flags(RegionProbeConfig, flags)
    with progress_bar() as progress:
        report = run_region_probe(config, figure, progress=progress)
    if form == "json":
        print_probe("regions", report)
        return
    print_table(
        [
            {
                "region": name,
                **{key: value for key, value in asdict(each).items() if type(value) is float},
                **{f"gradient_{key}": value for key, value in each.gradient.items()},
                **{f"share_{key}": value for key, value in each.share.items()},
            }
            for name, each in report.regions.items()
        ],
        form,
    )
    click.echo(f"top {report.k} of both models, {report.rows:,} rows; {report.reading}")


STORE_PROBES = [reward_command, positions_command, correctness_command, regions_command]
