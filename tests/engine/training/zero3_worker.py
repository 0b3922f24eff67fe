"""Two processes of trainings with ZeRO-3: `python zero3_worker.py CASES FOLDER`, see sharding_worker.

The gradients are those of DeepSpeed before its step, and so before it clips them.
"""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from logitcask.engine.config.training import Lora
from logitcask.engine.errors import IncompleteError, ModelError
from logitcask.engine.training import run as run_module
from tests.engine.training.sharding_worker import SETTINGS, Stopped, Watch, stop_after, watched

ZERO3 = {"sharding": "zero3"}
CLIPPED = {"max_grad_norm": 0.5}


class WatchSteps(Watch):
    """As Watch; the kinds are (status, kept whole) of the parameters before each step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pass

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from deepspeed.utils import safe_get_full_grad

        zero = next(kwargs["model"].parameters())._z3_optimizer
        step = zero.step

        def watched_step(*args: Any, **options: Any) -> Any:
            found = {}
            for name, p in kwargs["model"].named_parameters():
                assert p.ds_tensor.numel() == -(-p.ds_numel // 2)
                self.kinds.add(f"{p.ds_status.name} {p.ds_persist}")
                if p.requires_grad:
                    found[name] = safe_get_full_grad(p).float().reshape(p.ds_shape).clone()
            self.updates.append(found)
            return step(*args, **options)

        zero.step = watched_step


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])

    def case(name: str, out: str, **change: Any) -> None:
        watch = WatchSteps()
        settings = ZERO3 | change.pop("settings", {})
        watched(folder / name, out, watch, settings=settings, **change)
        found = {"gradients": watch.updates, "kinds": sorted(watch.kinds)}
        torch.save(found, folder / name / f"{out}-{rank}.pt")

    case("tied", "zero3")
    case("untied", "zero3", settings=CLIPPED)
    case("tied", "lora", lora=Lora(r=2))
    case("tied", "half", dtype="bfloat16")

    # Stopped after update 3, for one process to resume from update 2.
    with suppress(Stopped):
        case("untied", "moved", settings=CLIPPED, progress=stop_after(3))

    # Stopped after update 3 in one process.
    case("untied", "grown", settings=CLIPPED)

    # Gradients that are not finite.
    try:
        case("tied", "broken", settings={"learning_rate": 1e30})
    except ModelError as error:
        (folder / f"broken-{rank}.txt").write_text(str(error))

    # Killed between the last checkpoint and the save, for one process to finish.
    run_module.save_student = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    try:
        case("tied", "killed")
    except IncompleteError as error:
        (folder / f"killed-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
