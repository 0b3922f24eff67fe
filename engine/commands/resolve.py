"""Resolve the names in a configuration to models, prompts, graders and snapshots."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from logitcask.engine.config.prompts import Columns, Prompts
from logitcask.engine.config.sections import Rollout, Student
from logitcask.engine.errors import ConfigError, IncompleteError, StoreError
from logitcask.engine.events import EventHandler
from logitcask.engine.models import identity
from logitcask.engine.prompts.graders import Decode, Grader, open_grader
from logitcask.engine.prompts.prompts import chat_template_for, load_tokenizer, read_prompts
from logitcask.engine.prompts.source import Source, open_source
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.store import Snapshot, Store
from logitcask.engine.types import ModelRef, Prompt


def snapshot_of(store: Store, text: str | None) -> Snapshot:
    """Return the snapshot of a log number or a tag; None = the newest."""
    if text is None:
        return store.head()
    return store.snapshot(int(text) if text.isdecimal() else text)


def student_and_prompts(
    student: Student,
    prompts: Prompts,
    rollout: Rollout,
    on_event: EventHandler = lambda line: None,
) -> tuple[ModelRef, list[Prompt], Rendering]:
    """Return the student's reference, its prompts, and how they were rendered.

    Every prompt leaves room for max_new_tokens in the student's context. Notes on special tokens go
    to `on_event`.
    """
    path = identity.resolve_model(student.model, student.revision)
    tokenizer = load_tokenizer(path)
    source = open_source(prompts.file, columns_of(prompts), limit=prompts.limit)
    rendering = Rendering(
        chat_template=chat_template_for(source, tokenizer, prompts.chat_template),
        chat_template_kwargs=json.loads(prompts.chat_template_kwargs or "{}"),
        drop_last_assistant=prompts.drop_last_assistant,
        system_prompt=prompts.system_prompt,
        source=source.record,
    )
    # The weights are read for the reference, so an invalid prompt is found before that.
    read = read_fitting(
        source,
        tokenizer,
        path,
        rendering,
        rollout.max_new_tokens,
        limit=prompts.limit,
        on_event=on_event,
    )
    model = identity.model_ref(
        student.model,
        revision=student.revision,
        chat_template=rendering.chat_template,
        tokenizer=tokenizer,
        stop_token_ids=rollout.stop_token_ids,
    )
    if note := identity.stop_note(model, tokenizer):
        on_event(note)
    return model, read, rendering


def grader_of(rollout: Rollout, model: ModelRef, prompts: Sequence[Prompt]) -> Grader | None:
    """Return the grader of [rollout], or None.

    Raises as open_grader does.
    """
    if not rollout.grader:
        return None
    grader = open_grader(rollout.grader, prompts)
    decode = decoder(load_tokenizer(model.path))
    return Grader(name=rollout.grader, grader=grader, decode=decode)


def decoder(tokenizer: Any) -> Decode:
    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    return decode


def columns_of(section: Columns) -> Columns:
    """Return the columns alone of a section that also holds other keys."""
    return Columns(**{name: getattr(section, name) for name in Columns.model_fields})


def read_fitting(
    source: Source,
    tokenizer: Any,
    folder: Path,
    rendering: Rendering,
    max_new_tokens: int,
    of: str = "",
    *,
    limit: int | None = None,
    on_event: EventHandler = lambda line: None,
) -> list[Prompt]:
    """Read prompts that leave room for the response in the context of the model in `folder`, at
    most `limit`. `of` is the prefix of the key for its length.
    """
    context = identity.context_length(folder)
    if max_new_tokens >= context:
        raise ConfigError(
            f"{of}max_new_tokens = {max_new_tokens}: the student's context of {context} tokens "
            "leaves no room for a prompt",
            hint=f"give --{of.replace('.', '-')}max-new-tokens less than {context}",
        )
    return read_prompts(
        source,
        tokenizer,
        rendering,
        max_prompt_tokens=context - max_new_tokens,
        limit=limit,
        on_event=on_event,
    )


def student_of(student: Student, snapshot: Snapshot, rollouts: str) -> ModelRef:
    """Return the reference of a student for a training on these rollouts."""
    template = rendering_of(snapshot, rollouts).chat_template
    stops = snapshot.rollouts(rollouts)[0].provenance.get("set", {}).get("stop_token_ids", [])
    if not isinstance(stops, list) or any(type(each) is not int for each in stops):
        raise StoreError(
            f"rollouts {rollouts!r} record stop_token_ids = {stops!r:.80}, which is no list of ids",
            hint="sample them again with this version of `logitcask rollout`",
        )
    return identity.model_ref(
        student.model,
        revision=student.revision,
        chat_template=template,
        stop_token_ids=stops,
    )


def rendering_of(snapshot: Snapshot, rollouts: str) -> Rendering:
    """Return how the prompts of rollouts were rendered."""
    segments = snapshot.rollouts(rollouts)
    if not segments:
        known = ", ".join(snapshot.names("rollout")) or "none"
        raise IncompleteError(
            f"the store holds no rollouts named {rollouts!r}; it has: {known}",
            hint="run `logitcask rollout` first, or give --rollouts one of these",
        )
    provenance = segments[0].provenance
    variables = provenance.get("chat_template_kwargs", {})
    dropped = provenance.get("drop_last_assistant", False)
    system, source = provenance.get("system_prompt", ""), provenance.get("source", {})
    if not isinstance(variables, dict) or type(dropped) is not bool:
        raise StoreError(
            f"rollouts {rollouts!r} record chat_template_kwargs = {variables!r:.80} and "
            f"drop_last_assistant = {dropped!r:.80}, which are not an object and a boolean",
            hint="sample them again with this version of `logitcask rollout`",
        )
    if not isinstance(system, str) or not isinstance(source, dict):
        raise StoreError(
            f"rollouts {rollouts!r} record system_prompt = {system!r:.80} and source = "
            f"{source!r:.80}, which are not a string and an object",
            hint="sample them again with this version of `logitcask rollout`",
        )
    # The digest is in the rollouts of every sampler, the plain field only in those of our commands.
    template: str = provenance["student"]["template"]
    return Rendering(
        chat_template=template != identity.NO_TEMPLATE,
        chat_template_kwargs=variables,
        drop_last_assistant=dropped,
        system_prompt=system,
        source=source,
    )


def columns_in(source: Mapping[str, Any]) -> Columns:
    """Return the columns that rollouts record; StoreError for other ones than ours."""
    try:
        return Columns(**{key: source[key] for key in Columns.model_fields if key in source})
    except ValidationError as error:
        raise StoreError(
            f"the rollouts record the columns {dict(source)!r:.200}, which are not ours",
            hint="give the prompts by --context, rendered from a JSONL file",
        ) from error
