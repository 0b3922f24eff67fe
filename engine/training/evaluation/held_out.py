"""Held-out packs: the loss and all metrics of a run on data that it is not trained on.

    eval/loss          mean over rows of the objective's loss, without the modifiers that weigh rows
    eval/METRIC        mean over rows of each of METRICS
    eval/rows          number of rows

The data are those of another store, or of another set of rollouts. Their snapshot is fixed at the
first call, so all numbers of a run, and of runs compared with it, are of the same rows. Forward
passes only, in float32.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from logitcask.engine.config.teacher import TeacherMix
from logitcask.engine.errors import IncompleteError
from logitcask.engine.metrics.paper_code import METRICS_RELEASED
from logitcask.engine.objectives import ExactnessReport, Objective, Preset, check_exactness
from logitcask.engine.packing.batches import PlannedPacks
from logitcask.engine.packing.source import PackSource
from logitcask.engine.packing.teachers import NO_MIX, Teachers
from logitcask.engine.probes.metrics import measure
from logitcask.engine.store import Snapshot, Store
from logitcask.engine.store.cache import UnitCache
from logitcask.engine.training.cache_info import cache_info, first_snapshot
from logitcask.engine.training.processes import gathered, rank
from logitcask.engine.training.run_dir.shards import reshard
from logitcask.engine.types import Array, ModelRef, Progress, no_progress, stage_named


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutSet:
    """Data and frequency of a run's measurements on held-out packs."""

    store: Store
    rollouts: str
    teacher: str
    teacher_field: str | None = None
    mix: TeacherMix = NO_MIX
    base: str | None = None
    snapshot: Snapshot | None = None
    """None: the newest at the first call."""
    every: int = 0
    """Updates between measurements; 0 = only before the first update and after the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Held-out packs at a fixed snapshot that serve the objective of a run."""

    packs: PlannedPacks
    objective: Objective
    n_vocab: int
    longest: int
    """Tokens of the longest sequence."""
    every: int
    exactness: ExactnessReport
    """Report on these scores for the student before its first update."""
    identity: Mapping[str, Any]
    """Recorded in run.json; the folder accepts no run in which any of it differs."""

    def line(
        self,
        student: nn.Module,
        progress: Progress = no_progress,
        device: torch.device | None = None,
    ) -> dict[str, float | None]:
        """Return the entries of metrics.jsonl; each process measures a share of the packs.

        device: where the student computes; None = where its weights are. Raises IncompleteError
        where no row is counted.
        """
        place = device or next(student.parameters()).device
        everyone = gathered(self._share(student, progress, place))
        counted = sum(weight for weight, _ in everyone)
        if not counted:
            raise IncompleteError(
                "no held-out row is counted: the loss mask is 0 everywhere",
                hint="name rollouts with sampled tokens by --eval-rollouts",
            )
        # A process without packs has no names.
        names = dict.fromkeys(name for _, sums in everyone for name in sums)
        means = {n: sum(s.get(n, 0.0) for _, s in everyone) / counted for n in names}
        # JSON holds no infinity: that of the NLL of a token that the student excludes.
        return {
            **{f"eval/{n}": mean if math.isfinite(mean) else None for n, mean in means.items()},
            "eval/rows": counted,
        }

    def _share(
        self, student: nn.Module, progress: Progress, device: torch.device
    ) -> tuple[float, dict[str, float]]:
        """Return (sum of weights, name -> weighted sum) over the packs of this process."""
        found, weight = measure_share(
            student,
            self.packs,
            self.objective,
            n_vocab=self.n_vocab,
            device=device,
            progress=stage_named(progress, "held out"),
        )
        mask = weight > 0
        return float(weight.sum()), {
            name.removesuffix("/own"): float(values[mask] @ weight[mask])
            for name, (values, _) in found.items()
            if name not in METRICS_RELEASED
        }


def measure_share(
    student: nn.Module,
    packs: PlannedPacks,
    objective: Objective,
    *,
    n_vocab: int,
    device: torch.device,
    progress: Progress = no_progress,
) -> tuple[dict[str, tuple[Array, Array]], Array]:
    """Measure a student in training on the packs of this process.

    Return (name -> [P] sums and [P] counts, [P] loss mask), as of `measure`. Each process runs as
    many packs, the last ones maybe without rows: those of a sharded student wait for each other.
    """
    processes = len(gathered(None))
    end = -(-len(packs) // processes) * processes
    training = student.training
    student.eval()
    try:
        found = measure(
            student,
            packs,
            range(rank(), end, processes),
            objectives={"own": objective},
            n_vocab=n_vocab,
            device=device,
            progress=progress,
        )
    finally:
        student.train(training)
        reshard(student)
    return found.sums, found.weight


def hold_out(
    held_out: HeldOutSet,
    model: ModelRef,
    objective: Objective | Preset,
    pack_length: int | None,
    earlier: Mapping[str, Any] | None = None,
    cache: UnitCache | None = None,
) -> HeldOut:
    """Plan the held-out packs, without decoding a unit; `earlier` is run.json of an earlier call.

    Raises IdentityError for rollouts of another tokenizer, IncompleteError where units are missing
    or no row is there, ObjectiveError where these scores cannot serve the objective.
    """
    store, snapshot = held_out.store, held_out.snapshot
    teachers = Teachers.parse(held_out.teacher, held_out.teacher_field, held_out.mix)
    names = {"store": store.uuid, "rollouts": held_out.rollouts, **teachers.record()}
    if snapshot is None:
        recorded = ((earlier or {}).get("eval") or {}).get("held_out") or {}
        # Other names make another run, which is refused later.
        same = all(recorded.get(key) == name for key, name in names.items())
        snapshot = first_snapshot(store, recorded if same else None)
    source = PackSource(
        store,
        snapshot,
        held_out.rollouts,
        held_out.teacher,
        teacher_field=held_out.teacher_field,
        mix=held_out.mix,
        base=held_out.base,
        cache=cache,
    )
    # Nothing is trained here: a support frozen by another student is reported and measured.
    exactness = check_exactness(objective, cache_info(model, source, allow_off_lineage=True))
    plan = source.plan(seed=0, epochs=1, pack_length=pack_length)
    if not len(plan):
        raise IncompleteError(
            f"held-out rollouts {held_out.rollouts!r} hold no response token",
            hint="name others with --eval-rollouts",
        )
    return HeldOut(
        packs=PlannedPacks(plan, source),
        objective=objective.objective if isinstance(objective, Preset) else objective,
        n_vocab=model.n_vocab,
        longest=plan.longest,
        every=held_out.every,
        exactness=exactness,
        identity={
            **names,
            "base": held_out.base,
            "pin": {"number": snapshot.number, "sha256": snapshot.sha256},
            "every": held_out.every,
            "exactness": asdict(exactness),
        },
    )
