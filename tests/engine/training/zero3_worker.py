"""Two processes of trainings with ZeRO-3: `python zero3_worker.py CASES FOLDER`.

As sharding_worker.py. The gradients are DeepSpeed's before its step, in which it clips them.
"""

import gc
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
from tests.engine.training.sharding_worker import (
    Stopped,
    Watch,
    eval_plan,
    stop_after,
    watched,
)

CLIPPED = {"max_grad_norm": 0.5, "lr_scheduler_type": "linear", "warmup_steps": 1}
STILL = {"dtype": "bfloat16", "settings": {"learning_rate": 1e-12, "max_steps": 1}}


class WatchSteps(Watch):
    """As Watch; the kinds are (status, kept whole) of the parameters before each step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pass

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from deepspeed.utils import safe_get_full_grad  # pyright: ignore[reportMissingImports]

        named = dict(kwargs["model"].named_parameters())
        zero = next(iter(named.values()))._z3_optimizer
        step = zero.step

        def watched_step(*args: Any, **options: Any) -> Any:
            found = {}
            for name, p in named.items():
                assert p.ds_tensor.numel() == -(-p.ds_numel // 2), "half of each parameter"
                self.kinds.add(f"{p.ds_status.name} {p.ds_persist}")
                if p.requires_grad:
                    found[name] = safe_get_full_grad(p).float().reshape(p.ds_shape).clone()
            self.updates.append(found)
            return step(*args, **options)

        zero.step = watched_step


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects twice a training
    rank = int(os.environ["RANK"])
    linear = torch.nn.functional.linear

    def case(name: str, out: str, **change: Any) -> None:
        watch = WatchSteps()
        settings = {"sharding": "zero3"} | change.pop("settings", {})
        try:
            watched(folder / name, out, watch, settings=settings, **change)
            assert torch.nn.functional.linear is linear, "as before the run"
        finally:
            found = {"gradients": watch.updates, "kinds": sorted(watch.kinds)}
            torch.save(found, folder / name / f"{out}-{rank}.pt")

    plan = eval_plan(folder / "tied")
    case("tied", "zero3", evaluation=plan)
    case("tied", "lora", lora=Lora(r=2), dtype="bfloat16", evaluation=plan)

    # Stopped after update 3, for one process to resume from update 2; and the other way round.
    with suppress(Stopped):
        case("untied", "moved", settings=CLIPPED, progress=stop_after(3))
    case("untied", "grown", settings=CLIPPED)

    # Gradients that are not finite.
    try:
        case("tied", "broken", settings={"learning_rate": 1e30})
    except ModelError as error:
        (folder / f"broken-{rank}.txt").write_text(str(error))

    # Killed between the last checkpoint and the save, for one process to finish.
    run_module.save_student = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    try:
        case("tied", "killed", **STILL)
    except IncompleteError as error:
        (folder / f"killed-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
