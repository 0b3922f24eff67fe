"""Drift of stored segments: the mean over each of the metric that bounds rows.

In a loop, a segment beyond the bound is deleted and not scored again: ids of the current student
would mend its coverage, but not that its prefixes and its drawn ids are of another student.
"""

from dataclasses import replace

import numpy as np
from accelerate import PartialState
from torch import nn

from logitcask.engine.config.training import Train
from logitcask.engine.objectives import Objective
from logitcask.engine.objectives.bounds import Bounds, beyond, bounded_metric
from logitcask.engine.packing.batches import PlannedPacks
from logitcask.engine.packing.plan import PlanKey, make_plan
from logitcask.engine.packing.source import PackSource
from logitcask.engine.training.evaluation.held_out import measure_share
from logitcask.engine.training.processes import gathered


def drifted(
    student: nn.Module,
    source: PackSource,
    objective: Objective,
    settings: Train,
    *,
    n_vocab: int,
    pack_length: int,
) -> dict[str, str]:
    """Return seg_id -> reason, of the segments of a source that are beyond the bounds of a run.

    student: the model in training. Every process calls this, and measures a share of each segment.
    """
    metric = bounded_metric(objective)
    if metric is None:
        return {}
    lengths = source.lengths()
    key = PlanKey(
        snapshot=0,
        snapshot_sha256="",
        rollouts="",
        teacher="",
        seed=0,
        epochs=1,
        pack_length=pack_length,
    )
    sums: list[tuple[float, float]] = []
    for segment in lengths:
        alone = [
            each if each is segment else replace(each, response=np.zeros_like(each.response))
            for each in lengths
        ]
        found, weight = measure_share(
            student,
            PlannedPacks(make_plan(key, alone), source),
            objective,
            n_vocab=n_vocab,
            device=PartialState().device,
        )
        values = found[metric][0] if metric in found else weight
        counted = weight > 0
        sums.append((float(values[counted] @ weight[counted]), float(weight.sum())))
    bounds = Bounds(min_coverage=settings.min_coverage, max_drift=settings.max_drift)
    reasons: dict[str, str] = {}
    for segment, *of_each in zip(lengths, *gathered(sums), strict=True):
        rows = sum(weight for _, weight in of_each)
        mean = sum(total for total, _ in of_each) / rows if rows else None
        if (reason := beyond(objective, {metric: mean}, bounds)) is not None:
            reasons[segment.seg_id] = reason
    return reasons
