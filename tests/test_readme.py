"""The README's commands and programs do what they say, with tiny models in place of real ones."""

import glob
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from logitcask.cli.main import run
from logitcask.cli.options import FLAGS
from logitcask.engine.config.training import Eval, Loop
from logitcask.engine.errors import ObjectiveError
from logitcask.engine.metrics.metrics import METRICS
from logitcask.engine.objectives import PRESETS
from logitcask.engine.objectives.modifiers import MODIFIERS
from logitcask.engine.packing.batches import planned
from tests.engine import tiny
from tests.engine.backends.server.fake_server import FakeServer

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
STANDS_FOR = {"Qwen/Qwen3-1.7B": "student", "Qwen/Qwen3-4B": "teacher"}
SMALLER = {
    "rounds = 100": "rounds = 2",
    "prompts_per_round = 64": "prompts_per_round = 2",
    "max_new_tokens = 2048": "max_new_tokens = 32",
}


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found, f"README has no block {language}"
    return found.group(1)


def with_tiny_models(text: str) -> str:
    for name, folder in STANDS_FOR.items():
        text = text.replace(name, folder)
    return text


def commands(verbs: str) -> list[str]:
    """The README's `logitcask VERB ...` lines of these verbs, in its order."""
    return re.findall(rf"^logitcask (?:{verbs}) .+$", with_tiny_models(README), re.MULTILINE)


def typed(line: str, *more: str) -> None:
    """The line as a shell in the working folder would run it."""
    words = [word for each in shlex.split(line)[1:] for word in glob.glob(each) or [each]]
    assert run([*words, *more]) == 0, line


