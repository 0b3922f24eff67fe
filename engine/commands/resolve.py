"""Resolve the names in a configuration to models, prompts, graders and snapshots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from logitcask.engine.config.sections import Prompts, Rollout, Student
from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.models import identity
from logitcask.engine.prompts.graders import Decode, Grader, open_grader
from logitcask.engine.prompts.prompts import chat_template_for, load_tokenizer, read_prompts
from logitcask.engine.store import Snapshot, Store
from logitcask.engine.types import ModelRef, Prompt


def snapshot_of(store: Store, text: str) -> Snapshot:
    """Return the snapshot of a log number or a tag."""
    return store.snapshot(int(text) if text.isdecimal() else text)


def student_and_prompts(
    student: Student, prompts: Prompts, rollout: Rollout
) -> tuple[ModelRef, list[Prompt], bool]:
    """Return the student's reference, its prompts, and whether the chat template rendered them.

    Every prompt leaves room for max_new_tokens in the student's context.
    """
    path = identity.resolve_model(student.model, student.revision)
    tokenizer = load_tokenizer(path)
    template = chat_template_for(prompts.file, tokenizer, prompts.chat_template)
    model = identity.model_ref(
        student.model, revision=student.revision, chat_template=template, tokenizer=tokenizer
    )
    read = read_fitting(
        prompts.file, tokenizer, path, template, rollout.max_new_tokens, limit=prompts.limit
    )
    return model, read, template


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


def read_fitting(
    file: Path,
    tokenizer: Any,
    folder: Path,
    template: bool,
    max_new_tokens: int,
    of: str = "",
    limit: int | None = None,
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
        file,
        tokenizer,
        chat_template=template,
        max_prompt_tokens=context - max_new_tokens,
        limit=limit,
    )


def student_of(student: Student, snapshot: Snapshot, rollouts: str) -> ModelRef:
    """Return the reference of a student for a training on these rollouts."""
    template = rendered(snapshot, rollouts)
    return identity.model_ref(student.model, revision=student.revision, chat_template=template)


def rendered(snapshot: Snapshot, rollouts: str) -> bool:
    segments = snapshot.rollouts(rollouts)
    if not segments:
        known = ", ".join(snapshot.names("rollout")) or "none"
        raise IncompleteError(
            f"the store holds no rollouts named {rollouts!r}; it has: {known}",
            hint="run `logitcask rollout` first, or give --rollouts one of these",
        )
    # The digest is in the rollouts of every sampler, the plain field only in those of our commands.
    template: str = segments[0].provenance["student"]["template"]
    return template != identity.NO_TEMPLATE
