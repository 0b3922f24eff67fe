"""Distillations that kill themselves: `python kill_worker.py`, one JSON job a line on stdin.

A job {"config", "at", "count"} runs in its own process, forked directly after the imports. It sends
itself SIGKILL when it reaches `at` for the count-th time. Its exit code (-9 = killed) goes to
stdout. The kill leaves no time for a clean-up, and comes at the same point in every run.
"""

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

import logitcask.engine.training.run as run_module
import logitcask.engine.training.trainer as trainer
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.distill.loop import distill
from logitcask.engine.store import Store
from logitcask.engine.store.log.publish import Attempts
from logitcask.engine.training.run_dir.files import MetricsFile

POINTS: dict[str, tuple[Any, str, bool]] = {
    # name -> (where the function is looked up, its name, after it and not before)
    "rollout": (Store, "commit_rollouts", True),
    "score": (Store, "commit_scores", True),
    "publish": (Attempts, "publish", False),
    "micro_batch": (trainer.DistillTrainer, "_pack_loss", True),
    "update": (MetricsFile, "append", True),
    "weights": (trainer.DistillTrainer, "_save", True),
    "mark": (trainer, "complete_checkpoint", False),
    "marked": (trainer, "complete_checkpoint", True),
    "saving": (run_module, "save_student", False),
    "moving": (os, "replace", True),
}
"""publish: an encoded segment without a record. weights: a checkpoint without optimizer.
mark: a complete checkpoint without its resume metadata. moving: some files of the student, without
metadata."""


def arm(at: str, count: int) -> None:
    if at == "moving":
        # os.replace serves many; only those of the student's files count.
        save = run_module.save_student

        def armed(*args: Any, **kwargs: Any) -> None:
            _wrap(*POINTS["moving"], count)
            save(*args, **kwargs)

        run_module.save_student = armed
    else:
        _wrap(*POINTS[at], count)


def _wrap(place: Any, name: str, after: bool, count: int) -> None:
    function: Callable[..., Any] = getattr(place, name)
    left = count

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if not left and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = function(*args, **kwargs)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    setattr(place, name, wrapped)


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects twice a training, which would copy all pages of this process
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            try:
                if job["at"]:
                    arm(job["at"], job["count"])
                distill(RunConfig.model_validate(job["config"]))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
