"""`logitcask doctor teacher`: a sound server passes, and each fault is reported with a hint."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import CommandResult, World
from tests.engine.backends.server.fake_server import FakeServer
from tests.engine.tiny import CHARACTERS, N_VOCAB, make_model, make_tokenizer, save_folder

Call = Callable[[str], CommandResult]


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer(make_model(seed=1), tokenizer=make_tokenizer()) as server:
        yield server


def states(result: CommandResult) -> dict[str, str]:
    return {each["check"]: each["state"] for each in result.json["checks"]}


def test_a_sound_server_passes_every_check(call: Call, world: World, fake: FakeServer) -> None:
    result = call(f"doctor teacher {fake.url} --against @teacher --format json")
    assert result.code == 0, result.err
    checks = ["server", "model", "context", "chosen ids", "tokenizer", "padding"]
    checks += ["log-probs", "repeats"]
    assert states(result) == dict.fromkeys([*checks, "parity"], "ok")
    text = call(f"doctor teacher {fake.url} --tokenizer @teacher")
    assert text.code == 0
    assert "vLLM 0.32.0" in text.out
    assert text.err == ""


def test_each_fault_is_reported(call: Call, world: World, fake: FakeServer) -> None:
    def faults(flags: str = "") -> tuple[CommandResult, list[str]]:
        result = call(f"doctor teacher {fake.url} --against @teacher --format json {flags}")
        return result, [name for name, state in states(result).items() if state == "fault"]

    fake.model = make_model(seed=2)
    assert faults()[1] == ["parity"]
    fake.max_logprobs = 20
    result, found = faults()
    assert found == ["log-probs", "parity"]
    assert result.code == 1
    assert "2 of 9 checks found a fault, the first: log-probs" in result.err
    assert "--max-logprobs 64" in result.err
    assert faults("--teacher-topk-max 20")[1] == ["parity"]
    fake.fingerprint = "rev=b"
    assert faults("--revision a")[1] == ["identity"]
    fake.at_ids, fake.tokenizer = False, None
    noted = states(
        call(f"doctor teacher {fake.url} --tokenizer @teacher --format json --teacher-topk-max 9")
    )
    assert noted["chosen ids"] == noted["tokenizer"] == "note"


def test_padding_within_the_topk_of_a_peaked_row_is_no_fault(
    call: Call, tmp_path: Path, fake: FakeServer
) -> None:
    """Use peaked rows: padding is improbable, and so are the ids ranked below it."""
    model = make_model(seed=1, vocab_size=N_VOCAB + 30, tie=False)
    model.lm_head.weight.data[N_VOCAB:] = 0
    model.lm_head.weight.data[:N_VOCAB] *= 60
    folder = save_folder(tmp_path / "padded", model)
    fake.model = model
    command = f"doctor teacher {fake.url} --tokenizer {folder} --format json"
    found = states(call(command))
    assert [name for name, state in found.items() if state != "ok"] == []
    # Untrained padding ids have probability mass, which is a fault.
    fake.model = make_model(seed=1, vocab_size=N_VOCAB + 30)
    assert states(call(command))["padding"] == "fault"


def test_teacher_and_student_are_compared(call: Call, world: World, fake: FakeServer) -> None:
    def found(student: str) -> dict[str, dict[str, str]]:
        command = (
            f"doctor teacher {fake.url} --tokenizer @teacher --student {student} --format json"
        )
        return {each["check"]: each for each in call(command).json["checks"]}

    own = found("@student")
    assert {own[each]["state"] for each in ("ids", "stop ids", "prompts")} == {"ok"}
    assert found("@other-template")["prompts"]["state"] == "note"
    assert found("@no-template")["prompts"]["state"] == "note"
    spans = found("@other-tokenizer")["ids"]
    assert (spans["state"], "are of spans" in spans["message"]) == ("note", True)
    assert found("@nowhere")["ids"]["state"] == "fault"
    renamed = make_tokenizer(characters=CHARACTERS[:-1] + "é")
    save_folder(world.at("@renamed"), make_model(eos=[1, 7]), renamed)
    other = found("@renamed")
    assert f"{N_VOCAB - 1} ('é' to the student, '~' to the teacher)" in other["ids"]["message"]
    assert f"--student-tokenizer {world.at('@renamed')}" in other["ids"]["hint"]
    assert other["stop ids"]["message"] == "the student stops at [1, 7], the teacher at [1]"
    assert "--foreign-eos keep" in other["stop ids"]["hint"]


def test_an_unreachable_server_is_one_fault(call: Call) -> None:
    result = call("doctor teacher http://127.0.0.1:9 --server-wait 0.2 --format json")
    assert states(result) == {"server": "fault"}
    assert "does not answer" in result.json["checks"][0]["message"]
