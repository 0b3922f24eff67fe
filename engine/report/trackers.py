"""A report in an experiment tracker: the page as one artefact of the run.

The tracker's own settings say where to: WANDB_PROJECT and WANDB_MODE, MLFLOW_TRACKING_URI and
MLFLOW_EXPERIMENT_NAME, TRACKIO_PROJECT, TENSORBOARD_LOGGING_DIR. The defaults are those of
transformers, so the report comes to the place of the training's metrics.
"""

import html
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from logitcask.engine.errors import ConfigError, ServerError
from logitcask.engine.models.digests import read_json
from logitcask.engine.report.page import page
from logitcask.engine.report.panels import Report
from logitcask.engine.report.runs import is_run
from logitcask.engine.training.run_dir.files import RUN, TENSORBOARD, TRACKERS

PROJECT = "huggingface"
"""Project of transformers where none is set."""
FILE = "report.html"
MARKS = {"good": "✓", "neutral": "•", "warning": "!"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sending:
    """A page on its way to a tracker."""

    report: Report
    out: Path
    """Folder of the run."""
    file: Path
    """The page."""
    own: Mapping[str, str]
    """Identity of the training's run in this tracker; empty where it has none."""
    name: str
    """Of a run that is new, or that has no other identity."""
    project: str
    """'' = that of the tracker's environment variable."""


def send_report(report: Report, out: str | Path, tracker: str) -> str:
    """Send the page of a report to a tracker and return where it is.

    out: folder of the run. A run that was trained with this tracker gets it; else a new run has the
    name of the folder. Raises ConfigError for an unknown tracker or a missing package, ServerError
    where the tracker refuses.
    """
    check_tracker(tracker, out)
    out = Path(out)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FILE
        file.write_text(page(report), encoding="utf-8")
        args = _train_args(out)
        sending = Sending(
            report=report,
            out=out,
            file=file,
            own=read_tracked(out).get(tracker, {}),
            name=args.get("run_name") or out.resolve().name,
            project=args.get("project", ""),
        )
        try:
            return SENDERS[tracker](sending)
        # Each tracker has exceptions of its own, and is imported nowhere else.
        except Exception as error:
            raise ServerError(
                f"{tracker} did not take the report: {type(error).__name__}: {error!s:.500}",
                hint="see what it says about its login and its address, then run the same command",
            ) from error


def check_tracker(tracker: str, out: str | Path) -> None:
    """Raise ConfigError unless the tracker is known, its package is there, and `out` is a run."""
    if tracker not in SENDERS:
        raise ConfigError(f"--to {tracker}: no such tracker", hint=f"one of {', '.join(SENDERS)}")
    if find_spec(tracker) is None:
        ours = tracker in ("wandb", "tensorboard")
        raise ConfigError(
            f"--to {tracker}: the package {tracker} is not installed",
            hint='pip install -e ".[trackers]"' if ours else f"pip install {tracker}",
        )
    if not is_run(Path(out)):
        raise ConfigError(
            f"--to {tracker}: {out} is not the folder of one run, and an artefact belongs to one",
            hint="give the folder of a run (it holds run.json), or leave --to out",
        )


def read_tracked(out: Path) -> Mapping[str, Mapping[str, str]]:
    """Return tracker -> identity of the run that the training made there.

    Raises IntegrityError for a damaged file.
    """
    if not (out / TRACKERS).is_file():
        return {}
    found = read_json(out / TRACKERS, hint=f"remove {out / TRACKERS}: then a new run gets it")
    return {
        name: {key: str(value) for key, value in each.items()}
        for name, each in found.items()
        if isinstance(each, dict)
    }


def _train_args(out: Path) -> Mapping[str, str]:
    """Return the fields of TrainingArguments that the run set, such as run_name."""
    record = read_json(out / RUN, hint="restore it from a copy, or make the run again")
    found = ((record.get("config") or {}).get("train") or {}).get("args") or {}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def summary_markdown(report: Report) -> str:
    """Return the title and the summary as Markdown, in which text of users stays text."""
    lines = [f"## {_plain(report.title)}", ""]
    lines += [f"- {MARKS[each.state]} {_plain(each.text)}" for each in report.summary]
    return "\n".join([*lines, "", f"logitcask {report.version}, {report.made}"])


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]()#|])", r"\\\1", html.escape(text, quote=False))


def _to_wandb(sending: Sending) -> str:
    wandb: Any = import_module("wandb")
    own = sending.own
    run = wandb.init(
        project=own.get("project") or os.environ.get("WANDB_PROJECT", PROJECT),
        entity=own.get("entity") or None,
        id=own.get("id"),
        name=None if own else sending.name,
        resume="allow",
        job_type=None if own else "report",
    )
    with run:
        artifact = wandb.Artifact(_artifact_name(sending), type="report")
        artifact.add_file(str(sending.file), name=FILE)
        run.log_artifact(artifact)
        run.log({"report": wandb.Html(sending.file.read_text(encoding="utf-8"), inject=False)})
        where = run.url or f"{run.dir} (offline: `wandb sync` sends it)"
    return f"W&B run {run.id}: {where}"


def _to_mlflow(sending: Sending) -> str:
    mlflow: Any = import_module("mlflow")
    own = sending.own.get("id") or os.environ.get("MLFLOW_RUN_ID")
    with mlflow.start_run(run_id=own, run_name=None if own else sending.name) as run:
        mlflow.log_artifact(str(sending.file))
    return f"MLflow run {run.info.run_id}: {run.info.artifact_uri}/{FILE}"


def _to_trackio(sending: Sending) -> str:
    trackio: Any = import_module("trackio")
    project = sending.project or os.environ.get("TRACKIO_PROJECT", PROJECT)
    # The callback of transformers resumes a run by its name, too.
    trackio.init(
        project=project,
        name=sending.name,
        resume="allow",
        embed=False,
        # The load of this machine now is none of the run's.
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    try:
        trackio.log_artifact(str(sending.file), name=_artifact_name(sending), type="report")
    finally:
        trackio.finish()
    return f"Trackio project {project}, run {sending.name}: artefact {_artifact_name(sending)}"


def _to_tensorboard(sending: Sending) -> str:
    from torch.utils.tensorboard import SummaryWriter

    folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(sending.out / TENSORBOARD)
    writer: Any = SummaryWriter(folder)
    writer.add_text("report", summary_markdown(sending.report))
    writer.close()
    return f"TensorBoard text `report` in {folder}: its summary; the page itself is for --out"


def _artifact_name(sending: Sending) -> str:
    """Return a name that all trackers take: letters, digits, -, _ and dots."""
    return f"report-{re.sub(r'[^A-Za-z0-9_.-]', '-', sending.name)}"[:100]


SENDERS: Mapping[str, Callable[[Sending], str]] = {
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
    "trackio": _to_trackio,
    "tensorboard": _to_tensorboard,
}
"""Name of a tracker, and of its package -> function that sends a page to it."""
