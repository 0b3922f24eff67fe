"""`logitcask store show`: text of a sequence before its rows, safe for a terminal."""

import shutil
from typing import Any

from tests.cli.conftest import ROLL, World
from tests.engine.tiny import make_model, make_tokenizer, save_folder


def test_show_prints_the_text_of_the_recorded_student_first(call: Any) -> None:
    found = call("store show @st --sequence 3 --format json").json
    tokens = [row["token"] for row in found["rows"]]
    tokenizer = make_tokenizer()
    assert found["prompt_text"] == "1 + 2 ="
    assert found["response_text"] == tokenizer.decode(tokens)
    assert [row["text"] for row in found["rows"]] == [tokenizer.decode([each]) for each in tokens]
    shown = call("store show @st --sequence 3")
    assert shown.out.startswith("prompt:\n  1 + 2 =\n\nresponse:\n  ")
    assert "rollouts" in shown.out.split("\n\n")[2]
    assert "note" not in shown.err


def test_newlines_are_lines_and_control_characters_escapes(world: World, call: Any) -> None:
    """Sample from eight tokens, of which some are dangerous on a terminal."""
    hostile = make_tokenizer(characters="\n\x1b\u202eabc")
    name, store = world.new("hostile"), world.new("store")
    save_folder(world.at(name), make_model(vocab_size=9, spread=0.001), hostile)
    world.at("letters.jsonl").write_text('{"id": "x", "prompt": "a\\n\\u001b[2J\\nb"}\n')
    command = ROLL.replace("@student", name).replace("@p.jsonl", "@letters.jsonl")
    command = command.replace("--max-new-tokens 6", "--max-new-tokens 60").replace("--n 2", "--n 8")
    assert call(f"{command} {store}").code == 0
    shown = call(f"store show {store}").out
    assert shown.startswith("prompt:\n  a\n  \\x1b<unk><unk><unk>\n  b\n\nresponse:\n")
    texts = [
        call(f"store show {store} --sequence {i} --format json").json["response_text"]
        for i in range(8)
    ]
    dangerous = {"\n", "\x1b", "\u202e"}
    text = max(texts, key=lambda each: len(dangerous & set(each)))
    assert dangerous <= set(text)
    shown = call(f"store show {store} --sequence {texts.index(text)}").out
    response = shown.partition("response:\n")[2].partition("\n\nrollouts")[0]
    escaped = text.replace("\x1b", "\\x1b").replace("\u202e", "\\x202e")
    assert response == "\n".join(f"  {line}" for line in escaped.split("\n"))
    assert "\x1b" not in shown
    assert r"\x0a" not in shown


def test_show_prints_ids_where_no_tokenizer_is_here(world: World, call: Any) -> None:
    moved, store = world.new("moved"), world.new("store")
    shutil.copytree(world.at("@student"), world.at(moved))
    assert call(f"{ROLL.replace('@student', moved)} {store}").code == 0
    world.at(moved).rename(world.at(f"{moved}-elsewhere"))
    shown = call(f"store show {store}")
    assert "note: no text, only ids: there is no folder" in shown.err
    assert shown.out.startswith("rollouts ")
    again = call(f"store show {store} --tokenizer {moved}-elsewhere")
    assert again.out.startswith("prompt:\n  0 + 1 =\n")
    call(f"store show {store} --tokenizer @other-tokenizer").assert_error(
        1, "is not that of these rollouts", "the student's"
    )


def test_no_name_of_a_model_ends_in_a_traceback(call: Any) -> None:
    for name in ("~nobody/x", "./" + "x" * 300):
        command = ROLL.replace("@student", name)
        call(f"{command} @none").assert_error(1, "there is no folder", "hub id")
