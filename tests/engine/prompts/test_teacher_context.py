"""Teacher prompts from a template: the rendered text, and fields that a template may not use."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.engine.errors import IdentityError, PromptError
from logitcask.engine.prompts.prompts import read_prompts
from logitcask.engine.prompts.source import open_source
from logitcask.engine.prompts.teacher_context import read_template, templated
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.types import Prompt
from tests.engine.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "2+3="},
    {"role": "tool", "content": "busy"},
]


def written(folder: Path, template: str, *lines: Any) -> tuple[Path, Path]:
    (folder / "t.txt").write_text(template)
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "t.txt", folder / "p.jsonl"


def shown(
    template: Path, file: Path, stored: list[Prompt] | None = None, *, chat: bool = False
) -> dict[str, str]:
    rendering = Rendering(chat_template=chat)
    if stored is None:
        stored = read_prompts(file, TOKENIZER, rendering, max_prompt_tokens=200)
    found = templated(
        open_source(file),
        read_template(template),
        stored,
        TOKENIZER,
        rendering,
        max_prompt_tokens=200,
    )
    return {name: TOKENIZER.decode(prompt.token_ids) for name, prompt in found.items()}


def test_fields_and_braces_are_filled_and_the_last_newline_is_removed(tmp_path: Path) -> None:
    line = {"id": "a", "prompt": "2+3=", "answer": "5"}
    files = written(tmp_path, "{{{answer}}} is right.\n{prompt}\n\n", line)
    assert shown(*files) == {"a": "{5} is right.\n2+3=\n"}


def test_the_text_of_a_prompt_is_no_template(tmp_path: Path) -> None:
    line = {"id": "a", "prompt": "{answer} {0} {{", "answer": "{prompt}"}
    assert shown(*written(tmp_path, "{prompt}|{answer}", line)) == {"a": "{answer} {0} {{|{prompt}"}


def test_the_last_user_turn_is_replaced(tmp_path: Path) -> None:
    lines = (
        {"id": "a", "messages": TURNS, "answer": "5"},
        {"id": "b", "prompt": "x", "answer": "y"},
    )
    found = shown(*written(tmp_path, "{prompt} ({answer})", *lines), chat=True)
    assert found == {
        "a": "system: be brief\nuser: hi\nassistant: yes?\nuser: 2+3= (5)\ntool: busy\nassistant: ",
        "b": "user: x (y)\nassistant: ",
    }


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(text=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20))
def test_a_template_of_text_alone_is_that_text(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    escaped = text.replace("{", "{{").replace("}", "}}")
    files = written(tmp_path_factory.mktemp("t"), escaped + "{prompt}", {"id": "a", "prompt": "x"})
    assert shown(*files) == {"a": text + "x"}


@pytest.mark.parametrize(
    "field",
    [
        *("{}", "{0}", "{question}", "{prompt.text}", "{prompt[0]}", "{prompt!r}", "{answer:>9}"),
        "{ prompt}",
    ],
)
def test_any_other_field_is_refused(tmp_path: Path, field: str) -> None:
    files = written(tmp_path, f"x {field}", {"id": "a", "prompt": "x"})
    with pytest.raises(PromptError, match="none of the fields {prompt} and {answer}") as caught:
        shown(*files)
    assert field in caught.value.cause


@pytest.mark.parametrize("text", ["{prompt", "prompt}", "{prompt}}"])
def test_half_a_field_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(PromptError, match="t.txt: "):
        shown(*written(tmp_path, text, {"id": "a", "prompt": "x"}))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="No such file"):
        read_template(tmp_path / "absent")
    (tmp_path / "latin").write_bytes(b"\xe9 {prompt}")
    with pytest.raises(PromptError, match="byte 0 is not UTF-8"):
        read_template(tmp_path / "latin")


def test_a_prompt_without_a_field_of_the_template(tmp_path: Path) -> None:
    full = {"id": "a", "prompt": "x", "answer": "y"}
    files = written(tmp_path, "{prompt}{answer}", full, {"id": "b", "prompt": "x"})
    with pytest.raises(PromptError, match='p.jsonl, line 2: field "answer" is missing'):
        shown(*files)
    turns = [{"role": "tool", "content": "x"}]
    files = written(tmp_path, "{prompt}", full, {"id": "b", "messages": turns})
    with pytest.raises(PromptError, match='line 2: field "messages": no turn is the user\'s'):
        shown(*files, chat=True)


def test_other_prompts_than_those_of_the_rollouts_are_refused(tmp_path: Path) -> None:
    files = written(tmp_path, "{prompt}!", {"id": "a", "prompt": "x"})
    same = Prompt(id="a", token_ids=tuple(TOKENIZER("x")["input_ids"]))
    assert shown(*files, [same]) == {"a": "x!"}
    with pytest.raises(IdentityError, match="prompt 'a' differs from"):
        shown(*files, [Prompt(id="a", token_ids=(5,))])
    with pytest.raises(PromptError, match="p.jsonl has no prompt 'b'"):
        shown(*files, [same, Prompt(id="b", token_ids=(5,))])
