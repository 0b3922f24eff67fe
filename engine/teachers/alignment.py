"""The alignment of a student with a teacher of another tokenizer, before the teacher is loaded."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from logitcask.engine.alignment.alignment import Alignment, align_tokenizers
from logitcask.engine.config.teacher import Score
from logitcask.engine.errors import ConfigError
from logitcask.engine.events import EventHandler
from logitcask.engine.models.identity import context_length
from logitcask.engine.prompts.encode import readable
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.prompts.source import Source
from logitcask.engine.prompts.teacher_context import templated
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.teachers.checks import check_spans
from logitcask.engine.teachers.token_maps import student_tokenizer
from logitcask.engine.types import ModelRef, Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutText:
    """Rollouts whose text a teacher with another tokenizer can score."""

    score: Score
    """The request."""
    rendering: Rendering
    """Of the student's prompts."""
    stored: Callable[[], Iterable[Prompt]]
    """Returns them."""
    source: Source | None
    """The prompts file that they were rendered from; None = it is not given."""
    max_new_tokens: Callable[[], int]
    """Returns the longest response, which rollouts of other programs may not record."""
    on_event: EventHandler
    """Gets notes on the rendering."""

    def align(self, model: ModelRef, student: Mapping[str, Any], named: str) -> Alignment:
        """Return the alignment of a teacher, with its prompts unless --teacher-kind is context.

        student: its provenance; named: a folder or hub id with its tokenizer, "" = its recorded
        name. Raises ConfigError for a request that scores over spans cannot serve, and for prompts
        that were rendered by a chat template where their file is missing; and as `token_bytes`.
        """
        settings = self.score
        check_spans(
            model.name,
            extra_ids=settings.extra_ids,
            positions=settings.positions,
            selection=settings.selection,
        )
        template = self.has_template(model.name)
        rendered = template and settings.teacher_kind != "context"
        if rendered and self.source is None:
            raise ConfigError(
                f"{model.name} has another tokenizer than the student, whose chat template "
                "rendered the prompts: this teacher needs a rendering by its own",
                hint="give the prompts file that `logitcask rollout` read: --prompts FILE; or "
                "prompts for this teacher: --teacher-kind context --context FILE; or "
                "--no-chat-template where the prompts are plain texts, as some imported ones",
            )
        if settings.prompts is not None and not template and settings.prompt_template is None:
            raise ConfigError(
                f"prompts = {settings.prompts}, and no chat template renders them: {model.name} "
                "reads the bytes of the stored prompts",
                hint="leave --prompts out",
            )
        ours, theirs = student_tokenizer(student, named), load_tokenizer(model.path)
        alignment = align_tokenizers(
            ours,
            theirs,
            student_stops=student["stop_ids"],
            teacher_stops=model.stop_ids,
            chat_template=template,
            rows=settings.span_topk,
            cuts=settings.control_tokens == "cut",
        )
        if not rendered:
            return alignment
        assert self.source is not None, "refused above"
        rendering, unread = readable(theirs, self.rendering)
        for note in unread:
            self.on_event(f"{model.name}: {note}")
        prompts = templated(
            self.source,
            None,
            self.stored(),
            theirs,
            rendering,
            max_prompt_tokens=context_length(model.path) - self.max_new_tokens(),
            student=(ours, self.rendering),
        )
        return replace(alignment, prompts=prompts)

    def has_template(self, name: str) -> bool:
        """Return whether the teacher's chat template renders its prompts."""
        recorded, requested = self.rendering.chat_template, self.score.chat_template
        if requested and not recorded:
            raise ConfigError(
                f"chat_template = True, and {name} would read turns where the student read texts",
                hint="leave --chat-template out: no chat template rendered these prompts",
            )
        return recorded if requested is None else requested

    def check_unused(self, reason: str, *, by_spans: bool) -> None:
        """Raise ConfigError for settings that only scores over spans have; reason: no such ones.

        by_spans: of the teacher's settings.
        """
        settings = self.score
        unused = {"by_spans": "True"} if by_spans else dict[str, str]()
        for key in ("span_topk", "control_tokens", "chat_template", "same_texts"):
            if (value := getattr(settings, key)) != Score.model_fields[key].default:
                unused[key] = str(value)
        if settings.prompts is not None and settings.prompt_template is None:
            unused["prompts"] = str(settings.prompts)
        for key, value in unused.items():
            raise ConfigError(
                f"{key} = {value}, and {reason}",
                hint=f"leave --{key.replace('_', '-')} out",
            )
