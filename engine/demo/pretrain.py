"""Supervised pretraining of the demo's models, up to an accuracy.

The accuracy of such small models jumps from nothing to most of the task within a hundred steps, at
a time that depends on the seed. So training is not stopped by a number of steps: the accuracy is
measured between steps, and the model goes back to a snapshot where the accuracy is too high.
"""

import copy
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from logitcask.engine.demo.models import PAD, STOP, accuracy
from logitcask.engine.demo.task import Problem
from logitcask.engine.errors import LogitcaskError
from logitcask.engine.types import Progress

WARMUP_STEPS = 50
NEAR_NATS = 0.4
"""No problem is solved while the loss per token is above this: accuracy is not measured."""


class Pretrainer(Protocol):
    """A model in training whose accuracy can be measured, with snapshots."""

    lr: float
    """Peak learning rate of the next steps."""

    def train(self, steps: int, *, end: float = 1.0) -> float:
        """Train with a rate that goes from lr to end * lr, and return the last loss in nats."""
        ...

    def accuracy(self) -> float: ...

    def snapshot(self) -> Any: ...

    def rewind(self, snapshot: Any) -> None: ...


def pretrain_to_at_least(
    pretrainer: Pretrainer,
    target: float,
    *,
    ready: float,
    stride: int,
    slide: int,
    limit: int,
    stage: str,
    progress: Progress,
) -> float:
    """Train until the accuracy is `target` or more, and return it.

    The rate is constant up to the accuracy `ready`, then decays to almost 0 in `slide` steps, which
    gives the last percents. Where that was not enough, training resumes from before the decay.
    Raises LogitcaskError after `limit` steps.
    """
    spent, reached = 0, 0.0
    while spent < limit:
        loss = pretrainer.train(stride)
        spent += stride
        progress(stage, spent, limit)
        if loss > NEAR_NATS or pretrainer.accuracy() < ready:
            continue
        before = pretrainer.snapshot()
        pretrainer.train(slide, end=0.02)
        spent += slide
        reached = pretrainer.accuracy()
        if reached >= target:
            progress(stage, limit, limit)
            return reached
        pretrainer.rewind(before)
    raise LogitcaskError(
        f"{stage}: accuracy {reached:.1%} after {spent} steps, {target:.0%} is needed",
        hint="another --seed",
    )


def pretrain_between(
    pretrainer: Pretrainer,
    low: float,
    high: float,
    *,
    stride: int,
    limit: int,
    stage: str,
    progress: Progress,
) -> float:
    """Train until a measured accuracy is in [low, high], and return it.

    After an accuracy above `high` training resumes from the last snapshot below `low`, with half as
    many steps between measurements; from 1 step on, with half the rate. Raises LogitcaskError after
    `limit` steps, discarded ones included.
    """
    spent, reached = 0, 0.0
    below = pretrainer.snapshot()
    while spent < limit:
        loss = pretrainer.train(stride)
        spent += stride
        progress(stage, spent, limit)
        reached = pretrainer.accuracy() if loss <= NEAR_NATS else 0.0
        if low <= reached <= high:
            progress(stage, limit, limit)
            return reached
        if reached < low:
            below = pretrainer.snapshot()
            continue
        pretrainer.rewind(below)
        if stride > 1:
            stride //= 2
        else:
            pretrainer.lr /= 2
    raise LogitcaskError(
        f"{stage}: accuracy {reached:.1%} after {spent} steps, {low:.0%} to {high:.0%} is needed",
        hint="another --seed",
    )


class TaskPretrainer:
    """Pretrainer of a model on the solutions of a stream of problems.

    Shapes: B problems of a batch, L tokens of a padded row.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        problems: Iterator[Problem],
        validation: list[Problem],
        *,
        batch: int,
        lr: float,
        max_new_tokens: int,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.problems, self.validation = problems, validation
        self.batch, self.max_new_tokens = batch, max_new_tokens
        self.lr = lr
        self.steps = 0
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01
        )

    def train(self, steps: int, *, end: float = 1.0) -> float:
        self.model.train()
        loss = torch.tensor(math.inf)
        for step in range(steps):
            self.steps += 1
            slide = 1 + (end - 1) * (step + 1) / steps
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, self.steps / WARMUP_STEPS) * slide
            loss = self.loss(list(islice(self.problems, self.batch)))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()

    def loss(self, problems: list[Problem]) -> torch.Tensor:
        """Return the mean negative log-likelihood of the solutions, stop included, in nats."""
        prompts = self.tokenizer([p.prompt for p in problems])["input_ids"]
        solutions = self.tokenizer([p.solution for p in problems])["input_ids"]
        rows = [torch.tensor([*p, *s, STOP]) for p, s in zip(prompts, solutions, strict=True)]
        tokens_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        target_BL = tokens_BL[:, 1:] != PAD
        target_BL[:, : len(prompts[0]) - 1] = False
        # Rows are padded at their ends, which causal attention never reads: no mask is needed.
        hidden = self.model.model(input_ids=tokens_BL, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden[:, :-1][target_BL])
        return F.cross_entropy(logits, tokens_BL[:, 1:][target_BL])

    def accuracy(self) -> float:
        return accuracy(self.model, self.tokenizer, self.validation, self.max_new_tokens)

    def snapshot(self) -> Any:
        state = (self.model.state_dict(), self.optimizer.state_dict(), self.steps)
        return copy.deepcopy(state)

    def rewind(self, snapshot: Any) -> None:
        weights, optimizer, self.steps = copy.deepcopy(snapshot)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer)
