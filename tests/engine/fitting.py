"""Training of a tiny model on packed rows, with the gradients of its updates."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Train
from logitcask.engine.models.identity import model_ref
from logitcask.engine.objectives import Bounds, Objective
from logitcask.engine.objectives.bounds import NO_BOUNDS
from logitcask.engine.objectives.modifiers import KeepEntropy, Prune, Stepwise
from logitcask.engine.packing.source import Pack, PackSource
from logitcask.engine.store import Store
from logitcask.engine.training.metric_sampling import metric_sampling
from logitcask.engine.training.provenance.ledger import Ledger
from logitcask.engine.training.run_dir.files import LEDGER, METRICS, MetricsFile
from logitcask.engine.training.settings import training_arguments
from logitcask.engine.training.trainer import DistillTrainer
from logitcask.engine.types import ModelRef, no_progress
from tests.engine.cached import Unit, make_store
from tests.engine.tiny import make_model, save_folder

REVERSE = Objective(
    support="teacher", divergence="reverse_kl", tail="renormalize", estimator="divergence", k=4
)
FORWARD = replace(REVERSE, divergence="forward_kl")
DENSE = replace(FORWARD, tail="bucket")
WEIGHED = replace(
    REVERSE, modifiers=(Prune(overlap=0.9, drop=0.1, k=4), Stepwise(tokens=3), KeepEntropy(0.4))
)
"""With modifiers that depend on whole sequences, and on all rows of an update."""


def make_case(
    folder: Path, units: list[Unit], *, seconds: list[float] | None = None, **model: Any
) -> tuple[Store, ModelRef]:
    """Return a store of `units` and the student that sampled them.

    `seconds` are the teacher's seconds for each unit.
    """
    save_folder(folder / "student", make_model(**model))
    ref = model_ref(str(folder / "student"), chat_template=True)
    return make_store(folder / "store", units, student=ref, seconds=seconds), ref


class Gradients(TrainerCallback):
    """The gradients of every update, as the optimizer sees them."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Tensor | None]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        grads = {name: None if p.grad is None else p.grad.clone() for name, p in named}
        self.updates.append({name.removeprefix("module."): grad for name, grad in grads.items()})


class ListPacks:
    """`Packs` from a list; empty packs after its end."""

    def __init__(self, packs: Sequence[Pack], source: PackSource) -> None:
        self._packs = packs
        self._source = source
        self.prepared: list[int] = []
        self.expected: list[int] = []

    def prepare(self, step: int) -> Sequence[str]:
        self.prepared.append(step)
        return ()

    def prefetch(self, indices: Iterable[int]) -> None:
        self.expected = list(indices)

    def pack(self, index: int) -> Pack:
        if index < len(self._packs):
            return self._packs[index]
        return self._source.pack(torch.zeros(0, 2).long().numpy())


def make_trainer(
    model: nn.Module,
    packs: Any,
    folder: Path,
    *,
    updates: int = 1,
    objective: Objective = REVERSE,
    n_vocab: int = 99,
    lr: float = 1e-3,
    accumulation: int = 1,
    aggregation: str = "token-mean",
    bounds: Bounds = NO_BOUNDS,
) -> tuple[DistillTrainer, Gradients]:
    """Return a trainer without gradient clipping, and its gradients."""
    settings = Train(
        learning_rate=lr,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1e9,
        save_steps=10**6,
    )
    args = training_arguments(settings, Run(out=folder, device="cpu"))
    args.save_strategy = "no"  # type: ignore[assignment]
    folder.mkdir(parents=True, exist_ok=True)
    trainer = DistillTrainer(
        model,
        args,
        packs=packs,
        updates=updates,
        objective=objective,
        n_vocab=n_vocab,
        sampling=metric_sampling(settings, updates),
        aggregation=aggregation,
        dropout=False,
        bounds=bounds,
        version=0,
        known_ages=True,
        metrics=MetricsFile(folder / METRICS),
        ledger=Ledger(folder / LEDGER),
        resume_metadata={},
        progress=no_progress,
    )
    gradients = Gradients()
    trainer.add_callback(gradients)
    return trainer, gradients


def token_mean(model: Any, rows: Sequence[Pack], objective: Objective = REVERSE) -> Tensor:
    """Return the token mean of single-sequence rows in torch: a forward each, full softmax."""
    total, weight = torch.zeros(()), torch.zeros(())
    for row in rows:
        t = row.targets
        first = row.input_ids.shape[1] - len(t) - 1
        logits = model(input_ids=row.input_ids, use_cache=False).logits[0, first : first + len(t)]
        mask = t.q_rank < objective.k
        log_p = logits.log_softmax(-1).gather(1, t.ids.clamp(min=0))
        log_p, log_q = (torch.where(mask, x, -1e9).log_softmax(-1) for x in (log_p, t.q_log_p))
        pair = (log_p, log_q) if objective.divergence == "reverse_kl" else (log_q, log_p)
        terms = torch.where(mask, pair[0].exp() * (pair[0] - pair[1]), 0.0)
        total = total + (terms.sum(1) * t.weight).sum()
        weight = weight + t.weight.sum()
    return total / weight


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return |ours - theirs| / |theirs|."""
    return float((ours - theirs).norm() / theirs.norm())


def flat(gradients: dict[str, Tensor | None]) -> Tensor:
    return torch.cat([g.flatten() for _, g in sorted(gradients.items()) if g is not None])
