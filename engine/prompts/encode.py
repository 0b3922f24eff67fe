"""Token ids of prompts: rendered by the chat template, or texts as the tokenizer begins them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.prompts.lines import Line, Turns
from logitcask.engine.prompts.templates import Renderer, Rendering, TemplateError


class Encoder:
    """A tokenizer and a rendering, for the prompts of one file.

    Raises ConfigError for variables that no chat template takes, ModelError as Renderer does.
    """

    def __init__(self, tokenizer: Any, rendering: Rendering) -> None:
        self._tokenizer, self._variables = tokenizer, rendering.chat_template_kwargs
        self._renderer = Renderer(tokenizer) if rendering.chat_template else None
        self._begin: list[int] | None = None
        """Ids that the tokenizer adds before any text; None before the first text."""
        self._end: list[int] = []
        self._begun = self._count = self._own = 0
        self._system: Turns = []
        if rendering.system_prompt:
            self._system = [{"role": "system", "content": rendering.system_prompt}]
            self._check_system()
        if not self._variables:
            return
        cause = "no chat template is used"
        if self._renderer is not None:
            cause = self._renderer.refusal(self._variables, variables=True)
        if cause:
            raise ConfigError(
                f"chat_template_kwargs = {dict(self._variables)!r:.80}: {cause}",
                hint="check the spelling, or leave --chat-template-kwargs of `rollout` out",
            )

    def _check_system(self) -> None:
        """Raise ConfigError where no chat template writes the system turn."""
        cause, user = "no chat template is used", [{"role": "user", "content": "x"}]
        if self._renderer is not None:
            try:
                without = self._renderer.render(user)
                wrote = self._renderer.render([*self._system, *user]) != without
                cause = "" if wrote else "the chat template leaves system turns out"
            except TemplateError as error:
                cause = f"the chat template refuses a system turn: {error}"
        if cause:
            self.close()
            raise ConfigError(
                f"system_prompt = {self._system[0]['content']!r:.80}: {cause}",
                hint="leave --system-prompt out, or write the text into the prompts",
            )

    def close(self) -> None:
        """End the child of the chat template."""
        if self._renderer is not None:
            self._renderer.close()

    def token_ids(self, line: Line, content: str | Turns) -> list[int]:
        """Return the token ids of a line with this content."""
        arguments = line.arguments(self._renderer, self._variables)
        if self._renderer is None and not isinstance(content, str):
            line.refuse(
                f'field "{line.field}": a conversation needs the chat template, which is turned '
                "off",
                'turn the chat template on, or write the rendered text as "prompt"',
            )
        text = content if isinstance(content, str) else ""
        if self._renderer is not None:
            user: Turns = [{"role": "user", "content": text}]
            turns = user if isinstance(content, str) else content
            if self._system:
                own = any(turn["role"] in ("system", "developer") for turn in turns)
                self._own += own
                turns = turns if own else [*self._system, *turns]
            try:
                text = self._renderer.render(turns, **arguments)
            except TemplateError as error:
                line.refuse(
                    f'field "{line.field}": the chat template refuses it: {error}',
                    "give the turns in the order and with the roles that the template expects",
                )
            bos = self._tokenizer.bos_token
            if bos and text.startswith(bos):
                line.check_begin(content, bos)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            return ids
        if self._begin is None:
            self._begin, self._end = special_ids(self._tokenizer, text, ids)
        begun = ids[: len(self._begin)] == self._begin
        self._count, self._begun = self._count + 1, self._begun + begun
        # As transformers: a template writes its own special tokens, and none is added.
        return ids if begun or self._renderer is not None else self._begin + ids

    def notes(self) -> Iterator[str]:
        """Yield notes on the special tokens of these prompts."""
        if self._own:
            yield (
                f"{self._own} of {self._count} prompts have a system turn of their own, which "
                "stays in place of the system prompt"
            )
        begin = " ".join(self._tokenizer.convert_ids_to_tokens(self._begin or []))
        end = " ".join(self._tokenizer.convert_ids_to_tokens(self._end))
        if begin and self._renderer is not None:
            if self._begun < self._count:
                yield f"the chat template writes no {begin!r} at the beginning, and none is added"
            return
        if begin:
            note = f"the tokenizer begins each prompt with {begin!r}"
            if self._begun:
                note += f"; {self._begun} of {self._count} begin with it already, and get no second"
            yield note
        if end:
            yield f"the tokenizer ends texts with {end!r}, which prompts go without"


def readable(tokenizer: Any, rendering: Rendering) -> tuple[Rendering, list[str]]:
    """Return the rendering of other models' rollouts without variables that this tokenizer's chat
    template does not read, and a note on each.
    """
    if not rendering.chat_template:
        return rendering, []
    renderer, read, notes = Renderer(tokenizer), dict[str, Any](), list[str]()
    for name, value in rendering.chat_template_kwargs.items():
        if cause := renderer.refusal([name], variables=True):
            notes.append(f"{cause}; the rollouts were rendered with it")
        else:
            read[name] = value
    return replace(rendering, chat_template_kwargs=read), notes


def special_ids(tokenizer: Any, text: str, ids: list[int]) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before a text and after it; `ids`: the text alone.

    Raises ModelError for a tokenizer that adds some inside.
    """
    whole: list[int] = tokenizer(text)["input_ids"]
    # From the end: a text may begin with the token that is added.
    for start in range(len(whole) - len(ids), -1, -1):
        if whole[start : start + len(ids)] == ids:
            return whole[:start], whole[start + len(ids) :]
    raise ModelError(
        f"the tokenizer of {tokenizer.name_or_path or 'this model'} changes a text by its special "
        "tokens, and does not only add some around it",
        hint="take a tokenizer that adds special tokens at the ends of a text only",
    )
