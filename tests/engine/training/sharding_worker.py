"""Two processes of sharded trainings: `python sharding_worker.py CASES FOLDER`, as under torchrun.

FOLDER holds the cases; each of them is trained, and its gradients and result are saved below it.
"""

import errno
import gc
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Lora, Train
from logitcask.engine.errors import IncompleteError, StoreError
from logitcask.engine.models.identity import model_ref
from logitcask.engine.store import open_store
from logitcask.engine.training import run as run_module
from logitcask.engine.training.evaluation.held_out import HeldOutSet
from logitcask.engine.training.evaluation.responses import EvalPlan
from logitcask.engine.training.run import TrainReport
from logitcask.engine.training.train import train
from logitcask.engine.training.trainer import DistillTrainer
from logitcask.engine.types import NO_DETAIL, Detail, Progress
from tests.engine.fitting import DENSE
from tests.engine.training import ddp_worker

SETTINGS = Train(
    learning_rate=3e-4,
    pack_length=24,
    gradient_accumulation_steps=2,
    save_steps=2,
    max_grad_norm=1e9,
    metrics_fraction=1.0,
    sharding="fsdp2",
    gradient_checkpointing=True,
    num_train_epochs=2,
)
"""Three updates."""


class Watch(TrainerCallback):
    """The whole gradients of every update, and the types of the parameters."""

    def __init__(self) -> None:
        self.updates: list[dict[str, torch.Tensor]] = []
        self.kinds: set[str] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = {}
        for name, p in kwargs["model"].named_parameters():
            self.kinds.add(type(p).__name__)
            if p.grad is not None:
                whole = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                found[name.removeprefix("module.")] = whole.clone()
        self.updates.append(found)


def watched(
    folder: Path, out: str, watch: Watch | None = None, **change: Any
) -> tuple[TrainReport, Watch]:
    """Train the student of a case into FOLDER/OUT, and watch its updates."""
    watch = watch or Watch()
    build = DistillTrainer.__init__

    def with_watch(self: DistillTrainer, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        self.add_callback(watch)

    settings = SETTINGS.model_copy(update=change.pop("settings", {}))
    store = open_store(folder / "store")
    DistillTrainer.__init__ = with_watch  # type: ignore[method-assign]
    try:
        report = train(
            store,
            model=model_ref(str(folder / "student"), chat_template=True),
            teacher="big",
            objective=DENSE,
            settings=settings,
            lora=change.pop("lora", Lora()),
            run=Run(out=folder / out, device="cpu", dtype=change.pop("dtype", "auto")),
            held_out=HeldOutSet(store=store, rollouts="main", teacher="big"),
            **change,
        )
    finally:
        DistillTrainer.__init__ = build  # type: ignore[method-assign]
    return report, watch


def eval_plan(folder: Path) -> EvalPlan:
    """Plan the evaluation of ddp_worker for the student of a case."""
    return ddp_worker.eval_plan(model_ref(str(folder / "student"), chat_template=True))


class Stopped(Exception):
    pass


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects twice a training
    rank = int(os.environ["RANK"])

    def case(name: str, out: str, **change: Any) -> None:
        _, watch = watched(folder / name, out, **change)
        found = {"gradients": watch.updates, "kinds": sorted(watch.kinds)}
        torch.save(found, folder / name / f"{out}-{rank}.pt")

    case("tied", "fsdp2", evaluation=eval_plan(folder / "tied"))
    case("untied", "fsdp2")
    case("tied", "lora", lora=Lora(r=2))
    case("tied", "half", dtype="bfloat16")

    # Stopped after update 3, for one process to resume from update 2.
    with suppress(Stopped):
        case("untied", "moved", progress=stop_after(3))

    # Stopped after update 3 in one process.
    case("untied", "grown")
    case("tied", "grown-lora", lora=Lora(r=2))

    # A failure of the save; the same command finishes.
    save = run_module.save_student
    run_module.save_student = full_disk
    try:
        case("untied", "again")
    except StoreError as error:
        (folder / f"full-{rank}.txt").write_text(str(error))
    run_module.save_student = save
    case("untied", "again")

    # Killed between the last checkpoint and the save, for one process to finish.
    run_module.save_student = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    try:
        case("tied", "killed")
    except IncompleteError as error:
        (folder / f"killed-{rank}.txt").write_text(str(error))


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")


def stop_after(step: int) -> Progress:
    def progress(stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
        if stage == "train" and done == step:
            raise Stopped

    return progress


if __name__ == "__main__":
    main(Path(sys.argv[2]))
