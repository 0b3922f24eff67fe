"""Facts of rollouts, their scores and a student that an objective depends on."""

from collections.abc import Mapping, Sequence
from typing import Any

from logitcask.engine.alignment.span_scores import NONE
from logitcask.engine.config.teacher import TeacherMix
from logitcask.engine.errors import IdentityError
from logitcask.engine.objectives import (
    CacheInfo,
    ExactnessReport,
    Objective,
    Preset,
    check_exactness,
)
from logitcask.engine.packing.source import PackSource
from logitcask.engine.packing.teacher_weights import weighting_text
from logitcask.engine.packing.teachers import NO_MIX
from logitcask.engine.store import Segment, Snapshot, Store
from logitcask.engine.store.decoded_unit import dtypes_of
from logitcask.engine.store.format.provenance import IMPORTED
from logitcask.engine.training.processes import gathered
from logitcask.engine.types import MC_IDS, ModelRef, SamplingParams


def first_snapshot(store: Store, earlier: Mapping[str, Any] | None) -> Snapshot:
    """Return the snapshot of the earlier call, else the newest of the first process."""
    # The run of a loop has none; it is refused later, as another run.
    if earlier is not None and "pin" in earlier:
        return store.snapshot(int(earlier["pin"]["number"]), earlier["pin"]["sha256"])
    newest = store.head()
    return store.snapshot(*gathered((newest.number, newest.sha256))[0])


def check_objective(
    objective: Objective | Preset,
    store: Store,
    *,
    snapshot: Snapshot,
    rollouts: str,
    teacher: str,
    teacher_field: str | None = None,
    mix: TeacherMix = NO_MIX,
    base: str | None = None,
    partial: bool = False,
) -> ExactnessReport:
    """Check the objective against these scores, for your own training loop.

    The student is assumed to have the base weights of the sampling one, at an unknown age. Raises
    ObjectiveError where the scores cannot serve the objective, and the errors of PackSource.
    """
    source = PackSource(
        store,
        snapshot,
        rollouts,
        teacher,
        teacher_field=teacher_field,
        mix=mix,
        base=base,
        partial=partial,
    )
    return check_exactness(objective, cache_info(None, source, allow_off_lineage=False))


def cache_info(model: ModelRef | None, source: PackSource, allow_off_lineage: bool) -> CacheInfo:
    """Collect the facts of scores and student; model = None for a student without a folder.

    Raises IdentityError for another tokenizer.
    """
    rollouts = [segment for segment, _ in source.pairs]
    # What depends on provenance and layouts is read from one pair of each kind.
    kinds = {(_kind((s,)), _kind(scores)): (s, scores) for s, scores in source.pairs}.values()
    requests = [[each.provenance["request"] for each in scores] for _, scores in kinds]
    sampler = rollouts[0].provenance["student"]
    if model is not None and sampler["tokenizer"] != model.tokenizer_digest:
        raise IdentityError(
            f"the rollouts were sampled with tokenizer {sampler['tokenizer']}, the student "
            f"{model.name} has {model.tokenizer_digest}",
            hint="train a student with the tokenizer of the rollouts, or sample with this one",
        )
    sampling = rollouts[0].provenance["set"]
    # A name of scores has one request for all of its units.
    own_ids = tuple(
        dict.fromkeys(
            scores[0].name
            for _, scores in kinds
            if not any(each.provenance["request"]["at_student"] for each in scores)
        )
    )
    imported = rollouts[0].provenance.get(IMPORTED)
    return CacheInfo(
        student_k=int(sampling["student_topk"]),
        # Of the unit with the smallest request: a plan mixes all of them.
        k_min=min(max(int(each["teacher_topk_min"]) for each in unit) for unit in requests),
        k_max=min(max(int(each["teacher_topk_max"]) for each in unit) for unit in requests),
        at_student=all(any(each["at_student"] for each in unit) for unit in requests),
        versions=tuple(sorted({s.version for s in rollouts})),
        student_version=None if model is None else model.version,
        same_base_weights=model is None or sampler["base_weights"] == model.base_weights,
        same_weights=model is None
        or all(s.provenance["student"]["weights"] == model.digest for s, _ in kinds),
        same_template=model is None or sampler["template"] == model.template_digest,
        # Not validated: the values of another writer may be beyond our bounds.
        plain_sampling=imported is None
        and SamplingParams.model_construct(**{key: sampling[key] for key in _SAMPLING}).is_plain(),
        imported="" if imported is None else _origin(imported),
        known_draws=imported is None or imported["behavior"],
        allow_off_lineage=allow_off_lineage,
        n_vocab=int(sampler["n_vocab"]) if model is None else model.n_vocab,
        mc_draws=int(sampling.get("mc_draws", 0)),
        at_mc=all(
            any(each.provenance.get("at") == MC_IDS for each in scores) for _, scores in kinds
        ),
        q_draws=min(
            int(each.get("draws", 0)) if each.get("selection") == "sampled" else 0
            for unit in requests
            for each in unit
        ),
        base=source.base is not None,
        mixture=str(source.teachers) if source.teachers.mixed else "",
        span_rows=_span_rows([each.provenance for _, scores in kinds for each in scores]),
        mixture_kind=source.teachers.mix.mixture,
        weighting=weighting_text(source.teachers.mix),
        own_ids=own_ids,
        rewards=all("reward" in dtypes_of(*pair) for pair in kinds),
        samples=int(sampling.get("n", 0)),
        entropy_bounds=source.bounded,
        scored=source.coverage(),
    )


def _span_rows(provenances: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the row of each span that has the teacher's ids, None for one tokenizer."""
    found = {each["alignment"]["rows"] for each in provenances if "alignment" in each}
    # A teacher with the student's tokenizer has its ids at every row.
    return found.pop() if len(found) == 1 else NONE if found else None


def _origin(imported: Mapping[str, Any]) -> str:
    return f"{'text' if imported['text'] else 'ids'} of {imported['file']!r:.80}"


def _kind(segments: Sequence[Segment]) -> tuple[tuple[str, str], ...]:
    return tuple((each.provenance_sha256, each.layout) for each in segments)


_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
