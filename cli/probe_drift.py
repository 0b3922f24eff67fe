"""`logitcask probe k` and `drift`: what stored ids hold, and for how long."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich_click as click

from logitcask.cli.options import config_from_flags, config_options, format_option
from logitcask.cli.output import print_probe, print_table
from logitcask.cli.probe_store import figure_option
from logitcask.cli.progress import progress_bar
from logitcask.engine.config.probes import (
    DriftProbe,
    DriftProbeConfig,
    TopkProbe,
    TopkProbeConfig,
)


@click.command("k")
@config_options(
    TopkProbeConfig,
    {
        "store": ["url", "rollouts"],
        "topk": list(TopkProbe.model_fields),
        "run": ["device", "dtype", "batch_tokens", "seed"],
    },
)
@figure_option
@format_option
def k_command(form: str, figure: Path | None, **flags: Any) -> None:
    """Measure mass against k, and with both models the error of gradient estimators.

    Mass of both models on their top-k, for k = 1, 2, 4 and so on up to what is stored. With --model
    and --teacher-model also bias and variance of sampled token, Monte Carlo and top-k gradients
    against reverse KL over the whole vocabulary, without any draw.

    Example: logitcask probe k --store ./store --figure k.svg
    """
    from logitcask.engine.commands.probes.topk import run_topk_probe

    config = config_from_flags(TopkProbeConfig, flags)
    with progress_bar() as progress:
        report, estimators = run_topk_probe(config, figure, progress=progress)
    if form == "json":
        found = None if estimators is None else asdict(estimators)
        print_probe("k", {**asdict(report), "estimators": found})
        return
    print_table([asdict(each) for each in report.table], form)
    click.echo(f"{report.rows:,} rows; {report.reading}")
    if estimators is not None:
        print_table([asdict(each) for each in estimators.table], form)
        click.echo(
            f"{estimators.rows:,} rows, KL(p || q) = {estimators.reverse_kl:.4g} nats; "
            f"{estimators.reading}"
        )


@click.command("drift")
@config_options(
    DriftProbeConfig,
    {
        "store": ["url", "rollouts"],
        "drift": list(DriftProbe.model_fields),
        "run": ["device"],
    },
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help="Student to measure, of the base weights of the one that sampled; repeatable.",
    panel="Measurement",
)
@click.option(
    "--run",
    "run_folder",
    type=click.Path(path_type=Path),
    help="Folder of a run: its versions that are there, and its final student, are measured too.",
    panel="Measurement",
)
@figure_option
@format_option
def drift_command(
    form: str, figure: Path | None, models: tuple[str, ...], run_folder: Path | None, **flags: Any
) -> None:
    """Measure how long a cache stays good: coverage, approx_kl and overlap against updates.

    One line for each student and each version of the rollouts. Without --model and --run the
    student that sampled is measured, from the store alone.

    Example: logitcask probe drift --store ./store --run ./run --figure drift.svg
    """
    from logitcask.engine.commands.probes.topk import run_drift_probe

    config = config_from_flags(DriftProbeConfig, flags)
    with progress_bar() as progress:
        report = run_drift_probe(config, models, run_folder, figure, progress=progress)
    if form == "json":
        print_probe("drift", report)
        return
    print_table(
        [
            {**{k: v for k, v in asdict(each).items() if k != "means"}, **each.means}
            for each in report.lines
        ],
        form,
    )
    click.echo(report.reading)


DRIFT_PROBES = [k_command, drift_command]
