"""Every metric and any objective's loss of a checkpoint on pinned rows: forward passes only.

The numbers are those that training logs at the same weights on the same rows: both take them from
the same kernel, by the same functions, and average over rows by the loss mask. A loss is the
objective's own, of every row, before anything weighs rows. What the paper's released code logs
instead is shown beside them, each mean pooled over rows as it is there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logitcask.engine.errors import IncompleteError
from logitcask.engine.metrics.metrics import METRICS
from logitcask.engine.metrics.paper_code import METRICS_RELEASED, Pair, released_metrics
from logitcask.engine.models.load import head_weight, hidden_states, inner_model
from logitcask.engine.models.logit_transform import logit_transform_of
from logitcask.engine.objectives import Objective, current_topk, row_objective
from logitcask.engine.packing.batches import PlannedPacks
from logitcask.engine.packing.source import Pack
from logitcask.engine.types import Array, Progress, no_progress
from logitcask.kernels.linear_sparse_kl import linear_sparse_kl
from logitcask.kernels.objective_input import ObjectiveGrad, ObjectiveInput

ONLY_METRICS = Objective(
    support="teacher", divergence="forward_kl", tail="bucket", estimator="divergence", k=1
)
"""An objective must be there for its metrics to be seen; this one's loss is not looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Rows whose position in the response lies in [start, end)."""

    start: int
    end: int
    rows: int
    """Of loss mask above 0."""
    means: Mapping[str, float | None]
    """name -> mean over these rows, nats where it is one; None where nothing is counted."""


def probe(
    model: nn.Module,
    rows: PlannedPacks,
    *,
    objectives: Mapping[str, Objective],
    n_vocab: int,
    bins: int = 1,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
) -> list[Bin]:
    """The means over all rows, then over `bins` equally wide ranges of positions.

    objectives: name -> whose loss is shown as `loss/NAME`. Raises IncompleteError where no row is
    counted, ObjectiveError where the store lacks what an objective looks at.
    """
    model.to(device).eval()
    every, w, at = measure(
        model,
        rows,
        range(len(rows)),
        objectives=objectives,
        n_vocab=n_vocab,
        device=device,
        progress=progress,
    )
    if not (w > 0).any():
        raise IncompleteError(
            "no row of these rollouts is counted: the loss mask is 0 everywhere",
            hint="probe rollouts that hold sampled tokens",
        )
    end = int(at.max()) + 1
    cuts = np.linspace(0, end, bins + 1).round().astype(np.int64)
    ranges = [(0, end), *zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)]
    return [_bin(a, b, every, np.where((a <= at) & (at < b), w, 0.0)) for a, b in ranges]


@torch.no_grad()
def measure(
    model: nn.Module,
    rows: PlannedPacks,
    indices: range,
    *,
    objectives: Mapping[str, Objective],
    n_vocab: int,
    device: torch.device | str,
    progress: Progress = no_progress,
) -> tuple[dict[str, tuple[Array, ...]], Array, Array]:
    """(name -> [P] sums and [P] counts, [P] loss mask, [P] positions) of these packed rows' rows,
    float64; the model is in evaluation mode, on its device.
    """
    found: dict[str, list[Pair]] = {}
    weight: list[Tensor] = []
    position: list[Tensor] = []
    for done, index in enumerate(indices):
        progress("probe", done, len(indices))
        row = rows.pack(index).to(device)
        rows.prefetch(indices[done + 1 : done + 2])
        assert row.targets.position is not None, "rows of a store have one"
        weight.append(row.targets.weight.cpu())
        position.append(row.targets.position.cpu())
        for name, pair in _row(model, row, objectives, n_vocab).items():
            found.setdefault(name, []).append(pair)
    progress("probe", len(indices), len(indices))
    every = {
        name: tuple(torch.cat(part).cpu().double().numpy() for part in zip(*pairs, strict=True))
        for name, pairs in found.items()
    }
    # A process may have none.
    none = [torch.zeros(0)]
    w, at = (torch.cat(each or none).double().numpy() for each in (weight, position))
    return every, w, at


def _row(
    model: nn.Module, row: Pack, objectives: Mapping[str, Objective], n_vocab: int
) -> dict[str, Pair]:
    """name -> [P] sum, [P] count: the metrics, and the losses as `loss/NAME`."""
    states = hidden_states(model, row.input_ids, row.position_ids)[row.predict_at]
    found: dict[str, Pair] = {}
    for name, objective in (objectives or {"": ONLY_METRICS}).items():
        asked = row_objective(objective, row.targets)

        def answer(view: ObjectiveInput, asked: Any = asked) -> ObjectiveGrad:
            made: ObjectiveGrad = asked(view)
            pairs = released_metrics(view, row.targets.at(view.index))
            flat = {
                f"{name} {i}": part for name, pair in pairs.items() for i, part in enumerate(pair)
            }
            return made._replace(metrics={**made.metrics, **flat, "loss": made.loss})

        metrics = linear_sparse_kl(
            states,
            head_weight(model),
            row.targets.ids,
            answer,
            k=current_topk(objective, n_vocab),
            n_vocab=n_vocab,
            logit_transform=logit_transform_of(inner_model(model).config),
        ).metrics
        one = torch.ones_like(metrics["loss"])
        found |= {each: (metrics[each], one) for each in METRICS if each in metrics}
        found |= {each: (metrics[f"{each} 0"], metrics[f"{each} 1"]) for each in METRICS_RELEASED}
        if name:
            found[f"loss/{name}"] = (metrics["loss"], one)
    return found


def _bin(start: int, end: int, every: Mapping[str, tuple[Array, ...]], weight: Array) -> Bin:
    counted = weight > 0
    means: dict[str, float | None] = {}
    for name, pair in every.items():
        # A row that is not counted may hold anything, NaN too.
        total, count = (float(weight[counted] @ part[counted]) for part in pair)
        means[name] = total / count if count > 0 else None
    return Bin(start=start, end=end, rows=int(counted.sum()), means=means)
