"""Work units that a training would miss."""

from collections.abc import Mapping, Sequence

from logitcask.engine.errors import IncompleteError
from logitcask.engine.models.identity import digest
from logitcask.engine.store import ScoreSegments, Segment, Store


def check_planned(store: Store, segments: Sequence[Segment], rollouts_name: str) -> None:
    """Raise IncompleteError if planned rollout units are missing."""
    # Each version of the student has its own number of planned units, in a loop each round, which
    # several versions may share.
    of = {
        s.provenance.get("round", (s.version, digest(s.provenance["student"]))): s.provenance
        for s in segments
    }
    if not all("units" in provenance["set"] for provenance in of.values()):
        raise IncompleteError(
            f"rollouts {rollouts_name!r} do not record how many units were planned (set.units)",
            hint="train on the committed units with --partial, or commit them with that number",
        )
    planned_units = sum(provenance["set"]["units"] for provenance in of.values())
    if planned_units > len(segments):
        raise IncompleteError(
            f"{planned_units - len(segments)} of {planned_units} units of rollouts "
            f"{rollouts_name!r} are missing",
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
