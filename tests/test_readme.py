"""The commands and programs of every README work, with tiny models in place of real ones."""

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from datasets import Dataset
from transformers import Qwen3ForCausalLM

from logitcask.cli.main import VERBS, cli, run
from logitcask.cli.reference import reference
from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives import PRESETS
from logitcask.engine.objectives.modifiers import MODIFIERS
from logitcask.engine.packing.batches import planned
from tests.engine import tiny
from tests.engine.backends.server.fake_server import FakeServer

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".ci", "bench", "cli", "engine", "kernels", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
README = (ROOT / "README.md").read_text()
URL = "http://127.0.0.1:8000"

STANDS_FOR = {
    "Qwen/Qwen3-1.7B": "student",
    "Qwen/Qwen3-4B": "teacher",
    "google/gemma-3-1b-it": "other",
}
SMALLER = {
    "rounds = 100": "rounds = 2",
    "prompts_per_round = 64": "prompts_per_round = 2",
    "max_new_tokens = 2048": "max_new_tokens = 32",
}
ELSEWHERE = (
    r"hub:|hf://|s3://|gs://|az://|--from tap|-1a2b3c4d|\./graded|\.\.\."
    r"|https?://(?!127\.0\.0\.1:8000)|--runner (?:pro|ray)"
)
NOT_RUN = rf"demo|bench|(?:.*(?:{ELSEWHERE}))"
"""Commands with separate tests, and those that need a network or another file."""


def block(language: str) -> str:
    """Return the code block of this kind; exactly one README has it."""
    texts = [page.read_text() for page in PAGES]
    found = [each for text in texts for each in re.findall(rf"```{language}\n(.*?)```", text, re.S)]
    assert len(found) == 1, f"{len(found)} blocks {language}"
    return str(found[0])


def write_imports() -> None:
    """Write the rollouts of other programs that engine/exchange/README.md imports."""
    ids = {"prompt_ids": [5, 6], "response_ids": [7, 8], "loss_mask": [0, 1]}
    Path("rollouts.jsonl").write_text(json.dumps(ids))
    batch = {"token_ids": [[5, 6, 7]], "token_loss_mask": [[0, 0, 1]], "input_lengths": [3]}
    Path("logs").mkdir()
    Path("logs/train_data_step1.jsonl").write_text(json.dumps(batch))
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    Dataset.from_list([{"messages": turns}]).to_parquet("chats.parquet")


def with_tiny_models(text: str) -> str:
    """Replace the names of real models by folders."""
    for name, folder in STANDS_FOR.items():
        text = text.replace(name, folder)
    return text


