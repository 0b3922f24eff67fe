"""All metrics, and losses of any objectives, of a checkpoint on a snapshot: forward passes only.

The numbers are those that training logs at the same weights on the same rows: both use the same
kernel and functions, and average over rows by the loss mask. A loss is the objective's, of every
row, without modifiers that weigh rows. The metrics of the paper's released code are added, each
mean pooled over rows as in that code. Scores of spans have the metrics of spans alone. With the
teacher's model the KL over the whole vocabulary is added too, see full_kl.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from logitcask.engine.errors import IncompleteError, ObjectiveError
from logitcask.engine.metrics.metrics import METRICS
from logitcask.engine.metrics.paper_code import METRICS_RELEASED, Pair, released_metrics
from logitcask.engine.models.forward import inner_model, inside_forward
from logitcask.engine.models.load import hidden_states
from logitcask.engine.objectives import (
    Objective,
    current_topk,
    parse_objective,
    row_objective,
)
from logitcask.engine.objectives.spans.evaluate import span_values
from logitcask.engine.packing.batches import PlannedPacks
from logitcask.engine.packing.source import Pack
from logitcask.engine.probes.full_kl import HeadRows, full_kl, head_rows
from logitcask.engine.types import Array, Detail, Progress, no_progress
from logitcask.kernels.linear_sparse_kl import linear_sparse_kl
from logitcask.kernels.objective_input import ObjectiveGrad, ObjectiveInput

ONLY_METRICS = Objective(
    support="teacher", divergence="forward_kl", tail="bucket", estimator="divergence", k=1
)
"""The kernel needs an objective to return metrics; the loss of this one is not used."""

SPAN_METRICS = parse_objective("span_advantage").objective
"""The same of packs whose teacher has another tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Rows whose position in the response lies in [start, end)."""

    start: int
    end: int
    rows: int
    """Rows with a loss mask above 0."""
    means: Mapping[str, float | None]
    """name -> mean over these rows, nats where it is one; None where nothing is counted, and where
    it is not finite."""


class Measured(NamedTuple):
    """Metrics of the P rows of some packs, float64."""

    sums: dict[str, tuple[Array, Array]]
    """name -> [P] sums, [P] counts."""
    weight: Array
    """[P] loss mask."""
    position: Array
    """[P] position in the response."""
    sequence: Array
    """[P] int64, number of the row's sequence among those of all packs, in their order."""


def probe(
    model: nn.Module,
    packs: PlannedPacks,
    *,
    objectives: Mapping[str, Objective],
    n_vocab: int,
    bins: int = 1,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
) -> list[Bin]:
    """Return the means over all rows, then over `bins` equally wide ranges of positions.

    objectives: name -> objective, whose loss is `loss/NAME`. Raises IncompleteError where no row is
    counted, ObjectiveError where the store lacks data of an objective.
    """
    model.to(device).eval()
    found = measure(
        model,
        packs,
        range(len(packs)),
        objectives=objectives,
        n_vocab=n_vocab,
        device=device,
        progress=progress,
    )
    return means_by_position(found, bins)


def means_by_position(found: Measured, bins: int) -> list[Bin]:
    """Return the means over all rows, then over `bins` equally wide ranges of positions.

    Raises IncompleteError where no row is counted.
    """
    sums, weight, position, _ = found
    if not (weight > 0).any():
        raise IncompleteError(
            "no row of these rollouts is counted: the loss mask is 0 everywhere",
            hint="probe rollouts that hold sampled tokens",
        )
    end = int(position.max()) + 1
    cuts = np.linspace(0, end, bins + 1).round().astype(np.int64)
    ranges = [(0, end), *zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)]
    return [
        _bin(a, b, sums, np.where((a <= position) & (position < b), weight, 0.0)) for a, b in ranges
    ]


@torch.no_grad()
def measure(
    model: nn.Module,
    packs: PlannedPacks,
    indices: range,
    *,
    objectives: Mapping[str, Objective],
    n_vocab: int,
    device: torch.device | str,
    teacher: nn.Module | None = None,
    progress: Progress = no_progress,
) -> Measured:
    """Measure the rows of these packs.

    The model must be in evaluation mode, on its device, and so must the `teacher`, for the KL over
    the whole vocabulary.
    """
    found: dict[str, list[Pair]] = {}
    weight: list[Tensor] = []
    position: list[Tensor] = []
    sequence: list[Tensor] = []
    rows = sequences = 0
    for done, index in enumerate(indices):
        progress("probe", done, len(indices), Detail(rows))
        pack = packs.pack(index).to(device)
        packs.prefetch(indices[done + 1 : done + 2])
        weight.append(pack.targets.weight.cpu())
        position.append(pack.targets.position.cpu())
        sequence.append(pack.targets.sequence.cpu() + sequences)
        rows, sequences = rows + len(pack.targets), sequences + len(pack.lengths)
        for name, pair in _measure_pack(model, pack, objectives, n_vocab, teacher).items():
            found.setdefault(name, []).append(pair)
    progress("probe", len(indices), len(indices), Detail(rows))
    sums = {}
    for name, pairs in found.items():
        total, count = (torch.cat(part).cpu().double().numpy() for part in zip(*pairs, strict=True))
        sums[name] = (total, count)
    # A process may have no pack.
    none = [torch.zeros(0)]
    w, at = (torch.cat(each or none).double().numpy() for each in (weight, position))
    return Measured(sums, w, at, torch.cat(sequence or none).long().numpy())


