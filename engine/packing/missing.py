"""Work units that a training would miss."""

from collections.abc import Mapping, Sequence

from logitcask.engine.errors import IncompleteError
from logitcask.engine.models.identity import digest
from logitcask.engine.store import ScoreSegments, Segment, Store
from logitcask.engine.store.format.provenance import PROMPT_RANGE


def check_planned(store: Store, segments: Sequence[Segment], rollouts_name: str) -> None:
    """Raise IncompleteError if planned rollout units are missing."""
    # Each version of the student has its own number of planned units, in a loop each round, which
    # several versions may share. A worker that follows the student leaves the rest of a version.
    one_of = {(s.provenance_sha256, s.version): s for s in segments}
    kinds = {each: s.provenance for each, s in one_of.items()}
    newest = max((version for _, version in kinds), default=0)
    left = {each for each, of in kinds.items() if PROMPT_RANGE in of and each[1] < newest}
    of = {
        provenance.get("round", (kind[1], digest(provenance["student"]))): provenance
        for kind, provenance in kinds.items()
        if kind not in left
    }
    there = sum((s.provenance_sha256, s.version) not in left for s in segments)
    if not all("units" in provenance["set"] for provenance in of.values()):
        raise IncompleteError(
            f"rollouts {rollouts_name!r} do not record how many units were planned (set.units)",
            hint="train on the committed units with --partial, or commit them with that number",
        )
    planned_units = sum(provenance["set"]["units"] for provenance in of.values())
    if planned_units > there:
        raise IncompleteError(
            f"{planned_units - there} of {planned_units} units of rollouts {rollouts_name!r} are "
            "missing",
            hint=f"repeat the first `logitcask rollout --store {store.url} --rollouts "
            f"{rollouts_name}`, or train on the committed units with --partial",
        )


def check_scored(
    store: Store,
    segments: Sequence[Segment],
    scores: Mapping[str, ScoreSegments],
    rollouts_name: str,
    teacher: str,
    *,
    flag: str = "",
) -> None:
    """Raise IncompleteError if scores of committed units are missing.

    flag: the flag of `logitcask score` that makes such scores.
    """
    missing = sum(segment.seg_id not in scores for segment in segments)
    if missing:
        raise IncompleteError(
            f"{missing} of {len(segments)} units of rollouts {rollouts_name!r} have no scores of "
            f"{teacher!r}",
            hint=f"run `logitcask score --model TEACHER --store {store.url} "
            f"--rollouts {rollouts_name} --teacher {teacher}{flag}`, or train on the scored units "
            "with --partial",
        )
