"""`logitcask probe continuation`: both models continue stored responses of the student."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from logitcask.engine.backends.base import close_backend
from logitcask.engine.backends.sampling import check_room
from logitcask.engine.commands.load_teacher import backend
from logitcask.engine.commands.resolve import decoder, rendering_of, snapshot_of, student_of
from logitcask.engine.config.probes import ContinuationConfig
from logitcask.engine.errors import ConfigError, IdentityError, IncompleteError
from logitcask.engine.models import identity
from logitcask.engine.probes import figures
from logitcask.engine.probes.continuation import (
    ContinuationReport,
    Prefix,
    continuation_report,
    grade,
    prefixes,
)
from logitcask.engine.prompts.graders import Grader, open_grader
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.store import open_store
from logitcask.engine.teachers.checks import check_identity
from logitcask.engine.teachers.remote import is_remote
from logitcask.engine.types import (
    NO_DETAIL,
    Array,
    Detail,
    ModelRef,
    Progress,
    SamplingParams,
    no_progress,
)


def run_continuation_probe(
    config: ContinuationConfig, figure: Path | None = None, *, progress: Progress = no_progress
) -> ContinuationReport:
    """Let student and teacher continue the prefixes, sampled as the rollouts were, and grade both.

    figure: file for the curves. Before a weight is loaded it raises ConfigError for lengths, a
    teacher or a grader that cannot be, IdentityError for another tokenizer, PromptError for a
    context that is too short, IncompleteError for rollouts without the settings of their sampling.
    """
    if figure is not None:
        figures.check_file(figure)
    chosen, name = config.continuation, config.store.rollouts
    if is_remote(chosen.teacher_model):
        raise ConfigError(
            f"teacher {chosen.teacher_model}: a server does not sample here",
            hint="give --teacher-model a model folder or a hub id",
        )
    store = open_store(config.store.url)
    snapshot = snapshot_of(store, chosen.snapshot)
    template = rendering_of(snapshot, name).chat_template
    recorded = snapshot.rollouts(name)[0].provenance
    sampling = _sampling(recorded, name).model_copy(update={"n": chosen.n})
    if (longest := max(chosen.at)) >= sampling.max_new_tokens:
        raise ConfigError(
            f"at = {longest}, and these responses have {sampling.max_new_tokens} tokens at most",
            hint=f"give --at lengths below {sampling.max_new_tokens}",
        )
    models = {
        "student": student_of(config.student, snapshot, name),
        "teacher": identity.model_ref(chosen.teacher_model, chat_template=template),
    }
    for model in models.values():
        if model.tokenizer_digest != recorded["student"]["tokenizer"]:
            raise IdentityError(
                f"{model.name} has another tokenizer than the student that sampled, and both "
                "models go on from its ids here",
                hint="give a model with the student's tokenizer",
            )
        check_identity(recorded["student"], model)
    data = [store.read_rollouts(each) for each in snapshot.rollouts(name)]
    cuts = {at: prefixes(data, at, chosen.limit) for at in chosen.at}
    grader = _grader(chosen.grader, recorded, models["student"], cuts)
    # A response and its prefix have the room of a response.
    prompts = [each.prompt for found in cuts.values() for each in found]
    for model in models.values():
        check_room(prompts, sampling.max_new_tokens, identity.context_length(model.path))
    right = {
        who: _accuracies(config, model, cuts, sampling, grader, who, progress)
        for who, model in models.items()
    }
    report = continuation_report(chosen.n, right["student"], right["teacher"])
    if figure is not None:
        figures.draw_continuations(figure, report)
    return report


def _sampling(recorded: Mapping[str, Any], name: str) -> SamplingParams:
    """Return the sampling of rollouts, as they record it."""
    values = recorded.get("set", {})
    try:
        return SamplingParams(**{key: values[key] for key in SamplingParams.model_fields})
    except (KeyError, ValidationError) as error:
        raise IncompleteError(
            f"rollouts {name!r} do not record how they were sampled",
            hint="take rollouts that `logitcask rollout` sampled",
        ) from error


def _grader(
    name: str,
    recorded: Mapping[str, Any],
    model: ModelRef,
    cuts: Mapping[int, Sequence[Prefix]],
) -> Grader:
    """Return the grader of a name, "" = that of the rollouts."""
    name = name or str(recorded.get("set", {}).get("grader", ""))
    if not name:
        raise ConfigError(
            "these rollouts were not graded, and no grader is given",
            hint="give --grader exact on prompts with answers, or --grader MODULE:FUNCTION",
        )
    function = open_grader(name, [each.prompt for found in cuts.values() for each in found])
    return Grader(name=name, grader=function, decode=decoder(load_tokenizer(model.path)))


def _accuracies(
    config: ContinuationConfig,
    model: ModelRef,
    cuts: Mapping[int, Sequence[Prefix]],
    sampling: SamplingParams,
    grader: Grader,
    who: str,
    progress: Progress,
) -> dict[int, Array]:
    """Return length -> [M] accuracies of one model."""
    found = dict[int, Array]()

    def report(stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
        progress(who, len(found), len(cuts), Detail(share=done / max(1, total)))

    sampler = backend(model, config.run)
    try:
        for at, chosen in cuts.items():
            rolled = sampler.generate(
                [each.as_prompt() for each in chosen],
                sampling.model_copy(update={"max_new_tokens": sampling.max_new_tokens - at}),
                seed=config.run.seed,
                version=model.version,
                progress=report,
            )
            found[at] = grade(chosen, rolled, grader, config.continuation.correct_from)
    finally:
        close_backend(sampler)
    progress(who, len(cuts), len(cuts))
    return found
