"""Trackers of transformers (`report_to`), which get the names of metrics.jsonl.

TensorBoard writes to OUT/tensorboard, or where TENSORBOARD_LOGGING_DIR says. The others have
settings of their own, in the environment: WANDB_MODE=offline, MLFLOW_TRACKING_URI, and so on.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import integration_utils as module

from logitcask.engine.errors import ConfigError
from logitcask.engine.models.digests import replace_text
from logitcask.engine.training.run_dir.files import TENSORBOARD, TRACKERS, writing

integration_utils: Any = module
WANDB, MLFLOW = "wandb", "mlflow"
EXTRA = 'pip install -e ".[trackers]"'
PACKAGES = {"comet_ml": "comet-ml", "azure_ml": "azureml-mlflow", "flyte": "flytekit"}
"""Names of packages that differ from the tracker's."""


def check_trackers(report_to: str | Sequence[str]) -> list[str]:
    """Return the names of the trackers; ConfigError for one that is unknown or not installed."""
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    names = [name for name in names if name != "none"]
    known = integration_utils.INTEGRATION_TO_CALLBACK
    # transformers imports W&B to see if it is there, which takes seconds.
    if {*names} <= {TENSORBOARD}:
        there = [TENSORBOARD] if integration_utils.is_tensorboard_available() else []
    else:
        there = integration_utils.get_available_reporting_integrations()
    for name in names:
        if name not in known:
            raise ConfigError(
                f"train.args.report_to: {name} is no tracker", hint=f"one of {', '.join(known)}"
            )
        if name not in there:
            ours = name in (TENSORBOARD, WANDB)
            raise ConfigError(
                f"train.args.report_to: {name} is not installed",
                hint=EXTRA if ours else f"pip install {PACKAGES.get(name, name)}",
            )
    models = os.environ.get("WANDB_LOG_MODEL", "false")
    if WANDB in names and models.lower() != "false":
        raise ConfigError(
            f"WANDB_LOG_MODEL = {models}: W&B would log checkpoints and a model that is not proved",
            hint="unset it, and log the finished folder with `wandb artifact put`",
        )
    return list(dict.fromkeys(names))


def tensorboard_callback(out: Path, step: int) -> TrainerCallback:
    """Return transformers' callback with a writer of OUT/tensorboard, which resumes at `step`."""
    from torch.utils.tensorboard import SummaryWriter

    folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(out / TENSORBOARD)
    # A run that was interrupted may have logged updates after its newest checkpoint.
    writer = SummaryWriter(folder, purge_step=step + 1 if step else None)
    callback: TrainerCallback = integration_utils.TensorBoardCallback(writer)
    return callback


@contextmanager
def own_names() -> Iterator[None]:
    """Let trackers take names as they are: transformers puts train/ before most."""
    rewrite = integration_utils.rewrite_logs
    integration_utils.rewrite_logs = dict
    try:
        yield
    finally:
        integration_utils.rewrite_logs = rewrite


@contextmanager
def ended_runs(report_to: Sequence[str], out: Path) -> Iterator[None]:
    """End the W&B run that a training begins, so that the next of this process has its own.

    The identities of the runs are noted in the folder `out`, for what later adds to them.
    """
    if WANDB not in report_to:
        yield
        _note_runs(report_to, out)
        return
    import wandb

    earlier = wandb.run
    try:
        yield
    except BaseException:
        if earlier is None:
            wandb.finish(exit_code=1)
        raise
    _note_runs(report_to, out)
    if earlier is None:
        wandb.finish()


def _note_runs(report_to: Sequence[str], out: Path) -> None:
    """Write TRACKERS; only the process that reports has runs."""
    own: dict[str, dict[str, str]] = {}
    if WANDB in report_to and (run := import_module(WANDB).run) is not None:
        own[WANDB] = {"entity": run.entity, "project": run.project, "id": run.id}
    if MLFLOW in report_to and (run := import_module(MLFLOW).last_active_run()) is not None:
        own[MLFLOW] = {"id": run.info.run_id}
    if own:
        with writing(out / TRACKERS):
            replace_text(out / TRACKERS, json.dumps(own, indent=1) + "\n")
