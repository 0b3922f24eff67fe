"""Prompt files: their contents, and errors that name file, line, field, value and hint."""

import json
from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.errors import ModelError, PromptError
from logitcask.engine.prompts.lines import MAX_LINE_BYTES
from logitcask.engine.prompts.prompts import chat_template_for, load_tokenizer, read_prompts
from logitcask.engine.prompts.source import OTHER_FORMATS, open_source
from logitcask.engine.prompts.templates import Rendering
from tests.engine.tiny import make_tokenizer

TOKENIZER = make_tokenizer()


def write(folder: Path, *lines: Any) -> Path:
    file = folder / "prompts.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(text) + "\n")
    return file


def read(file: Path, chat_template: bool = False, most: int = 100, **rules: Any) -> list[Any]:
    rendering = Rendering(chat_template=chat_template, **rules)
    return read_prompts(file, TOKENIZER, rendering, max_prompt_tokens=most)


def shown(file: Path, **rules: Any) -> list[str]:
    """Return the rendered texts of a file."""
    return [TOKENIZER.decode(prompt.token_ids) for prompt in read(file, True, **rules)]


def test_a_plain_prompt_is_its_characters_and_unknown_keys_travel(tmp_path: Path) -> None:
    file = write(tmp_path, {"id": "a", "prompt": "2+3=", "answer": "5", "level": 1, "tags": ["x"]})
    (prompt,) = read(file)
    assert TOKENIZER.decode(prompt.token_ids) == "2+3="
    assert len(prompt.token_ids) == 4
    assert (prompt.id, prompt.answer) == ("a", "5")
    assert prompt.extra == {"level": 1, "tags": ["x"]}


def test_with_the_template_a_prompt_is_one_user_turn(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    file = write(tmp_path, {"id": "a", "prompt": "hi"}, {"id": "b", "messages": turns})
    plain, chat = read(file, chat_template=True)
    assert plain.token_ids == chat.token_ids
    assert TOKENIZER.decode(plain.token_ids) == "user: hi\nassistant: "


def test_the_date_of_a_template_is_fixed(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "\n{{ strftime_now('%Y-%m-%d, %B %-d') }} {{ date_string }}"
    (prompt,) = read_prompts(
        write(tmp_path, {"id": "a", "prompt": "x"}),
        tokenizer,
        Rendering(chat_template=True),
        max_prompt_tokens=99,
    )
    assert tokenizer.decode(prompt.token_ids) == "\n2026-01-01, January 1 01 Jan 2026"


def test_byte_order_mark_crlf_and_blank_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"id": "a", "prompt": "x"}\r\n\r\n{"id": "b", "prompt": "y"}\r\n'
    )
    assert [p.id for p in read(file)] == ["a", "b"]


def test_special_tokens_are_read_from_the_text(tmp_path: Path) -> None:
    (prompt,) = read(write(tmp_path, {"id": "a", "prompt": "a<eos>"}))
    assert prompt.token_ids[1] == TOKENIZER.eos_token_id


