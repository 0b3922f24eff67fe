"""One line of a prompts file: its JSON, checked field by field."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NoReturn

from logitcask.engine.config.parse.strict_json import parse_json
from logitcask.engine.config.prompts import Columns
from logitcask.engine.errors import PromptError
from logitcask.engine.prompts.templates import Renderer
from logitcask.engine.types import Prompt

MAX_LINE_BYTES = 1 << 20
FORM = 'write one JSON object per line: {"id": "...", "prompt": "..."}'
ROLES = ("system", "developer", "user", "assistant", "tool")
TEMPLATE_KEYS = ("tools", "documents", "chat_template_kwargs")
"""Keys for the chat template, which graders see too."""
INSTEAD_OF_TEXT = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""Keys of a turn that may have no text."""
OTHER_NAMES = {
    **dict.fromkeys(("question", "problem", "instruction", "query", "input", "text"), "prompt"),
    **dict.fromkeys(("conversations", "conversation", "chat", "turns"), "messages"),
}
"""Keys that datasets have in place of ours."""

Turns = list[dict[str, Any]]
Texts = Callable[[], Iterator[tuple[int, str]]]
"""Yields (number, JSON) of the lines of a file, or of the rows of a data set."""


def refuse(file: Path, number: int, cause: str, hint: str, *, unit: str = "line") -> NoReturn:
    raise PromptError(f"{file}, {unit} {number}: {cause}", hint=hint)