def _measure_pack(
    model: nn.Module,
    pack: Pack,
    objectives: Mapping[str, Objective],
    n_vocab: int,
    teacher: nn.Module | None,
) -> dict[str, Pair]:
    """Return name -> ([P] sum, [P] count) of the metrics, and of the losses as `loss/NAME`.

    Inside the forward of the head, inside that of the model, as in training: a sharded model
    gathers its weights there. A pack without rows runs as any other, and has no metrics.
    """
    head = inner_model(model).get_output_embeddings()
    other = None
    if teacher is not None:
        args = pack.input_ids, pack.position_ids, pack.lengths
        other = head_rows(teacher, hidden_states(teacher, *args)[pack.predict_at])

    def metrics(hidden: Tensor) -> dict[str, Pair]:
        own = head_rows(model, hidden[pack.predict_at])
        return _metrics_of(own, pack, objectives, n_vocab, other)

    def run(_: Tensor) -> dict[str, Pair]:
        hidden = hidden_states(model, pack.input_ids, pack.position_ids, pack.lengths)
        return inside_forward(head, metrics, hidden)

    return inside_forward(model, run, pack.input_ids)


def _metrics_of(
    own: HeadRows,
    pack: Pack,
    objectives: Mapping[str, Objective],
    n_vocab: int,
    teacher: HeadRows | None,
) -> dict[str, Pair]:
    found: dict[str, Pair] = {}
    if not len(pack.targets):
        return found
    others = SPAN_METRICS if pack.targets.span is not None else ONLY_METRICS
    for name, objective in (objectives or {"": others}).items():
        if objective.over_spans:
            found |= _of_spans(own, pack, objective, n_vocab, name)
            continue
        if pack.targets.span is not None:
            raise ObjectiveError(
                f"objective {name!r} needs scores of the student's tokens, and these are of spans",
                hint="name an objective over spans: `logitcask objectives` lists them",
            )
        evaluate = row_objective(objective, pack.targets)

        def with_released(view: ObjectiveInput, evaluate: Any = evaluate) -> ObjectiveGrad:
            output: ObjectiveGrad = evaluate(view)
            pairs = released_metrics(view, pack.targets.at(view.index))
            flat = {f"{key} {i}": pair[i] for key, pair in pairs.items() for i in (0, 1)}
            return output._replace(metrics={**output.metrics, **flat, "loss": output.loss})

        metrics = linear_sparse_kl(
            own.states,
            own.head,
            pack.targets.ids,
            with_released,
            k=current_topk(objective, n_vocab),
            n_vocab=n_vocab,
            logit_transform=own.logit_transform,
        ).metrics
        one = torch.ones_like(metrics["loss"])
        found |= {each: (metrics[each], one) for each in METRICS if each in metrics}
        found |= {each: (metrics[f"{each} 0"], metrics[f"{each} 1"]) for each in METRICS_RELEASED}
        if name:
            found[f"loss/{name}"] = (metrics["loss"], one)
    if teacher is not None:
        values = full_kl(own, teacher, n_vocab)
        found |= {name: (value, torch.ones_like(value)) for name, value in values.items()}
    return found


def _of_spans(
    own: HeadRows, pack: Pack, objective: Objective, n_vocab: int, name: str
) -> dict[str, Pair]:
    """Return the metrics of spans, and the loss if the objective has a name."""
    values = span_values(
        objective,
        own.states,
        own.head,
        pack.targets,
        n_vocab=n_vocab,
        logit_transform=own.logit_transform,
    )
    loss = values.pop("loss")
    values |= {f"loss/{name}": loss} if name else {}
    return {each: (value, torch.ones_like(value)) for each, value in values.items()}


def _bin(start: int, end: int, sums: Mapping[str, tuple[Array, ...]], weight: Array) -> Bin:
    counted = weight > 0
    means: dict[str, float | None] = {}
    for name, pair in sums.items():
        # A row that is not counted may hold any value, also NaN.
        total, count = (float(weight[counted] @ part[counted]) for part in pair)
        mean = total / count if count > 0 else math.nan
        means[name] = mean if math.isfinite(mean) else None
    return Bin(start=start, end=end, rows=int(counted.sum()), means=means)
