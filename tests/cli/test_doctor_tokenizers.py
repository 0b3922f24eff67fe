"""`logitcask doctor tokenizers`: how two tokenizers divide the same texts."""

from typing import Any

from tests.cli.conftest import World
from tests.engine.alignment.small_tokenizers import tokenizer_of


def test_two_tokenizers_of_folders(world: World, call: Any) -> None:
    for kind in ("characters", "byte-level"):
        tokenizer_of(kind).save_pretrained(world.at(f"@{kind}"))
    texts = world.at("@texts.txt")
    texts.write_bytes("12 + 30 = 42\n\nthe ☃\r\nthe student\n".encode())
    command = "doctor tokenizers @characters @byte-level --texts @texts.txt"
    found = call(f"{command} --format json").json
    assert (found["texts"], found["bytes"], found["student_tokens"]) == (2, 23, 23)
    assert found["spans"] == found["teacher_tokens"] < 23
    assert found["refused"][0]["text"] == "3"
    result = call(command)
    assert "2 of 23 bytes, 1 refused" in result.out
    assert "next: logitcask score --model" in result.out
    assert "refused: line 3: the student's tokenizer: no ids of this tokenizer spell '☃'" in (
        result.out
    )

    texts.write_bytes(b"x" * (2 << 20))
    assert "line 1: more than 1,048,576 bytes" in call(command).err
    texts.unlink()
    assert call(command).code == 2
