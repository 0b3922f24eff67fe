"""Drift of a student from the rollouts of a store: how long is a cache good?

Each student is measured on the rows of each version that sampled, by the function of `probe
metrics`. Its lag is its version less that one, in optimizer updates. In training `min_coverage` and
`max_drift` bound the same means, of an update.

Sources: coverage and uncached mass, engine/metrics; approx_kl is k3 of J. Schulman, "Approximating
KL divergence"; lag and finite caches, AsyncOPD (arXiv 2606.24143).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from logitcask.engine.errors import IncompleteError
from logitcask.engine.metrics.metrics import METRICS, compute_metrics
from logitcask.engine.objectives.bounds import COVERAGE, DRIFT, Bounds
from logitcask.engine.packing.batches import PlannedPacks
from logitcask.engine.probes.metrics import measure
from logitcask.engine.probes.topk.rows import sampled_rows
from logitcask.engine.types import Array, Progress, no_progress

MEASURES = (COVERAGE, "cache/uncached_mass", DRIFT, "overlap/ratio")
"""Names of METRICS."""
SAMPLER = "sampler"
"""The student that sampled, as stored: its lag is 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """Means of one student over the rows of one version."""

    student: str
    """Folder or hub id; SAMPLER from the store alone."""
    version: int
    """Its optimizer updates."""
    rollouts_version: int
    lag: int
    """Updates between both; below 0 for a student from before the rollouts."""
    rows: int
    means: Mapping[str, float]
    """Name of MEASURES -> mean over the rows. Of SAMPLER the coverage is a lower bound: the mass on
    ids with a stored log p."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftReport:
    """One line for each student and version, by lag."""

    lines: tuple[Drift, ...]
    reading: str


def row_versions(packs: PlannedPacks) -> Array:
    """Return [P] int64, the version that sampled each row, in the order of `measure`."""
    of = [packs.pack(index).targets.version.numpy() for index in range(len(packs))]
    return np.concatenate([np.zeros(0, np.int64), *of])


def student_drift(
    model: nn.Module,
    packs: PlannedPacks,
    versions: Array,
    *,
    name: str,
    version: int,
    n_vocab: int,
    device: torch.device | str,
    progress: Progress = no_progress,
) -> list[Drift]:
    """Measure a student on the rows of each version of the rollouts.

    versions: of `row_versions`. Raises IncompleteError where no row counts in a loss.
    """
    model.to(device).eval()
    sums, weight, *_ = measure(
        model,
        packs,
        range(len(packs)),
        objectives={},
        n_vocab=n_vocab,
        device=device,
        progress=progress,
    )
    values = np.stack([sums[each][0] for each in MEASURES], 1) if sums else np.zeros((0, 4))
    return _lines(values[weight > 0], versions[weight > 0], name, version)


def sampler_drift(packs: PlannedPacks, k: int, *, progress: Progress = no_progress) -> list[Drift]:
    """Measure the student that sampled, by version, from the store alone.

    k: top ids that are stored for every row. Raises IncompleteError where no row counts in a loss.
    """
    table = {name: METRICS[name] for name in MEASURES}
    values, versions = [np.zeros((0, len(MEASURES)))], [np.zeros(0, np.int64)]
    for each in sampled_rows(packs, k, stage="drift", progress=progress):
        found = compute_metrics(each.view, each.rows, k=k, table=table)
        values.append(torch.stack([found[name].double() for name in MEASURES], 1).numpy())
        versions.append(each.rows.version.numpy())
    return _lines(np.concatenate(values), np.concatenate(versions), SAMPLER, None)


def drift_report(lines: Sequence[Drift], bounds: Bounds) -> DriftReport:
    """Order the lines by lag, and compare them with the bounds of a training."""
    ordered = sorted(
        lines, key=lambda x: (x.lag, x.rollouts_version, x.student != SAMPLER, x.student)
    )
    return DriftReport(lines=tuple(ordered), reading=_reading(ordered, bounds))


def _lines(values: Array, versions: Array, name: str, version: int | None) -> list[Drift]:
    """Return a line for each version; version: of the student, None for the one that sampled."""
    if not len(values):
        raise IncompleteError(
            "no row of these rollouts is scored and counts in a loss",
            hint="probe rollouts that hold sampled tokens, with scores",
        )
    found = []
    for each in np.unique(versions).tolist():
        rows = values[versions == each]
        own = each if version is None else version
        found.append(
            Drift(
                student=name,
                version=own,
                rollouts_version=each,
                lag=own - each,
                rows=len(rows),
                means=dict(zip(MEASURES, rows.mean(0).tolist(), strict=True)),
            )
        )
    return found


def _reading(lines: Sequence[Drift], bounds: Bounds) -> str:
    """Name the least lag beyond each bound; the samplers alone say nothing about updates."""
    measured = [each for each in lines if each.student != SAMPLER and each.lag >= 0]
    if not measured:
        return "no student is later than the rollouts: give --model or --run to see later updates"
    low = [each.lag for each in measured if each.means[COVERAGE] < bounds.min_coverage]
    high = [each.lag for each in measured if each.means[DRIFT] > bounds.max_drift]
    last = max(each.lag for each in measured)
    parts = [
        f"coverage is under {bounds.min_coverage:g} from {low[0]} updates on"
        if low
        else f"coverage stays at {bounds.min_coverage:g} or more up to {last} updates",
        f"approx_kl is over {bounds.max_drift:g} nats from {high[0]} updates on"
        if high
        else f"approx_kl stays within {bounds.max_drift:g} nats",
    ]
    return "; ".join(parts) + ": the bounds of train, --min-coverage and --max-drift"
