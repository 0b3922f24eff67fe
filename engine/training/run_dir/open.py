"""The folder of a run, opened by all of its processes and locked by the first."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Train
from logitcask.engine.errors import ConfigError
from logitcask.engine.events import EventHandler
from logitcask.engine.training.run_dir.files import RUN, clear, locked, read_run
from logitcask.engine.training.settings import choose_attention, training_arguments
from logitcask.engine.types import ModelRef


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDir:
    """Folder of a run before the call, and its training arguments."""

    out: Path
    args: TrainingArguments
    earlier: Mapping[str, Any] | None
    """run.json of an earlier call."""
    attention: str | None
    """As of `settings.choose_attention`."""

    @property
    def first(self) -> bool:
        """Return True in the process that writes."""
        return bool(self.args.process_index == 0)

    @property
    def packs_per_update(self) -> int:
        """Return the packs of an update over all processes."""
        return int(self.args.gradient_accumulation_steps * self.args.world_size)

    def wait(self) -> None:
        """Wait for all processes."""
        if self.args.world_size > 1:
            torch.distributed.barrier()


@contextmanager
def open_run_dir(
    model: ModelRef, settings: Train, run: Run, on_event: EventHandler
) -> Iterator[RunDir]:
    """Open the folder `run.out`, and hold its lock in the process that writes.

    Raises ConfigError for a folder or a device that a run cannot use, and for a folder that another
    process holds; IntegrityError for a damaged run.json.
    """
    out = run.out
    if out.resolve() == model.path.resolve():
        raise ConfigError(f"--out {out} is the student itself", hint="give another --out")
    args = training_arguments(settings, run, model.path)
    attention = choose_attention(settings, args)
    run_dir = RunDir(out=out, args=args, earlier=None, attention=attention)
    with ExitStack() as stack:
        if run_dir.first:
            stack.enter_context(locked(out, on_event))
        run_dir.wait()
        overwrite = run.overwrite and (out / RUN).exists()
        earlier = None if overwrite else read_run(out)
        run_dir.wait()
        if run_dir.first and overwrite:
            clear(out)
        run_dir.wait()
        yield replace(run_dir, earlier=earlier)