def padded_model(seed: int) -> Qwen3ForCausalLM:
    """As of real ones, its head has rows beyond the last id of the tokenizer."""
    return tiny.make_model(seed=seed, context=1024, vocab_size=128, tie=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, after the README's three commands."""
    folder = tmp_path_factory.mktemp("readme")
    tokenizer = tiny.make_tokenizer(chat_template=True)
    for seed, name in enumerate(("student", "teacher"), 1):
        tiny.save_folder(folder / name, padded_model(seed), tokenizer)
    lines = [json.dumps({"id": str(i), "prompt": f"What is {i}?"}) for i in range(4)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stages = commands("rollout|score|train")[:3]
        assert [line.split()[1] for line in stages] == ["rollout", "score", "train"]
        for line in stages:
            typed(line)
    return folder


def test_the_three_commands_make_a_student(place: Path) -> None:
    card = json.loads((place / "run" / "logitcask.json").read_text())
    assert card["version"] >= 1
    assert (place / "run" / "metrics.jsonl").read_text().count("\n") == card["version"]


def test_store_commands(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before, *lines = commands(r"store(?! retry)|train(?=.* --pin)")
    typed(before, "--max-new-tokens", "8")
    assert "missed" in capsys.readouterr().out
    assert len(lines) == 12
    for line in lines:
        typed(line)
    assert "bytes_per_position" in capsys.readouterr().out
    assert (place / "run-2" / "logitcask.json").exists()


def test_what_a_teacher_can_be_asked_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    rolling, *scoring = commands(r"rollout(?=.*\./mc)|score(?=.*\./mc)")
    assert len(scoring) == 4
    typed(rolling, "--max-new-tokens", "8")
    for line in scoring:
        typed(line)


def test_a_served_teacher(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    checking, rolling, scoring = commands(r"doctor|(?:rollout|score)(?=.* \./far)")
    typed(rolling, "--max-new-tokens", "8")
    # A head that was not trained gives padding a mass, which is refused of a server.
    model, tokenizer = tiny.make_model(context=1024), tiny.make_tokenizer(chat_template=True)
    with FakeServer(model, tokenizer=tokenizer, max_model_len=1024) as server:
        for line in (checking, scoring):
            typed(line.replace("http://127.0.0.1:8000", server.url))


def test_watching_workers(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    rolling, scoring, retry = commands(r"(?:rollout|score)(?=.* --watch)|store retry-failed")
    typed(rolling, "--max-new-tokens", "8", "--idle-exit", "0.01")
    typed(scoring, "--idle-exit", "0.01")
    typed(retry)
    capsys.readouterr()
    typed("logitcask store info ./watched --format json")
    told = json.loads(capsys.readouterr().out)
    assert (told["unscored_segments"], told["failed_units"]) == (0, 0)


def test_examined_students(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    row = {"id": "e", "prompt": "What is 7?", "answer": "7"}
    Path("heldout.jsonl").write_text(json.dumps(row) + "\n")
    (line,) = commands("train(?=.* --eval-prompts)")
    typed(line, "--eval-max-new-tokens", "4")
    noted = json.loads(Path("run-eval/run.json").read_text())["evaluations"]
    updates = json.loads(Path("run-eval/logitcask.json").read_text())["version"]
    assert [each["progress/step"] for each in noted] == [0, updates]
    assert all(each["eval/n"] == 4 for each in noted)
    rolling, scoring, line = commands(r"(?:rollout|score)(?=.*\./graded)|train(?=.*\./graded)")
    typed(rolling, "--max-new-tokens", "8")
    capsys.readouterr()
    typed("logitcask store info ./graded --format json")
    assert 0 <= json.loads(capsys.readouterr().out)["mean_reward"]["main"] <= 1
    typed(scoring)
    typed(line)
    noted = json.loads(Path("run-held/run.json").read_text())["evaluations"]
    assert all(each["eval/rows"] > 0 and each["eval/loss"] > 0 for each in noted)


def test_ablation(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    (dry,) = commands("train(?=.* --dry-run)")
    line, redirected = dry.split(" > ")
    capsys.readouterr()
    typed(line)
    Path(redirected).write_text(capsys.readouterr().out)
    (line,) = commands("ablate")
    typed(line)
    assert len(list(Path("ablation").glob("objective=*,k=*/seed-*/logitcask.json"))) == 8
    assert Path("ablation/ablate.md").read_text().count("±") > 8
    assert "teacher seconds spent: 0" in capsys.readouterr().out


def test_probe_commands(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    (line,) = commands("probe")
    typed(line, "--format", "json")
    rows = {row.pop("metric"): row for row in json.loads(capsys.readouterr().out)}
    assert {"loss/overlap", "loss/forward_kl", *METRICS} <= set(rows)
    assert len(rows["rows"]) == 5
    assert rows["rows"].pop("all") == sum(rows["rows"].values())


def test_distill_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    text = with_tiny_models(block("toml distill"))
    for large, small in SMALLER.items():
        assert large in text
        text = text.replace(large, small)
    Path("distill.toml").write_text(text)
    lines = commands("distill")
    assert len(lines) == 2
    for line in lines:
        typed(line)
    assert json.loads(Path("rounds/logitcask.json").read_text())["version"] == 2


@pytest.mark.parametrize("objective", ["overlap", "forward_kl"])
def test_loop_of_ones_own(place: Path, monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    monkeypatch.chdir(place)
    program = with_tiny_models(block("python loop"))
    assert sum(bool(line.strip()) for line in program.splitlines()) <= 20
    assert '"overlap"' in program
    program = program.replace('"overlap"', f'"{objective}"')
    names: dict[str, object] = {}
    exec(compile(program, "README", "exec"), names)
    before = padded_model(1).get_output_embeddings().weight
    after = names["student"].get_output_embeddings().weight  # type: ignore[attr-defined]
    assert float(names["loss"].detach()) > 0  # type: ignore[attr-defined]
    known = tiny.N_VOCAB
    assert (before != after)[:known].float().mean() > 0.9
    assert torch.equal(before[known:], after[known:]), "the padding takes part in the softmax"


def test_keys_that_are_no_flag_of_their_name_are_listed() -> None:
    for (section, key), flag in FLAGS.items():
        told = f"`[{section}] {key}` is `--{flag}`" in README
        assert told or flag == f"eval-{key.replace('_', '-')}", (section, key)
    named = {key for section, key in FLAGS if section == "eval"}
    assert {*Eval.model_fields} - named == {"grader"}, "README names the only one without --eval-"
    assert all(f"`{key}`" in README for key in Loop.model_fields)


def test_a_loop_is_refused_what_the_store_cannot_serve(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    program = with_tiny_models(block("python loop"))
    program = program.replace('parse_objective("overlap")', 'parse_objective("opd", k=64)')
    with pytest.raises(ObjectiveError, match="k = 64 is more than student_k = 16"):
        exec(compile(program, "README", "exec"), {})


RANK_OF_TWO = """
import sys
RANK, MET = int(sys.argv[1]), sys.argv[2]
{opening}
torch.distributed.init_process_group("gloo", init_method=f"file://{{MET}}", rank=RANK, world_size=2)
for row in {loop}
torch.save(list(student.parameters()), f"{{MET}}-{{RANK}}.pt")
"""


def test_a_loop_in_two_processes_makes_the_updates_of_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    # Plain steps, so that rounding is not blown up.
    program = with_tiny_models(block("python loop")).replace("AdamW", "SGD").replace("1e-6", "0.1")
    opening, loop = program.split("for row in ")
    alone: dict[str, Any] = {}
    exec(compile(opening, "README", "exec"), alone)
    # Of an odd number of rows the last one of the second process is empty.
    for size in range(600, 4000, 20):
        rows = planned(alone["store"], **alone["which"], tokens_per_batch=size)
        if len(rows) % 2:
            break
    assert len(rows) % 2 == 1 < len(rows)
    several = loop.replace("    loss.backward()\n", block("python several"))
    several = several.replace("batch=4096", f"batch={size}, rank=RANK, world=2")
    (tmp_path / "rank.py").write_text(RANK_OF_TWO.format(opening=opening, loop=several))
    command = [sys.executable, str(tmp_path / "rank.py")]
    ranks = [subprocess.Popen([*command, rank, str(tmp_path / "met")]) for rank in "01"]

    student, optimizer = alone["student"], alone["optimizer"]
    pair_sum = loop.partition("loss.backward()")[0] + "(loss * len(row.targets)).backward()\n"
    for first in range(0, len(rows), 2):
        pair = [rows[i] for i in range(first, min(first + 2, len(rows)))]
        names = {**alone, "batches": lambda *_, of=pair, **__: of}
        exec(compile(f"for row in {pair_sum}", "README", "exec"), names)
        for parameter in student.parameters():
            parameter.grad /= sum(len(row.targets) for row in pair)
        optimizer.step()
        optimizer.zero_grad()
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"met-{rank}.pt") for rank in "01"]
    before = padded_model(1).parameters()
    for old, want, *ours in zip(before, student.parameters(), *found, strict=True):
        assert torch.equal(*ours)
        torch.testing.assert_close(ours[0], want, rtol=0, atol=1e-6)
        assert (want - old).abs().max() > 1e-4, "the tolerance is small beside what was learned"


def test_objectives_with_modifiers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for line in commands("objectives"):
        typed(line)
    (line,) = commands(r"train(?=.* --objective \"opd\+)")
    typed(line)
    told = json.loads(Path("run-half/run.json").read_text())["objective"]["modifiers"]
    assert told == [{"name": "keep_entropy", "share": 0.5}]


def test_modifiers_table_is_the_programs_own() -> None:
    table = README[README.index("| modifier |") :]
    table = table[: table.index("\n\n")]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(MODIFIERS)


def test_objectives_table_is_the_programs_own() -> None:
    table = README[README.index("## Objectives") :]
    for preset in PRESETS.values():
        line = re.search(rf"^\| `{preset.name}` \|.*$", table, re.MULTILINE)
        assert line, f"README does not show {preset.name}"
        assert preset.formula.replace("|", "\\|") in line.group(0)
        assert preset.source in line.group(0)
