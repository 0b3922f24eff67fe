"""`logitcask report`: one page of a run or a store, with everything that is known of it."""

import time
from pathlib import Path

import rich_click as click

from logitcask.cli.options import format_option
from logitcask.cli.output import print_event, print_result
from logitcask.cli.progress import progress_bar
from logitcask.cli.worker import stop_at_sigterm
from logitcask.engine.events import running_step
from logitcask.engine.report.panels import SEQUENCES, Report


@click.command("report")
@click.argument("target", metavar="RUN|STORE")
@click.option(
    "--compare",
    multiple=True,
    metavar="RUN",
    help="Folder of a run, or of an ablation, that is laid over RUN; repeatable.",
)
@click.option(
    "--probe",
    "probes",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Output of `logitcask probe ... --format json` to show; repeatable.",
)
@click.option(
    "--tokenizer",
    default="",
    metavar="FOLDER",
    help="Tokenizer that shows tokens as text. [default: that of the student]",
)
@click.option(
    "--sequences",
    type=click.IntRange(min=0),
    default=SEQUENCES,
    show_default=True,
    help="Rollouts in the token viewer, at most; 200 keep a page under 2 MB.",
)
@click.option(
    "--eval-teacher-accuracy",
    "teacher_accuracy",
    type=click.FloatRange(0, 1),
    help="The teacher's mean reward on the prompts of the evaluation, for the share of the gap "
    "that the student closed.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="File of the page; a report that is there is replaced.",
)
@click.option(
    "--to",
    "tracker",
    type=click.Choice(["wandb", "mlflow", "trackio", "tensorboard"]),
    help="Tracker that gets the page too, as an artefact; tensorboard gets the summary as text. "
    "A run of the training with this tracker gets it; else a new one has the name of RUN.",
)
@click.option(
    "--serve",
    is_flag=True,
    help="Serve the page on 127.0.0.1 in place of writing it, and keep it up to date while the "
    "run goes on. The URL has a random token.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=True,
    help="Port of --serve; 0 = a free one.",
)
@format_option
def report_command(
    target: str,
    compare: tuple[str, ...],
    probes: tuple[Path, ...],
    tokenizer: str,
    sequences: int,
    teacher_accuracy: float | None,
    out: Path,
    tracker: str | None,
    serve: bool,
    port: int,
    form: str,
) -> None:
    """Make one HTML page of a run or a store: what was run, what it learned, and its tokens.

    RUN is the folder of a training, a loop or an ablation, finished or not, and STORE a folder or
    a URL. The page needs no network and no other file. No model is loaded. With --serve SIGTERM and
    Ctrl-C end it.

    Example: logitcask report ./run -o report.html
    """
    from logitcask.engine.report.build import build_report

    if serve and tracker:
        raise click.UsageError("--serve and --to: a live page is never sent; give one of them")

    def build() -> Report:
        return build_report(
            target,
            compare,
            probes=probes,
            tokenizer=tokenizer,
            sequences=sequences,
            teacher_accuracy=teacher_accuracy,
        )

    if serve:
        from logitcask.engine.report.serve import serve as serve_report

        with stop_at_sigterm() as stop:
            serve_report(build, [target, *compare], stop=stop, port=port, on_event=print_event)
        return
    from logitcask.engine.report.write import check_place, write_page

    check_place(out)
    if tracker:
        from logitcask.engine.report.trackers import check_tracker, send_report

        check_tracker(tracker, target)
    begun_s = time.monotonic()
    with progress_bar(), running_step(f"report of {Path(target).name}"):
        report = build()
        size = write_page(out, report)
    values = {"page": out, "bytes": size, "seconds": time.monotonic() - begun_s}
    if tracker:
        values["sent"] = send_report(report, target, tracker)
    print_result(values, form)
