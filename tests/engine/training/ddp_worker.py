"""One process of a distributed training: `python ddp_worker.py CASE OUT`, as under torchrun.

It trains one update on fixed rows and saves the gradients, then runs `train`.
"""

import gc
import os
import sys
from pathlib import Path

import numpy as np
import torch

from logitcask.engine.backends.hf import HF
from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Train
from logitcask.engine.models.forward import inner_model
from logitcask.engine.models.identity import model_ref
from logitcask.engine.packing.source import PackSource
from logitcask.engine.store import Store, open_store
from logitcask.engine.training.evaluation.held_out import HeldOutSet
from logitcask.engine.training.evaluation.responses import EvalPlan
from logitcask.engine.training.train import train
from logitcask.engine.types import ModelRef, Prompt, SamplingParams
from tests.engine.fitting import REVERSE, WEIGHED, ListPacks, flat, make_trainer
from tests.engine.tiny import make_model

SEQUENCES = [[0, 1], [2], [3, 4]]
"""Three rows of one update of four: the last process's last row is empty."""

OBJECTIVES = {"plain": REVERSE, "weighed": WEIGHED}

SETTINGS = Train(learning_rate=1e-3, pack_length=24, gradient_accumulation_steps=2, save_steps=2)


def eval_plan(ref: ModelRef) -> EvalPlan:
    """Plan three prompts with two short responses each; the reward depends on every token."""
    return EvalPlan(
        prompts=[Prompt(id=f"e{i}", token_ids=(5 + i, 6)) for i in range(3)],
        sampling=SamplingParams(n=2, max_new_tokens=4),
        grader=lambda prompt, text: sum(map(int, text.split())) % 101 / 101,
        grader_name="sum",
        decode=lambda ids: " ".join(map(str, ids)),
        sampler=lambda student: HF(ref, dtype="float32", network=inner_model(student)),
    )


def held_out(store: Store) -> HeldOutSet:
    """Hold out the rows of the training itself."""
    return HeldOutSet(store=store, rollouts="main", teacher="big")


def main(case: Path, out: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects twice a training
    store = open_store(case / "store")
    source = PackSource(store, store.head(), "main", "big")
    rows = [source.pack(np.array([[0, s] for s in row])) for row in SEQUENCES]
    rank = int(os.environ["RANK"])
    for name, objective in OBJECTIVES.items():
        trainer, gradients = make_trainer(
            make_model().double(),
            ListPacks(rows, source),
            out / f"{name}{rank}",
            objective=objective,
            accumulation=2,
        )
        trainer.train()
        torch.save(
            {"grad": flat(gradients.updates[0]), "log": trainer.state.log_history[0]},
            out / f"{name}{rank}.pt",
        )
    ref = model_ref(str(case / "student"), chat_template=True)
    # Of three prompts one process takes two and the other one.
    train(
        store,
        model=ref,
        run=Run(out=out / "run", device="cpu"),
        teacher="big",
        objective=REVERSE,
        settings=SETTINGS,
        evaluation=eval_plan(ref),
        held_out=held_out(store),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
