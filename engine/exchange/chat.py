"""Conversations and texts -> ids with a loss mask: tokenized once, by the student's tokenizer.

What the chat template writes for an assistant turn counts in the loss, from the end of its
generation prompt to the stop token; all else is mahead. No model has sampled these ids, so they
are labelled as text.
"""

from collections.abc import Sequence
from typing import Any

from logitcask.engine.errors import ConfigError
from logitcask.engine.exchange.imported import Imported, own_fields, sequence
from logitcask.engine.prompts.encode import special_ids
from logitcask.engine.prompts.lines import Line, Turns
from logitcask.engine.prompts.templates import Renderer, TemplateError

SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
"""Speaker of a ShareGPT turn -> role."""
USED = frozenset({"messages", "conversations", "prompt", "completion", "response"})
SPLIT = "give --turns last, which trains on the last assistant turn alone"
AS_TEXT = 'write it as the model sees it: {"prompt": "...", "completion": "..."}'


class TextReader:
    """Reads lines of text: messages, ShareGPT conversations, or prompt and completion.

    Prompt and completion are texts, or lists of turns as TRL has them: then the turns of the
    completion count alone.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], *, last: bool) -> None:
        """Begin with a tokenizer; stop_ids: the student's; last: train on the last turn alone.

        Raises ConfigError for a tokenizer that does not say where its tokens are in the text.
        """
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} does not tell which part of a text a token is",
                hint="take a model with a tokenizer.json, or import ids",
            )
        self._tokenizer, self._stops, self._last = tokenizer, frozenset(stop_ids), last
        self._renderer = Renderer(tokenizer) if tokenizer.chat_template else None

    def close(self) -> None:
        """End the child of the chat template."""
        if self._renderer is not None:
            self._renderer.close()

    def read(self, line: Line) -> Imported | None:
        """Return the sequence of a line; None where no turn of it is an assistant's."""
        read = _turns(line)
        if read is None:
            return self._of_texts(line)
        turns, first = read
        if self._renderer is None:
            line.refuse(
                "a conversation, and the tokenizer has no chat template",
                'write texts: {"prompt": "...", "completion": "..."}',
            )
        counted = [i for i in range(first, len(turns)) if turns[i]["role"] == "assistant"]
        if not counted:
            return None
        # Turns after the last assistant's have no row, and would change what a template writes.
        turns = turns[: counted[-1] + 1]
        whole = self._render(line, turns, done=True)
        spans = [
            self._span(line, turns, place, whole)
            for place in (counted[-1:] if self._last else counted)
        ]
        return self._sequence(line, *self._tokenize(whole), spans, begin=[])

    def _of_texts(self, line: Line) -> Imported | None:
        name = next((each for each in ("completion", "response") if each in line.keys), None)
        if name is None or "prompt" not in line.keys:
            line.refuse(
                'there is neither "messages" nor "conversations" nor "prompt" and "completion"',
                'write {"messages": [{"role": "user", "content": "..."}, ...]}',
            )
        prompt = line.string("prompt", line.keys["prompt"])
        text = line.string(name, line.keys[name])
        ids, places = self._tokenize(prompt + text)
        begin, _ = special_ids(self._tokenizer, prompt + text, ids)
        if any(low < len(prompt) < high for low, high in places):
            ahead, after = self._tokenize(prompt), self._tokenize(text)
            whole = ids
            ids = ahead[0] + after[0]
            places = ahead[1] + [(low + len(prompt), high + len(prompt)) for low, high in after[1]]
            # So a model that samples sees this prompt. The text must stay the same.
            if self._tokenizer.decode(ids) != self._tokenizer.decode(whole):
                line.refuse(
                    "one token has the end of the prompt and the beginning of its completion, "
                    "and this tokenizer writes another text for the two apart",
                    "end the prompt where a token ends, for example before a space",
                )
        span = (len(prompt), len(prompt) + len(text))
        return self._sequence(line, ids, places, [span], begin=begin, stop=True)

    def _span(self, line: Line, turns: Turns, place: int, whole: str) -> tuple[int, int]:
        """Return (first, end) character of what the template writes for an assistant's turn."""
        if place == 0:
            line.refuse("an assistant turn begins it", "put the user's turn before it")
        before = self._render(line, turns[:place], done=False)
        after = self._render(line, turns[: place + 1], done=True)
        if not whole.startswith(before) or not whole.startswith(after):
            line.refuse(
                f"turn {place}: the chat template writes it otherwise than in the whole "
                "conversation, so a model that samples it sees another text",
                AS_TEXT if self._last else SPLIT,
            )
        return len(before), len(after)

    def _render(self, line: Line, turns: Turns, *, done: bool) -> str:
        """Render turns; done: without the beginning of another response."""
        assert self._renderer is not None, "a tokenizer with a template"
        try:
            return self._renderer.render(
                turns,
                add_generation_prompt=not done,
                **line.arguments(self._renderer, {}),
            )
        except TemplateError as error:
            line.refuse(
                f"the chat template refuses it: {error}",
                "give the turns in the order and with the roles that the template expects",
            )

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text, and the (first, end) character of each."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(found["input_ids"]), list(found["offset_mapping"])

    def _sequence(
        self,
        line: Line,
        ids: list[int],
        places: list[tuple[int, int]],
        spans: Sequence[tuple[int, int]],
        *,
        begin: list[int],
        stop: bool = False,
    ) -> Imported | None:
        """Return the ids with a mask of the characters in `spans`. stop: a stop token follows."""
        if begin and ids[: len(begin)] == begin:
            begin = []
        mask = [0] * len(ids)
        for first, end in spans:
            for at, (low, high) in enumerate(places):
                if low < first < high:
                    line.refuse(
                        f"one token, {self._tokenizer.convert_ids_to_tokens(ids[at])!r}, has the "
                        "end of a prompt and the beginning of its response",
                        AS_TEXT,
                    )
                mask[at] = mask[at] or int(first <= low < end)
                # A template may add a newline behind the stop token, which no model samples.
                if mask[at] and low >= first and ids[at] in self._stops:
                    break
        if stop and ids[-1] not in self._stops:
            ids.append(self._tokenizer.eos_token_id)
            mask.append(1)
        ids, mask = begin + ids, [0] * len(begin) + mask
        return sequence(line, ids=ids, mask=mask, **own_fields(line, USED))


def _turns(line: Line) -> tuple[Turns, int] | None:
    """Return the checked turns of a conversation and the first that counts; None for texts."""
    keys = line.keys
    if isinstance(keys.get("conversations"), list):
        parts: dict[str, Any] = {
            "conversations": [_renamed(turn) for turn in keys["conversations"]]
        }
    elif "messages" in keys:
        parts = {"messages": keys["messages"]}
    elif isinstance(keys.get("prompt"), list):
        parts = {"prompt": keys["prompt"], "completion": keys.get("completion")}
    else:
        return None
    turns: Turns = []
    first = 0
    for field, value in parts.items():
        if not isinstance(value, list) or not value:
            line.refuse(
                f'field "{field}": {value!r:.80} is not a list of turns',
                'write [{"role": "user", "content": "..."}]',
            )
        first = len(turns)
        turns += [line.turn(f"{field}[{place}]", turn) for place, turn in enumerate(value)]
    return turns, first


def _renamed(turn: Any) -> Any:
    """Return a turn of ShareGPT with our keys; any other as it is, which is refused later."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    return {"role": SPEAKERS.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}