class Line:
    """One line of a prompts file, or one row of a data set; every error names file and line."""

    def __init__(
        self,
        file: Path,
        number: int,
        text: str,
        *,
        unit: str = "line",
        columns: Columns | None = None,
    ) -> None:
        self.file, self.number, self.unit = file, number, unit
        self.columns = columns or Columns()
        self.keys = self._parse(text)
        self.field = self.columns.prompt_column or (
            "messages" if "messages" in self.keys else "prompt"
        )
        """Key that holds the prompt."""

    @property
    def is_chat(self) -> bool:
        """Return True for a conversation. Datasets for TRL have its turns as "prompt"."""
        return self.field == "messages" or isinstance(self._value(self.field), list)

    def refuse(self, cause: str, hint: str) -> NoReturn:
        refuse(self.file, self.number, cause, hint, unit=self.unit)

    def _value(self, name: str) -> Any:
        """Return the value of a key, or of a path of keys divided by points; None without one."""
        if name in self.keys:
            return self.keys[name]
        value: Any = self.keys
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def _named(self, column: str, own: str) -> Any:
        """Return the value of a column that the configuration names, or of our key."""
        value = self._value(column or own)
        if column and value is None:
            self.refuse(
                f'field "{column}" is missing, and {own}_column names it',
                f"correct the name; there are {', '.join(self.keys)}",
            )
        return value

    def _parse(self, text: str) -> dict[str, Any]:
        try:
            keys = parse_json(text)
        except JSONDecodeError as error:
            self.refuse(f"not valid JSON: {error}", FORM)
        except ValueError as error:
            self.refuse(str(error), "change this value, quote it, or remove its key")
        if not isinstance(keys, dict):
            self.refuse(f"the line is {kind(keys)}, not an object", FORM)
        return keys

    @property
    def id(self) -> str:
        """Return the id, or line-N or row-N without one."""
        default = f"{self.unit}-{self.number}"
        name = self._named(self.columns.id_column, "id")
        if name is None and "id" not in self.keys:
            return default
        hint = f"write a string or an integer, or leave the key out: the id is then {default}"
        return str(name) if type(name) is int else self.string("id", name, hint)

    @property
    def answer(self) -> str | None:
        """Return the answer: text, or an integer as its decimal text."""
        value = self._named(self.columns.answer_column, "answer")
        if type(value) is int:
            return str(value)
        if value is not None and not isinstance(value, str):
            field = self.columns.answer_column or "answer"
            cause = f'field "{field}": {value!r:.80} is {kind(value)}, not a string'
            self.refuse(cause, "quote it")
        return value

    def string(self, field: str, value: Any, hint: str = "quote it") -> str:
        where = f'field "{field}"'
        if not isinstance(value, str):
            self.refuse(f"{where}: {value!r:.80} is {kind(value)}, not a string", hint)
        if not value.strip():
            self.refuse(f"{where}: {value!r:.80} is empty", "fill it in, or remove the line")
        return value

    def content(self, *, drop_last_assistant: bool) -> str | Turns:
        """Return the checked text of a prompt, or the checked turns of a conversation.

        The content of a turn is text: parts of text are joined.
        """
        if self.columns.prompt_column:
            value = self._named(self.columns.prompt_column, "prompt")
        elif ("prompt" in self.keys) == ("messages" in self.keys):
            self._refuse_both()
        else:
            value = self.keys[self.field]
        if not self.is_chat:
            return self.string(self.field, value)
        if not isinstance(value, list) or not value:
            self.refuse(
                f'field "{self.field}": {value!r:.80} is not a list of turns',
                'write [{"role": "user", "content": "..."}]',
            )
        turns = [self.turn(f"{self.field}[{place}]", turn) for place, turn in enumerate(value)]
        if drop_last_assistant and turns[-1]["role"] == "assistant":
            turns.pop()
        last = turns[-1]["role"] if turns else "no turn"
        if last not in ("user", "tool"):
            self.refuse(
                f'field "{self.field}[{max(0, len(turns) - 1)}].role": a conversation may not end '
                f"with {last!r}: the response follows it",
                "give --drop-last-assistant to leave such a turn out (in a file of settings: "
                "[prompts] drop_last_assistant = true)"
                if last == "assistant" and not drop_last_assistant
                else "end it in a user or tool turn",
            )
        return turns

    def _refuse_both(self) -> NoReturn:
        there = "prompt" in self.keys
        hint = 'write "prompt" for plain text or "messages" for a conversation'
        if not there and (other := next((name for name in OTHER_NAMES if name in self.keys), None)):
            hint = f"give --prompt-column {other} (--eval-prompt-column), or write it as "
            hint += f'"{OTHER_NAMES[other]}"'
            if OTHER_NAMES[other] == "messages":
                hint += ', a list of {"role": "user", "content": "..."}'
        self.refuse(
            f'fields "prompt" and "messages": {"both are present" if there else "both are missing"}'
            ", and exactly one is needed",
            hint,
        )

    def turn(self, place: str, turn: Any) -> dict[str, Any]:
        """Check one turn, and join the parts of its text."""
        if not isinstance(turn, dict):
            self.refuse(
                f'field "{place}": {turn!r:.80} is {kind(turn)}, not an object',
                'write {"role": "user", "content": "..."}',
            )
        if turn.get("role") not in ROLES:
            self.refuse(
                f'field "{place}.role": {turn.get("role")!r:.80} is none of {", ".join(ROLES)}',
                "use one of these roles"
                + (', as {"role": "user", "content": "..."}' if "from" in turn else ""),
            )
        content = turn.get("content")
        # An assistant may only call tools, or only think.
        if content in (None, "") and any(turn.get(key) for key in INSTEAD_OF_TEXT):
            return turn
        if isinstance(content, list) and content:
            parts = enumerate(content)
            content = "".join(self._part(f"{place}.content[{at}]", part) for at, part in parts)
        return {**turn, "content": self.string(f"{place}.content", content)}

    def _part(self, place: str, part: Any) -> str:
        if not isinstance(part, dict) or part.get("type") != "text":
            self.refuse(
                f'field "{place}": {part!r:.80} is no part of text, and models get text only',
                'write the content as a string, or as parts {"type": "text", "text": "..."}',
            )
        text = part.get("text")
        # White space between two parts is text.
        return text if isinstance(text, str) else self.string(f"{place}.text", text)

    def arguments(self, renderer: Renderer | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return tools, documents and variables for the chat template; a null is left out.

        renderer: None where no chat template is used; defaults: variables of all prompts.
        """
        found = {key: self.keys[key] for key in TEMPLATE_KEYS if self.keys.get(key) is not None}
        # Columns of a data set have one type, so many hold the JSON of these as text.
        found = {key: self._parsed(key, value) for key, value in found.items() if value != ""}
        if renderer is None:
            for key in found:
                self.refuse(
                    f'field "{key}": it is for the chat template, which is turned off',
                    "turn the chat template on, or rename the key",
                )
            return {}
        variables = found.pop("chat_template_kwargs", {})
        if not isinstance(variables, dict):
            self.refuse(
                f'field "chat_template_kwargs": {variables!r:.80} is {kind(variables)}, not an '
                "object",
                'write {"enable_thinking": false}',
            )
        for key, value in found.items():
            if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
                self.refuse(
                    f'field "{key}": {value!r:.80} is not a list of objects',
                    "write a list of objects or its JSON, or leave the key out",
                )
        cause = renderer.refusal([key for key in found if found[key]], variables=False)
        cause = cause or renderer.refusal(variables, variables=True)
        if cause:
            self.refuse(cause, "check the spelling, leave it out, or take a model that uses it")
        return {**found, **defaults, **variables}

    def _parsed(self, field: str, value: Any) -> Any:
        """Parse a string as JSON, and return any other value."""
        if not isinstance(value, str):
            return value
        try:
            return parse_json(value)
        except ValueError as error:
            self.refuse(
                f'field "{field}": {value!r:.80} is not valid JSON: {error}',
                "write the value itself or its JSON, or leave the key out",
            )

    def check_begin(self, content: str | Turns, bos: str) -> None:
        """Refuse texts that begin with the token with which the chat template begins itself."""
        texts = [content] if isinstance(content, str) else [turn.get("content") for turn in content]
        if any(text is not None and text.lstrip().startswith(bos) for text in texts):
            self.refuse(
                f'field "{self.field}": a text begins with {bos!r}, and so does the chat template',
                "remove it from the text; if the text is rendered already, give --no-chat-template",
            )

    def prompt(self, token_ids: Sequence[int], most: int) -> Prompt:
        """Return the prompt of these token ids, at most `most`."""
        if not token_ids:
            self.refuse(
                f'field "{self.field}": {self._value(self.field)!r:.80} gives no token',
                "fill it in, or remove the line",
            )
        if len(token_ids) > most:
            self.refuse(
                f'field "{self.field}": {len(token_ids)} tokens, at most {most} may be',
                "shorten the prompt, or lower max_new_tokens: both share the model's context",
            )
        own = self.columns
        # A named column takes the place of our keys, which are then keys like any other.
        used = {own.id_column or "id", own.answer_column or "answer"}
        used |= {own.prompt_column} if own.prompt_column else {"prompt", "messages"}
        extra = {key: value for key, value in self.keys.items() if key not in used}
        return Prompt(id=self.id, token_ids=tuple(token_ids), answer=self.answer, extra=extra)


def kind(value: Any) -> str:
    """Return the JSON name of a value's type, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
