"""Token ids of prompts: the tokenizer's own beginning of texts, and arguments of chat templates."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from logitcask.engine.errors import ConfigError, PromptError
from logitcask.engine.prompts.encode import readable
from logitcask.engine.prompts.prompts import read_prompts
from logitcask.engine.prompts.templates import Rendering
from tests.engine.tiny import EOS, PAD, make_tokenizer

BOS, PLAIN, CHAT = PAD, Rendering(chat_template=False), Rendering(chat_template=True)
TURN = {"role": "user", "content": "hi"}


def begins(form: str = "<pad> $A") -> Any:
    """Return a tokenizer that puts special tokens around texts; <pad> is its BOS."""
    tokenizer = make_tokenizer()
    ids = [("<pad>", PAD), ("<eos>", EOS)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=ids)
    tokenizer.bos_token = "<pad>"
    return tokenizer


def ids_of(
    folder: Path, tokenizer: Any, rendering: Rendering, *lines: dict[str, Any]
) -> tuple[list[list[int]], list[str]]:
    """Return the ids of each line, and the notes without the file's name."""
    file, notes = folder / "p.jsonl", list[str]()
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = read_prompts(file, tokenizer, rendering, max_prompt_tokens=99, on_event=notes.append)
    ids = [list(prompt.token_ids) for prompt in read]
    return ids, [note.removeprefix(f"{file}: ") for note in notes]


def bare(text: str) -> list[int]:
    return list(make_tokenizer()(text)["input_ids"])


@pytest.mark.parametrize(
    ("form", "begin", "note"),
    [
        ("$A", [], []),
        ("<pad> $A", [BOS], ["the tokenizer begins each prompt with '<pad>'"]),
        ("<pad> <eos> $A", [BOS, EOS], ["the tokenizer begins each prompt with '<pad> <eos>'"]),
        ("$A <eos>", [], ["the tokenizer ends texts with '<eos>', which prompts go without"]),
        (
            "<pad> $A <eos>",
            [BOS],
            [
                "the tokenizer begins each prompt with '<pad>'",
                "the tokenizer ends texts with '<eos>', which prompts go without",
            ],
        ),
    ],
)
def test_a_text_begins_as_its_tokenizer_begins_texts(
    tmp_path: Path, form: str, begin: list[int], note: list[str]
) -> None:
    lines = ({"prompt": "a"}, {"prompt": "bc"})
    ids, notes = ids_of(tmp_path, begins(form), PLAIN, *lines)
    assert ids == [begin + bare("a"), begin + bare("bc")]
    assert notes == note


def test_a_text_that_begins_with_the_token_gets_no_second_one(tmp_path: Path) -> None:
    lines = ({"prompt": "<pad>a"}, {"prompt": "a"}, {"prompt": "<pad>"})
    ids, (note,) = ids_of(tmp_path, begins(), PLAIN, *lines)
    assert ids == [[BOS, *bare("a")], [BOS, *bare("a")], [BOS]]
    assert note.endswith("'<pad>'; 2 of 3 begin with it already, and get no second")


def test_a_template_writes_the_beginning_itself(tmp_path: Path) -> None:
    tokenizer = begins()
    rendered = "user: hi\nassistant: "
    ids, (note,) = ids_of(tmp_path, tokenizer, CHAT, {"prompt": "hi"})
    assert ids == [bare(rendered)]
    assert note == "the chat template writes no '<pad>' at the beginning, and none is added"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert ids_of(tmp_path, tokenizer, CHAT, {"prompt": "hi"}) == ([[BOS, *bare(rendered)]], [])
    assert (
        ids_of(tmp_path, tokenizer, CHAT, {"messages": [TURN]})[0]
        == ids_of(tmp_path, tokenizer, CHAT, {"prompt": "hi"})[0]
    )
    for text in ("<pad>hi", " <pad>user: hi\nassistant: "):
        for line in ({"prompt": text}, {"messages": [{**TURN, "content": text}]}):
            with pytest.raises(PromptError, match="begins with '<pad>', and so does the chat") as e:
                ids_of(tmp_path, tokenizer, CHAT, line)
            assert "--no-chat-template" in e.value.hint


ARGUMENTS = (
    "{% if tools %}[{{ tools[0].name }}]{% endif %}{% if documents %}({{ documents[0].title }})"
    "{% endif %}{{ messages[-1].content }}"
    "{% if enable_thinking is false %}<no>{% endif %}{{ mood }}"
)