USER = {"role": "user", "content": "hi"}
BAD = {
    "not JSON": ('{"id": ', "not valid JSON", False),
    "NaN": ('{"id": "a", "prompt": "x", "score": NaN}', "NaN is not JSON", False),
    "too large": ('{"id": "a", "prompt": "x", "score": 1e400}', "1e400 is beyond", False),
    "too long a number": (f'{{"id": "a", "prompt": "x", "n": {"1" * 5000}}}', "5000 digits", False),
    "a key twice": ('{"id": "a", "prompt": "x", "prompt": "y"}', "'prompt' occurs twice", False),
    "a list": ("[1]", "a list, not an object", False),
    "too deep": ("[" * 200_000, "nested too deeply", False),
    "no id": ({"id": None, "prompt": "x"}, 'field "id": None is null', False),
    "number as id": ({"id": 7.5, "prompt": "x"}, 'field "id": 7.5 is a number', False),
    "boolean as id": ({"id": True, "prompt": "x"}, 'field "id": True is a boolean', False),
    "same id twice": ({"id": "ok", "prompt": "x"}, "already the id of line 1", False),
    "no prompt": ({"id": "a"}, "both are missing", False),
    "both": ({"id": "a", "prompt": "x", "messages": [USER]}, "both are present", True),
    "empty prompt": ({"id": "a", "prompt": " \n"}, "field \"prompt\": ' \\n' is empty", False),
    "null prompt": ({"id": "a", "prompt": None}, 'field "prompt": None is null', False),
    "answer of a wrong type": (
        {"id": "a", "prompt": "x", "answer": 5.5},
        'field "answer": 5.5',
        False,
    ),
    "half a surrogate": ('{"id": "a", "prompt": "\\ud800"}', "surrogate", False),
    "too long": ({"id": "a", "prompt": "x" * 101}, "101 tokens, at most 100", False),
    "messages, no template": ({"id": "a", "messages": [USER]}, "needs the chat template", False),
    "no turns": ({"id": "a", "messages": []}, "is not a list of turns", True),
    "turn of text": ({"id": "a", "messages": ["hi"]}, 'field "messages[0]"', True),
    "strange role": (
        {"id": "a", "messages": [USER, {"role": "robot", "content": "x"}]},
        "messages[1].role\": 'robot' is none of",
        True,
    ),
    "picture": (
        {"id": "a", "messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "messages[0].content[0]\": {'type': 'image'} is no part of text",
        True,
    ),
    "no parts": (
        {"id": "a", "messages": [{"role": "user", "content": []}]},
        'messages[0].content": [] is a list',
        True,
    ),
    "parts without text": (
        {"id": "a", "messages": [{"role": "user", "content": [{"type": "text"}]}]},
        'messages[0].content[0].text": None is null',
        True,
    ),
    "ends in the assistant": (
        {"id": "a", "messages": [USER, {"role": "assistant", "content": "x"}]},
        "may not end with 'assistant'",
        True,
    ),
}


@pytest.mark.parametrize(("line", "cause", "chat"), BAD.values(), ids=BAD.keys())
def test_a_bad_line_is_named(tmp_path: Path, line: Any, cause: str, chat: bool) -> None:
    file = write(tmp_path, {"id": "ok", "prompt": "fine"}, line)
    with pytest.raises(PromptError) as caught:
        read(file, chat_template=chat)
    assert caught.value.cause.startswith(f"{file}, line 2: ")
    assert cause in caught.value.cause
    assert len(caught.value.cause) < 400 + len(str(file))
    assert caught.value.hint


def test_a_line_is_bounded_before_it_is_parsed(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"id": "a", "prompt": "' + b"x" * MAX_LINE_BYTES + b'"}\n')
    with pytest.raises(PromptError, match="line 1: the line is longer than 1048576 bytes"):
        read(file)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"id": "a", "prompt": "\xff"}\n')
    with pytest.raises(PromptError, match="line 1: byte 23 is not UTF-8"):
        read(file)


def test_missing_empty_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="there is no prompts file"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(PromptError, match="holds no prompt"):
        read(write(tmp_path, "", " "))
    with pytest.raises(PromptError, match="holds neither Parquet files nor a data set"):
        read(tmp_path)


def test_a_template_is_needed_and_may_refuse(tmp_path: Path) -> None:
    file = write(tmp_path, {"id": "a", "prompt": "x"})
    bare, chat = make_tokenizer(chat_template=False), Rendering(chat_template=True)
    with pytest.raises(ModelError, match="has no chat template"):
        read_prompts(file, bare, chat, max_prompt_tokens=9)
    bare.chat_template = "{{ raise_exception('one turn is too few') }}"
    with pytest.raises(PromptError, match=r"line 1: .*refuses it: .*one turn is too few"):
        read_prompts(file, bare, chat, max_prompt_tokens=9)


def test_a_tokenizer_comes_back_from_its_folder_or_is_named(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert again.chat_template == TOKENIZER.chat_template
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["../other/tokenizer.4.0.0.json", "/x/tokenizer.4.json", 7])
def test_a_tokenizer_is_of_its_own_folder(tmp_path: Path, name: object) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["fast_tokenizer_files"] = [name]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no file of its folder"):
        load_tokenizer(tmp_path)


