"""The runner `processes`: the roles of a loop as processes of this machine.

RUN.OUT/logs/<role>-<n>.log       what a process prints
RUN.OUT/timeline/<role>-<n>.jsonl what it did, and when

The processes meet in the store and in the folder of the run, as those on other machines do.
"""

import sys
from collections.abc import Sequence

from logitcask.engine.config.runner import LOGS
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.errors import ConfigError
from logitcask.engine.events import EventHandler
from logitcask.engine.workers.processes import Command, OnLine, supervise

ROLES = ("rollout", "score", "train")


def run_processes(
    config: RunConfig,
    arguments: Sequence[str],
    *,
    on_event: EventHandler = lambda line: None,
    on_line: OnLine | None = None,
) -> str:
    """Run the roles of a loop until the training is done; return what the trainer printed.

    arguments: of a `logitcask distill` with this configuration. Raises as `supervise` does, and
    ConfigError for a run that is to be overwritten.
    """
    if config.run.overwrite:
        raise ConfigError(
            "run.overwrite = true with runner.kind = processes: a restart would lose the run",
            hint=f"leave it out, and remove {config.run.out} if that run is not needed",
        )
    return supervise(
        _commands(config, arguments),
        config.run.out / LOGS,
        restarts=config.runner.restarts,
        on_event=on_event,
        on_line=on_line,
    )


def _commands(config: RunConfig, arguments: Sequence[str]) -> list[Command]:
    runner = config.runner
    words = [sys.executable, "-P", "-m", "logitcask.cli.main", "distill", *arguments]
    return [
        Command(
            role=role,
            index=index,
            argv=[*words, "--role", role, "--index", str(index)],
            env={"CUDA_VISIBLE_DEVICES": gpus} if gpus else {},
            ranks=runner.ranks if role == "train" else 1,
            leads=role == "train",
        )
        for role in ROLES
        for index, gpus in enumerate(runner.gpus(role))
    ]
