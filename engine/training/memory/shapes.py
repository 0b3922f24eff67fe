"""Shapes of the largest pack and of the loss of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from logitcask.engine.config.training import Train
from logitcask.engine.objectives import Bounds, Objective
from logitcask.engine.objectives.bounds import skips
from logitcask.engine.objectives.evaluate import has_known_support, is_renormalised
from logitcask.engine.packing.plan import Lengths, PackPlan
from logitcask.engine.training.metric_sampling import SHARE


@dataclass(frozen=True, kw_only=True, slots=True)
class PackShape:
    """The largest pack of a run."""

    lengths: tuple[int, ...]
    """Tokens of its sequences, prompts included."""
    rows: int
    """Response positions, once for each teacher of a sum."""
    ids: int
    """Most stored ids of a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossShape:
    """Passes of an objective's loss over the vocabulary."""

    dense: bool
    """True where the gradient of the head is a product with the logits of all ids."""
    measured: float
    """Share of the rows that metrics read all logits of."""


def largest_pack(
    plan: PackPlan, lengths: Sequence[Lengths], ids: int, copies: int = 1
) -> PackShape:
    """Return the shape of the pack with most tokens.

    ids: most stored ids of a row. copies: rows of a position, one for each teacher of a sum.
    """
    at = [(segment, sequence) for segment, sequence in plan.members.tolist()]
    prompt = np.array([int(lengths[i].prompt[j]) for i, j in at])
    response = np.array([int(lengths[i].response[j]) for i, j in at])
    worst = int(np.add.reduceat(prompt + response, plan.offsets[:-1]).argmax())
    part = slice(plan.offsets[worst], plan.offsets[worst + 1])
    tokens = (prompt + response)[part].tolist()
    return PackShape(lengths=tuple(tokens), rows=copies * int(response[part].sum()), ids=ids)


def loss_shape(objective: Objective, settings: Train) -> LossShape:
    """Return the shape of the loss that pack_loss computes for an objective."""
    renormalised = is_renormalised(objective)
    bounds = Bounds(
        action=settings.staleness_action,
        min_coverage=settings.min_coverage,
        max_drift=settings.max_drift,
    )
    alone = renormalised and has_known_support(objective) and not skips(objective, bounds)
    measured = (settings.metrics_fraction or SHARE) if alone else 1.0
    return LossShape(dense=not renormalised, measured=measured)