def test_code_in_a_tokenizer_folder_is_not_run(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_ambiguous_use_of_the_template_is_refused(tmp_path: Path) -> None:
    plain = write(tmp_path, {"id": "a", "prompt": "x"})
    bare = make_tokenizer(chat_template=False)
    assert chat_template_for(open_source(plain), bare, None) is False
    assert chat_template_for(open_source(plain), TOKENIZER, True) is True
    assert chat_template_for(open_source(plain), TOKENIZER, False) is False
    with pytest.raises(PromptError, match="either could be meant"):
        chat_template_for(open_source(plain), TOKENIZER, None)
    chat = write(tmp_path, {"id": "a", "messages": [USER]})
    assert chat_template_for(open_source(chat), TOKENIZER, None) is True
    with pytest.raises(PromptError, match="there is no prompts file"):
        chat_template_for(open_source(tmp_path / "nowhere.jsonl"), TOKENIZER, None)
    turns = write(tmp_path, {"prompt": [USER]})
    assert chat_template_for(open_source(turns), TOKENIZER, None) is True


def test_ids_may_be_integers_or_absent(tmp_path: Path) -> None:
    lines = ({"id": 7, "prompt": "x"}, {"prompt": "y"}, "", {"prompt": "z"})
    assert [prompt.id for prompt in read(write(tmp_path, *lines))] == ["7", "line-2", "line-4"]
    for first, second in (({"id": 7}, {"id": "7"}), ({"id": "line-2"}, {})):
        with pytest.raises(PromptError, match="is already the id of line 1"):
            read(write(tmp_path, {**first, "prompt": "x"}, {**second, "prompt": "y"}))


def test_parts_of_text_and_turns_under_prompt_are_read(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    lines = (
        {"messages": [USER]},
        {"messages": [{"role": "user", "content": parts}]},
        {"prompt": [USER], "completion": [{"role": "assistant", "content": "x"}]},
        {"prompt": [{"role": "user", "content": parts}]},
    )
    assert shown(write(tmp_path, *lines)) == ["user: hi\nassistant: "] * 4
    with pytest.raises(PromptError, match=r'field "prompt\[0\].role": None is none of') as caught:
        shown(write(tmp_path, {"prompt": [{"from": "human", "value": "hi"}]}))
    assert '{"role": "user", "content": "..."}' in caught.value.hint


def test_a_turn_that_calls_tools_or_thinks_may_have_no_text(tmp_path: Path) -> None:
    for content in ({}, {"content": None}, {"content": ""}):
        for key in ("tool_calls", "reasoning_content"):
            turn = {"role": "assistant", key: [{"name": "f"}], **content}
            (prompt,) = read(write(tmp_path, {"messages": [USER, turn, USER]}), True)
            assert prompt.id == "line-1"
    turn = {"role": "assistant", "content": ""}
    with pytest.raises(PromptError, match=r'"messages\[1\].content": \'\' is empty'):
        read(write(tmp_path, {"messages": [USER, turn, USER]}), True)


def test_a_last_assistant_turn_is_left_out_on_request(tmp_path: Path) -> None:
    reply = {"role": "assistant", "content": "x"}
    file = write(tmp_path, {"messages": [USER, reply]}, {"messages": [USER]})
    with pytest.raises(PromptError, match="may not end with 'assistant'") as caught:
        shown(file)
    assert "--drop-last-assistant" in caught.value.hint
    assert shown(file, drop_last_assistant=True) == ["user: hi\nassistant: "] * 2
    for turns, last in (([USER, reply, reply], "'assistant'"), ([reply], "'no turn'")):
        with pytest.raises(PromptError, match=f"may not end with {last}") as caught:
            shown(write(tmp_path, {"messages": turns}), drop_last_assistant=True)
        assert caught.value.hint == "end it in a user or tool turn"


@pytest.mark.parametrize(
    ("keys", "hint"),
    [
        (
            {"question": "2+3=", "answer": "5"},
            '--eval-prompt-column), or write it as "prompt"',
        ),
        (
            {"conversations": [{"from": "human", "value": "x"}]},
            '(--eval-prompt-column), or write it as "messages", a list of',
        ),
        ({"x": 1}, 'write "prompt" for plain text'),
    ],
)
def test_other_names_of_a_prompt_are_advised(tmp_path: Path, keys: Any, hint: str) -> None:
    with pytest.raises(PromptError, match="both are missing") as caught:
        read(write(tmp_path, keys))
    assert hint in caught.value.hint


@pytest.mark.parametrize("magic", OTHER_FORMATS)
def test_another_format_is_named_with_a_command_that_converts_it(
    tmp_path: Path, magic: bytes
) -> None:
    file = tmp_path / "p.x"
    file.write_bytes(magic + b"\x00\xff" * 9 + b"x" * MAX_LINE_BYTES)
    with pytest.raises(PromptError) as caught:
        read(file)
    name = OTHER_FORMATS[magic][0]
    assert (
        caught.value.cause
        == f"{file} is {name}, and prompts are read from JSONL, Parquet and Arrow"
    )
    assert "p.x" in caught.value.hint
    assert "new.jsonl" in caught.value.hint