def shown(folder: Path, line: dict[str, Any], **variables: Any) -> str:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ARGUMENTS
    rendering = Rendering(chat_template=True, chat_template_kwargs=variables)
    (ids,), _ = ids_of(folder, tokenizer, rendering, {"prompt": "x", **line})
    return str(tokenizer.decode(ids))


def test_tools_documents_and_variables_reach_the_template(tmp_path: Path) -> None:
    assert shown(tmp_path, {}) == "x"
    assert shown(tmp_path, {"tools": [{"name": "f"}], "documents": [{"title": "t"}]}) == "[f](t)x"
    assert shown(tmp_path, {"tools": '[{"name": "f"}]', "documents": ""}) == "[f]x"
    assert shown(tmp_path, {"tools": None, "documents": [], "chat_template_kwargs": None}) == "x"
    off = {"enable_thinking": False}
    assert shown(tmp_path, {"chat_template_kwargs": off}) == "x<no>"
    assert shown(tmp_path, {}, **off, mood="!") == "x<no>!"
    own = {"chat_template_kwargs": {"enable_thinking": True, "mood": "?"}}
    assert shown(tmp_path, own, **off, mood="!") == "x?"


@pytest.mark.parametrize(
    ("keys", "cause"),
    [
        ({"tools": {"name": "f"}}, "field \"tools\": {'name': 'f'} is not a list of objects"),
        ({"tools": '[{"name": "f"'}, "is not valid JSON"),
        ({"tools": '["f"]'}, "field \"tools\": ['f'] is not a list of objects"),
        ({"documents": ["t"]}, "field \"documents\": ['t'] is not a list of objects"),
        ({"chat_template_kwargs": [1]}, 'field "chat_template_kwargs": [1] is a list, not an'),
        ({"chat_template_kwargs": {"thinking": 1}}, "the chat template reads no 'thinking'"),
        ({"chat_template_kwargs": {"tools": []}}, "'tools' is no variable of a chat template"),
        ({"chat_template_kwargs": {"tokenize": 1}}, "'tokenize' is no variable"),
        ({"chat_template_kwargs": {"messages": 1}}, "'messages' is no variable"),
    ],
)
def test_arguments_that_a_template_cannot_take_are_refused(
    tmp_path: Path, keys: dict[str, Any], cause: str
) -> None:
    with pytest.raises(PromptError) as caught:
        shown(tmp_path, keys)
    assert "line 1: " in caught.value.cause
    assert cause in caught.value.cause


def test_arguments_without_effect_are_refused(tmp_path: Path) -> None:
    lines = ({"tools": [{}]}, {"documents": [{}]}, {"chat_template_kwargs": {"x": 1}})
    for line in lines:
        with pytest.raises(PromptError, match="it is for the chat template, which is turned off"):
            ids_of(tmp_path, make_tokenizer(), PLAIN, {"prompt": "x", **line})
        with pytest.raises(PromptError, match="the chat template reads no "):
            ids_of(tmp_path, make_tokenizer(), CHAT, {"prompt": "x", **line})
    for chat, cause in (
        (False, "no chat template is used"),
        (True, "the chat template reads no"),
    ):
        rendering = Rendering(chat_template=chat, chat_template_kwargs={"x": 1})
        with pytest.raises(ConfigError, match=cause):
            ids_of(tmp_path, make_tokenizer(), rendering, {"prompt": "x"})


def test_a_rendering_is_recorded_where_it_differs_from_the_default() -> None:
    assert PLAIN.record() == {"chat_template": False}
    full = Rendering(chat_template=True, chat_template_kwargs={"a": 1}, drop_last_assistant=True)
    assert Rendering(**full.record()) == full


def test_variables_of_the_rollouts_that_another_template_lacks_are_noted() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ARGUMENTS
    both = Rendering(chat_template=True, chat_template_kwargs={"mood": "!", "other": 1})
    read, notes = readable(tokenizer, both)
    assert read.chat_template_kwargs == {"mood": "!"}
    assert notes == [
        "the chat template reads no 'other', so it would have no effect; "
        "the rollouts were rendered with it"
    ]
    assert readable(make_tokenizer(chat_template=False), PLAIN) == (PLAIN, [])