def commands(text: str) -> list[str]:
    """Return the `logitcask ...` lines of the code blocks, continued lines joined."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    joined = "\n".join(blocks).replace("\\\n", " ")
    found = re.findall(r"^(?:\$ )?(?:\.venv/bin/)?(logitcask .+)$", joined, re.M)
    return [line.split("  #")[0].rstrip() for line in found]


def stages() -> list[str]:
    """Return the lines of the front README for one stage each."""
    lines = commands(with_tiny_models(README))
    found = [line for line in lines if line.split()[1] in ("rollout", "score", "train")]
    assert [line.split()[1] for line in found] == ["rollout", "score", "train"]
    return found


def run_line(line: str, *more: str) -> None:
    """Run a line as a shell in the working folder would."""
    words = [word for each in shlex.split(line)[1:] for word in glob.glob(each) or [each]]
    assert run([*words, *more]) == 0, line


def padded_model(seed: int) -> Qwen3ForCausalLM:
    """Return a model with head rows beyond the last id of the tokenizer, as real ones have."""
    return tiny.make_model(seed=seed, context=1024, vocab_size=128, tie=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a user's folder after the three commands of the front README."""
    folder = tmp_path_factory.mktemp("readme")
    tokenizer = tiny.make_tokenizer(chat_template=True)
    for seed, name in enumerate(("student", "teacher", "bigger"), 1):
        tiny.save_folder(folder / name, padded_model(seed), tokenizer)
    reordered = tiny.make_tokenizer(characters=tiny.CHARACTERS[::-1])
    tiny.save_folder(folder / "other", padded_model(4), reordered)
    sums = ({"id": str(i), "prompt": f"What is {i}?", "answer": str(i)} for i in range(4))
    lines = [json.dumps(each) for each in sums]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    held_out = {"id": "e", "prompt": "What is 7?", "answer": "7"}
    (folder / "heldout.jsonl").write_text(json.dumps(held_out) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in stages():
            run_line(line)
    return folder


@pytest.fixture
def in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change into the user's folder."""
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cli/README.md"])
def test_commands_run_in_their_order(
    place: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [
        line
        for line in commands(with_tiny_models((ROOT / name).read_text()))
        if not re.match(rf"logitcask (?:{NOT_RUN})", line)
    ]
    if name == "README.md":
        assert json.loads((place / "run" / "logitcask.json").read_text())["version"] >= 1
        lines = [line for line in lines if line not in stages()]
    if not lines:
        return
    shutil.copytree(place, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    prepare(capsys)
    # An untrained head gives mass to its padding, and such servers are rejected.
    model, tokenizer = tiny.make_model(context=1024), tiny.make_tokenizer(chat_template=True)
    with FakeServer(model, tokenizer=tokenizer, max_model_len=1024) as server:
        for line in lines:
            command, _, file = line.replace(URL, server.url).partition(" > ")
            capsys.readouterr()
            run_line(command, *shorter(command))
            if file:
                Path(file).write_text(capsys.readouterr().out)


def prepare(capsys: pytest.CaptureFixture[str]) -> None:
    """Write the files that commands of the READMEs take."""
    write_imports()
    text = with_tiny_models(block("toml distill"))
    for large, small in SMALLER.items():
        assert large in text
        text = text.replace(large, small)
    Path("distill.toml").write_text(text)
    capsys.readouterr()
    run_line("logitcask train --model student --store ./store --lr 1e-3 --dry-run")
    Path("train.toml").write_text(capsys.readouterr().out)


def shorter(line: str) -> list[str]:
    """Return flags that keep a command of a README small."""
    more = []
    words = line.split()
    if words[1] == "rollout" or words[1:3] == ["store", "estimate"]:
        more += ["--max-new-tokens", "8"]
    if words[1] == "init":
        sizes = ("loop.rounds=1", "loop.prompts_per_round=2", "rollout.max_new_tokens=8")
        more += ["--force", *(word for size in sizes for word in ("--set", size))]
        more += ["--set", "run.out=rounds", "--set", "store.url=new"]
    if words[1:3] in (["recipe", "cold-start"], ["recipe", "best-of-n"]):
        # Untrained models write nothing that is accepted; tests/engine/recipes runs these.
        more += ["--max-new-tokens", "8", "--dry-run"]
    if words[1] == "score" and "other" in words:
        more += ["--control-tokens", "cut"]  # an untrained student writes all ids
    if "--eval-prompts" in words:
        more += ["--eval-max-new-tokens", "4"]
    if words[1] in ("rollout", "score") and {"--worker"} & {*words}:
        more += ["--idle-exit", "0.01"]
    return more


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name: str) -> None:
    """Check each line: an existing verb, its arguments and flags, with values of their types."""
    lines = commands((ROOT / name).read_text())
    assert lines or name not in ("README.md", "cli/README.md")
    for line in lines:
        words = shlex.split(re.split(r" [>|] ", line)[0])[1:]
        command: click.Command = cli
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            assert command is not cli or words[0] in VERBS, f"{line}: no verb {words[0]}"
            _, found, words = command.resolve_command(click.Context(command), words)
            assert found is not None, line
            command = found
        if isinstance(command, click.Group):
            continue
        try:
            command.make_context("logitcask", words)
        except click.exceptions.Exit:
            assert "--help" in words
        except click.ClickException as error:
            # A file of an earlier command, or a pattern that the shell expands.
            if "does not exist" not in error.format_message():
                pytest.fail(f"{name}: {line}: {error.format_message()}")


@pytest.mark.parametrize("name", NAMES)
def test_links_have_targets(name: str) -> None:
    """Check that relative links are files of the repository, and anchors their headings."""
    page = ROOT / name
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{name}: {target}"


def anchors(page: Path) -> Iterator[str]:
    """Yield the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_front_page_is_short() -> None:
    assert len(README.splitlines()) <= 220


def test_reference_is_up_to_date() -> None:
    """Compare with the output of `python -m logitcask.cli.reference > cli/README.md`."""
    assert (ROOT / "cli" / "README.md").read_text() == reference()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)(?:`|$)", text, re.M))
    assert {"demo", "test"} <= named <= targets, named - targets


@pytest.mark.parametrize("objective", ["overlap", "forward_kl"])
def test_user_loop(in_place: Path, objective: str) -> None:
    program = with_tiny_models(block("python loop"))
    assert sum(bool(line.strip()) for line in program.splitlines()) <= 20
    assert '"overlap"' in program
    program = program.replace('"overlap"', f'"{objective}"')
    names: dict[str, Any] = {}
    exec(compile(program, "README", "exec"), names)
    before = padded_model(1).get_output_embeddings().weight
    after = names["student"].get_output_embeddings().weight
    assert float(names["loss"].detach()) > 0
    n_vocab = tiny.N_VOCAB
    assert (before != after)[:n_vocab].float().mean() > 0.9
    assert torch.equal(before[n_vocab:], after[n_vocab:]), "the padding takes part in the softmax"


def test_user_loop_rejects_an_objective_that_the_store_cannot_serve(in_place: Path) -> None:
    program = with_tiny_models(block("python loop"))
    program = program.replace('parse_objective("overlap")', 'parse_objective("opd(k=64)")')
    with pytest.raises(ObjectiveError, match="k = 64 is more than student_"):
        exec(compile(program, "README", "exec"), {})


RANK_OF_TWO = """
import sys
RANK, MET = int(sys.argv[1]), sys.argv[2]
{opening}
torch.distributed.init_process_group("gloo", init_method=f"file://{{MET}}", rank=RANK, world_size=2)
for pack in {loop}
torch.save(list(student.parameters()), f"{{MET}}-{{RANK}}.pt")
"""


def test_user_loop_in_two_processes_makes_the_updates_of_one(
    in_place: Path, tmp_path: Path
) -> None:
    # Plain steps, so that rounding is not amplified.
    program = with_tiny_models(block("python loop")).replace("AdamW", "SGD").replace("1e-6", "0.1")
    opening, loop = program.split("for pack in ")
    alone: dict[str, Any] = {}
    exec(compile(opening, "README", "exec"), alone)
    (length,) = re.findall(r"(\w+)=4096", loop)
    # With an odd number of packs the last one of the second process is empty.
    for size in range(600, 4000, 20):
        packs = planned(alone["store"], **alone["source"], **{length: size})
        if len(packs) % 2:
            break
    assert len(packs) % 2 == 1 < len(packs)
    several = loop.replace("    loss.backward()\n", block("python several"))
    several = several.replace("=4096", f"={size}, rank=RANK, world=2")
    (tmp_path / "rank.py").write_text(RANK_OF_TWO.format(opening=opening, loop=several))
    command = [sys.executable, str(tmp_path / "rank.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, rank, str(tmp_path / "met")], env=environment) for rank in "01"
    ]
    try:
        student, optimizer = alone["student"], alone["optimizer"]
        summed = loop.partition("loss.backward()")[0] + "(loss * len(pack.targets)).backward()\n"
        for first in range(0, len(packs), 2):
            pair = [packs[i] for i in range(first, min(first + 2, len(packs)))]
            names = {**alone, "batches": lambda *_, of=pair, **__: of}
            exec(compile(f"for pack in {summed}", "README", "exec"), names)
            for parameter in student.parameters():
                parameter.grad /= sum(len(pack.targets) for pack in pair)
            optimizer.step()
            optimizer.zero_grad()
        assert [rank.wait(300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    found = [torch.load(tmp_path / f"met-{rank}.pt") for rank in "01"]
    before = padded_model(1).parameters()
    for old, expected, *ours in zip(before, student.parameters(), *found, strict=True):
        assert torch.equal(*ours)
        torch.testing.assert_close(ours[0], expected, rtol=0, atol=1e-6)
        assert (expected - old).abs().max() > 1e-4, "the tolerance is small against the update"


def test_tables_of_objectives_are_up_to_date() -> None:
    table = (ROOT / "engine" / "objectives" / "README.md").read_text()
    modifiers = table[table.index("| modifier |") :]
    modifiers = modifiers[: modifiers.index("\n\n")]
    assert re.findall(r"^\| `(\w+)` \|", modifiers, re.MULTILINE) == list(MODIFIERS)
    for preset in PRESETS.values():
        line = re.search(rf"^\| `{preset.name}` \|.*$", table, re.MULTILINE)
        assert line, f"no row of {preset.name}"
        assert preset.formula.replace("|", "\\|") in line.group(0)
        assert preset.source in line.group(0)


def test_queries_of_an_export_give_what_python_counts(
    in_place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import duckdb

    run_line("logitcask store export ./store positions.parquet --force")
    names: dict[str, Any] = {}
    exec(compile(with_tiny_models(block("python dataset")), "README", "exec"), names)
    rows = list(names["dataset"])
    queries = [each for each in block("sql").split(";") if each.strip()]
    worst, depths, prompts, tokens = (duckdb.sql(each).fetchall() for each in queries)
    rows.sort(key=lambda row: (-row["reverse_kl"], row["sequence"], row["position"]))
    order = ("sequence", "position", "token", "forward_kl", "reverse_kl")
    assert worst == [tuple(row[name] for name in order) for row in rows[:20]]
    assert names["worst"] == rows[0]
    assert sum(n for _, n, *_ in depths) == len(rows)
    mean = sum(row["reverse_kl"] for row in rows) / len(rows)
    assert sum(n * kl for _, n, kl, *_ in depths) / len(rows) == pytest.approx(mean)
    for prompt, listed, _ in prompts:
        of = [row for row in rows if row["prompt"] == prompt]
        found = sum(row["teacher_ids"][0] in row["student_topk_ids"] for row in of)
        assert listed == pytest.approx(found / len(of))
    assert 0 < len(tokens) <= 10
