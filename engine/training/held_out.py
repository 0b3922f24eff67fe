"""Held-out rows: a run's own loss and all metrics on data that it is not trained on.

    eval/loss          mean over rows of the objective's own loss, before anything weighs rows
    eval/METRIC        mean over rows of each of METRICS
    eval/rows          how many rows that is

Rows are those of another store, or of another set of rollouts: pinned at the first call, so that
all numbers of a run, and of those that are compared with it, are of the same rows. Forward passes
only, in float32.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from logitcask.engine.errors import IncompleteError
from logitcask.engine.metrics.paper_code import METRICS_RELEASED
from logitcask.engine.objectives import ExactnessReport, Objective, Preset, check_exactness
from logitcask.engine.packing.batches import PlannedPacks
from logitcask.engine.packing.plan import PlanKey, make_plan
from logitcask.engine.packing.source import PackSource
from logitcask.engine.probes.metrics import measure
from logitcask.engine.store import Snapshot, Store
from logitcask.engine.store.cache import UnitCache
from logitcask.engine.training.cache_info import facts_of, first_snapshot
from logitcask.engine.training.trainer import gathered, rank
from logitcask.engine.types import ModelRef


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutSet:
    """Which data a run is to be measured on, and when."""

    store: Store
    rollouts: str
    teacher: str
    base: str | None = None
    snapshot: Snapshot | None = None
    """Left out, the store as it is at the first call."""
    every: int = 0
    """Updates between measurements, beside those before the first and after the last; 0 = none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Pinned rows that serve the objective of a run."""

    rows: PlannedPacks
    objective: Objective
    n_vocab: int
    every: int
    exactness: ExactnessReport
    """Of the student before its first update on these rows."""
    identity: Mapping[str, Any]
    """Goes into run.json; the same folder takes no run in which any of it differs."""

    def line(self, student: nn.Module) -> dict[str, float | None]:
        """Of the student as it is, as metrics.jsonl names it. Several processes take a share each.

        Raises IncompleteError where no row is counted.
        """
        share = self._share(student)
        everyone = gathered(share)
        counted = sum(weight for weight, _ in everyone)
        if not counted:
            raise IncompleteError(
                "no held-out row is counted: the loss mask is 0 everywhere",
                hint="name rollouts with sampled tokens by --eval-rollouts",
            )
        # A process without rows has no names.
        names = dict.fromkeys(name for _, sums in everyone for name in sums)
        return {
            **{f"eval/{n}": sum(s.get(n, 0.0) for _, s in everyone) / counted for n in names},
            "eval/rows": counted,
        }

    def _share(self, student: nn.Module) -> tuple[float, dict[str, float]]:
        """(sum of weights, name -> weighted sum) over this process's packed rows."""
        training = student.training
        student.eval()
        try:
            found, weight, _ = measure(
                student,
                self.rows,
                range(rank(), len(self.rows), len(gathered(None))),
                objectives={"own": self.objective},
                n_vocab=self.n_vocab,
                device=next(student.parameters()).device,
            )
        finally:
            student.train(training)
        on = weight > 0
        sums = {
            name: float(values[on] @ weight[on])
            for name, (values, _) in found.items()
            if name not in METRICS_RELEASED
        }
        return float(weight.sum()), {n.removesuffix("/own"): total for n, total in sums.items()}


def hold_out(
    asked: HeldOutSet,
    model: ModelRef,
    objective: Objective | Preset,
    pack_length: int,
    earlier: Mapping[str, Any] | None = None,
    cache: UnitCache | None = None,
) -> HeldOut:
    """Decodes no unit; `earlier` is run.json of an earlier call.

    Raises IdentityError for rollouts of another tokenizer, IncompleteError where units are missing
    or nothing is there, ObjectiveError where these scores cannot serve the objective.
    """
    store, snapshot = asked.store, asked.snapshot
    names = {"store": store.uuid, "rollouts": asked.rollouts, "teacher": asked.teacher}
    if snapshot is None:
        noted = ((earlier or {}).get("eval") or {}).get("held_out") or {}
        # Another set is another run, and is refused as such further on.
        same = all(noted.get(key) == name for key, name in names.items())
        snapshot = first_snapshot(store, noted if same else None)
    source = PackSource(
        store, snapshot, asked.rollouts, asked.teacher, base=asked.base, cache=cache
    )
    # Nothing is trained here: a support that another student froze is said, and measured.
    exactness = check_exactness(objective, facts_of(model, source, allow_off_lineage=True))
    key = PlanKey(
        snapshot=snapshot.number,
        snapshot_sha256=snapshot.sha256,
        rollouts=asked.rollouts,
        teacher=asked.teacher,
        seed=0,
        epochs=1,
        pack_length=pack_length,
    )
    plan = make_plan(key, source.lengths())
    if not len(plan):
        raise IncompleteError(
            f"held-out rollouts {asked.rollouts!r} hold no response token",
            hint="name others with --eval-rollouts",
        )
    return HeldOut(
        rows=PlannedPacks(plan, source),
        objective=objective.objective if isinstance(objective, Preset) else objective,
        n_vocab=model.n_vocab,
        every=asked.every,
        exactness=exactness,
        identity={
            **names,
            "base": asked.base,
            "pin": {"number": snapshot.number, "sha256": snapshot.sha256},
            "every": asked.every,
            "exactness": asdict(exactness),
        },
    )
