"""Train a student on a pinned store: one call, which resumes where it was interrupted."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from logitcask.engine.batches import PlannedRows
from logitcask.engine.course import Course, TrainReport, TrainSettings, carry_out, open_desk
from logitcask.engine.errors import IdentityError, IncompleteError
from logitcask.engine.evaluate import EvalPlan
from logitcask.engine.objectives import Facts, Objective, Preset, verdict
from logitcask.engine.plan import Plan, PlanKey, make_plan
from logitcask.engine.row_source import RowSource
from logitcask.engine.store import Pin, Store
from logitcask.engine.store.cache import UnitCache
from logitcask.engine.trainer import gathered
from logitcask.engine.types import MC_IDS, ModelRef, Progress, SamplingParams, silent

Notice = Callable[[str], None]
"""Called with a line that a person should read: labels and warnings."""


def train(
    store: Store,
    *,
    model: ModelRef,
    out: Path,
    teacher: str,
    base: str | None = None,
    rollouts: str = "main",
    objective: Objective | Preset,
    settings: TrainSettings | None = None,
    pin: Pin | None = None,
    partial: bool = False,
    foreign_student: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    evaluation: EvalPlan | None = None,
    cache: UnitCache | None = None,
    config: Mapping[str, Any] | None = None,
    report_to: tuple[str, ...] = (),
    notice: Notice = lambda line: None,
    progress: Progress = silent,
) -> TrainReport:
    """Trains `model` on the scores of `teacher`, and saves it as the next version in `out`.

    `base` names scores of the model that the teacher was made from, for objectives that look there.
    Without a `pin` the store is pinned as it is at the first call. The same call on the same `out`
    resumes from the newest checkpoint, bit-exactly on a CPU. `evaluation`: what it is asked before
    the first update and after the last. `cache`: keeps decoded units for other
    runs. `config`, the caller's resolved configuration, is only
    recorded, in run.json. What the cache serves exactly for the objective
    goes to `notice` before the first update. Under torchrun every process calls this.

    Raises ConfigError, IdentityError (another run in `out`, another tokenizer than the rollouts'),
    IncompleteError (units missing and not `partial`), ObjectiveError (the cache cannot serve the
    objective) and ModelError.
    """
    settings = settings or TrainSettings()
    desk = open_desk(
        out,
        model=model,
        settings=settings,
        overwrite=overwrite,
        device=device,
        report_to=report_to,
    )
    if pin is None:
        pin = _pin(store, desk.earlier)
    source = RowSource(store, pin, rollouts, teacher, base=base, partial=partial, cache=cache)
    facts = _facts(model, source, foreign_student)
    exactness = verdict(objective, facts)
    if desk.first:
        for line in exactness.lines():
            notice(line)
    plan = _plan(source, pin, rollouts, teacher, settings)
    course = Course(
        rows=lambda student: PlannedRows(plan, source),
        updates=-(-len(plan) // desk.rows_per_update),
        objective=objective,
        same_root=facts.same_root,
        identity={
            "store": store.uuid,
            "pin": {"number": pin.number, "sha256": pin.sha256},
            "rollouts": rollouts,
            "teacher": teacher,
            "base": base,
        },
        plan=plan.digest,
        exactness=exactness,
        evaluation=evaluation,
    )
    return carry_out(
        course, desk, model=model, settings=settings, config=config or {}, progress=progress
    )


def check(
    store: Store,
    *,
    model: ModelRef,
    teacher: str,
    rollouts: str,
    objective: Objective | Preset,
    settings: TrainSettings,
    pin: Pin,
    partial: bool,
    foreign_student: bool,
    base: str | None = None,
) -> None:
    """Raises what `train` would raise of these before its first update; decodes no unit."""
    source = RowSource(store, pin, rollouts, teacher, base=base, partial=partial)
    verdict(objective, _facts(model, source, foreign_student))
    _plan(source, pin, rollouts, teacher, settings)


def _pin(store: Store, earlier: Mapping[str, Any] | None) -> Pin:
    """That of the earlier call, else the newest that the first process sees."""
    # A loop's run has none, and is refused as another run further on.
    if earlier is not None and "pin" in earlier:
        return store.pin(int(earlier["pin"]["number"]), earlier["pin"]["sha256"])
    newest = store.head()
    number, sha256 = gathered((newest.number, newest.sha256))[0]
    return store.pin(number, sha256)


def _facts(model: ModelRef, source: RowSource, foreign_student: bool) -> Facts:
    """What the cache and the student are to each other. IdentityError for another tokenizer."""
    rollouts = [segment for segment, _ in source.pairs]
    asked = [[each.lineage["request"] for each in chain] for _, chain in source.pairs]
    sampler = rollouts[0].lineage["student"]
    if sampler["tokenizer"] != model.tokenizer_digest:
        raise IdentityError(
            f"the rollouts were sampled with tokenizer {sampler['tokenizer']}, the student "
            f"{model.name} has {model.tokenizer_digest}",
            remedy="train a student with the tokenizer of the rollouts, or sample with this one",
        )
    sampling = rollouts[0].lineage["set"]
    return Facts(
        student_k=int(sampling["student_k"]),
        # Of the unit that was asked for least: a plan mixes all of them.
        k_min=min(max(int(each["k_min"]) for each in requests) for requests in asked),
        k_max=min(max(int(each["k_max"]) for each in requests) for requests in asked),
        at_student=all(any(each["at_student"] for each in requests) for requests in asked),
        versions=tuple(sorted({int(s.unit["version"]) for s in rollouts})),
        student_version=model.version,
        same_root=sampler["root"] == model.root,
        same_weights=all(s.lineage["student"]["weights"] == model.digest for s in rollouts),
        same_template=sampler["template"] == model.template_digest,
        plain_sampling=SamplingParams(**{k: sampling[k] for k in _SAMPLING}).is_plain(),
        allow_foreign=foreign_student,
        n_vocab=model.n_vocab,
        mc_draws=int(sampling.get("mc_draws", 0)),
        at_mc=all(
            any(each.lineage.get("at") == MC_IDS for each in chain) for _, chain in source.pairs
        ),
        q_draws=min(
            int(each.get("draws", 0)) if each.get("entry_kind") == "sampled" else 0
            for requests in asked
            for each in requests
        ),
        base=source.base is not None,
    )


_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _plan(
    source: RowSource, pin: Pin, rollouts: str, teacher: str, settings: TrainSettings
) -> Plan:
    key = PlanKey(
        pin=pin.number,
        pin_sha256=pin.sha256,
        rollouts=rollouts,
        teacher=teacher,
        seed=settings.seed,
        epochs=settings.epochs,
        tokens_per_batch=settings.tokens_per_batch,
    )
    plan = make_plan(key, source.lengths())
    if not len(plan):
        raise IncompleteError(
            f"rollouts {rollouts!r} hold no response token",
            remedy="sample again with a larger --max-new-tokens",
        )
    return plan
