"""Rollouts and texts of other programs: read, refused, adopted, and trained on with their mask."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.engine.commands.adopt import run_import
from logitcask.engine.commands.score import run_score
from logitcask.engine.config.sections import ImportConfig, ScoreConfig
from logitcask.engine.errors import IntegrityError, ObjectiveError, PromptError
from logitcask.engine.exchange import adopt
from logitcask.engine.exchange.files import Files, files_in
from logitcask.engine.exchange.imported import Imported
from logitcask.engine.objectives import parse_objective
from logitcask.engine.packing.batches import batches
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.inspect import show_sequence
from logitcask.engine.training.cache_info import check_objective
from logitcask.engine.training.pack_loss import pack_loss
from tests.engine.tiny import EOS, N_VOCAB, make_model, make_tokenizer, save_folder

NEUTRAL = {"prompt_ids": [5, 6], "response_ids": [7, 8, 9], "loss_mask": [1, 0, 1]}
SAMPLED = (-0.5, math.nan, -1.5)
"""Log-probs of the response of every example: one id of it does not count."""
PRIME = {
    "schema_version": 1,
    "step": 3,
    "export_sequence_idx": 0,
    "token_ids": [5, 6, 7, 8, 9],
    "loss_mask": [False, False, True, False, True],
    "inference_logprobs": [0.0, 0.0, -0.5, None, -1.5],
    "rewards": [None] * 5,
}
NEMO = {
    # A batch of one, padded to the longest of its step.
    "content": ["text"],
    "rewards": [0.5],
    "input_lengths": [5],
    "token_ids": [[5, 6, 7, 8, 9, 0, 0]],
    "token_loss_mask": [[0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]],
    "sample_loss_mask": [1.0],
    "generation_logprobs": [[0.0, 0.0, -0.5, 0.0, -1.5, 0.0, 0.0]],
    "prev_logprobs": [[0.0] * 7],
    "idx": 0,
}
VLLM = {
    "custom_id": "p1",
    "response": {
        "status_code": 200,
        "body": {
            "choices": [
                {
                    "prompt_token_ids": [5, 6],
                    "token_ids": [7, 8, 9],
                    "logprobs": {"content": [{"logprob": lp} for lp in (-0.5, -1.0, -1.5)]},
                }
            ]
        },
    },
}
TURNS = {
    "turns": [
        {"ids": [5, 6], "sampled": False},
        {"ids": [7], "sampled": True, "logprobs": [-0.5]},
        {"ids": [8], "sampled": False},
        {"ids": [9], "sampled": True, "logprobs": [-1.5]},
    ]
}


def write(file: Path, *lines: Mapping[str, Any]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def read(file: Path, format: str, **choice: bool) -> list[Imported]:
    return list(Files([file], format, make_tokenizer(), [EOS], **choice)())


@pytest.mark.parametrize(
    ("format", "line", "mask", "reward"),
    [
        ("neutral", NEUTRAL | {"logprobs": [-0.5, None, -1.5], "reward": 0.5}, (1, 0, 1), 0.5),
        ("neutral", TURNS, (1, 0, 1), None),
        ("prime-rl", PRIME, (1, 0, 1), None),
        ("nemo-rl", NEMO, (1, 0, 1), 0.5),
        ("vllm", VLLM, (1, 1, 1), None),
    ],
)
def test_each_format_gives_the_same_ids(
    tmp_path: Path, format: str, line: dict[str, Any], mask: tuple[int, ...], reward: float | None
) -> None:
    (found,) = read(write(tmp_path / "a.jsonl", line), format)
    assert (found.prompt, found.response, found.mask) == ((5, 6), (7, 8, 9), mask)
    assert found.logprobs is not None
    assert found.reward == reward
    for lp, expected, on in zip(found.logprobs, SAMPLED, mask, strict=True):
        assert lp == pytest.approx(expected, nan_ok=True) or (on and math.isnan(expected))


def test_a_conversation_counts_what_its_assistant_says(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "it is 7"},
    ]
    file = write(tmp_path / "a.jsonl", {"messages": turns}, {"messages": turns[:1]})
    tokenizer = make_tokenizer()

    def counted(found: Imported) -> str:
        return tokenizer.decode([i for i, on in zip(found.response, found.mask, strict=True) if on])

    files = Files([file], "text", tokenizer, [EOS])
    (whole,) = files()
    assert files.left_out == 1, "no turn of an assistant"
    assert tokenizer.decode(whole.prompt) == "user: add\nassistant: "
    assert tokenizer.decode(whole.response) == "call\ntool: 7\nassistant: it is 7\n"
    # The template writes no stop token: its newline ends a turn.
    assert counted(whole) == "call\nit is 7\n"
    (last,) = read(write(file, {"messages": turns}), "text", last=True)
    assert counted(last) == tokenizer.decode(last.response) == "it is 7\n"
    sharegpt = [
        {"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"]),
         "value": turn["content"]}
        for turn in turns
    ]  # fmt: skip
    (same,) = read(write(file, {"conversations": sharegpt}), "text")
    assert (same.prompt, same.response, same.mask) == (whole.prompt, whole.response, whole.mask)
    (split,) = read(write(file, {"prompt": turns[:3], "completion": turns[3:]}), "text")
    assert split.prompt + split.response == whole.prompt + whole.response
    assert counted(split) == "it is 7\n", "turns of the prompt do not count"
    (text,) = read(write(file, {"prompt": "1+1=", "completion": "2"}), "text")
    assert text.response == (*tokenizer("2")["input_ids"], EOS)


def test_the_files_of_a_folder_come_by_their_numbers(tmp_path: Path) -> None:
    for step in (10, 2):
        (tmp_path / f"step_{step}").mkdir()
        write(tmp_path / f"step_{step}" / "rank_0.jsonl", PRIME)
    assert [file.parent.name for file in files_in(tmp_path)] == ["step_2", "step_10"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        save_folder(folder / name, make_model(seed=seed))
    return folder


def config(models: Path, file: Path, store: Path, **imported: Any) -> ImportConfig:
    return ImportConfig.model_validate(
        {
            "student": {"model": str(models / "student")},
            "store": {"url": str(store)},
            "imported": {"files": [file], "format": "neutral", "student_topk": 4, **imported},
            "run": {"device": "cpu"},
        }
    )


def conversation(seed: int) -> dict[str, Any]:
    """Return two turns of tools inside a response of random ids."""
    rng = np.random.default_rng(seed)
    sizes = (5, 4, 3, 6, 2, 4)  # prompt, call, tool, call, tool, answer
    parts = [rng.integers(3, N_VOCAB, size).tolist() for size in sizes]
    return {
        "id": f"p{seed}",
        "turns": [
            {"ids": part, "sampled": place % 2 == 1} for place, part in enumerate(parts)
        ],
    }  # fmt: skip


def scored(models: Path, store: Path) -> Store:
    run_score(
        ScoreConfig.model_validate(
            {
                "teacher": {"model": str(models / "teacher"), "name": "t"},
                "store": {"url": str(store)},
                "score": {"teacher_topk_min": 4, "teacher_topk_max": 8},
                "run": {"device": "cpu"},
            }
        )
    )
    return open_store(store)


def test_masked_turns_have_no_loss_no_gradient_and_no_divisor(models: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *map(conversation, range(3)))
    run_import(config(models, file, tmp_path / "store"))
    store = scored(models, tmp_path / "store")
    (segment,) = store.head().rollouts("main")
    data = store.read_rollouts(segment)
    shown = show_sequence(store, rollouts=None, teacher=None, sequence=1, top=1)["rows"]
    assert [row["loss_mask"] for row in shown] == [1] * 4 + [0] * 3 + [1] * 6 + [0] * 2 + [1] * 4
    assert data.loss_mask.sum() == 3 * (4 + 6 + 4) < data.positions == 3 * 19
    objective = parse_objective("forward_kl", k=4).objective
    names = {"rollouts": "main", "teacher": "t"}
    (pack,) = batches(store, snapshot=store.head(), pack_length=100, **names)
    student = make_model(seed=0)
    # Without a cache transformers keeps the sequences of a pack apart, by their positions.
    inner = student.model(pack.input_ids, position_ids=pack.position_ids, use_cache=False)
    states = inner.last_hidden_state[0, pack.predict_at]
    result = pack_loss(objective, states, student.lm_head.weight, pack.targets, n_vocab=N_VOCAB)
    result.loss.backward()

    # By hand, in float64, from the formula: the teacher's four best ids and a bucket.
    double, teacher = make_model(seed=0).double(), make_model(seed=1).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for number, prompt in enumerate(data.prompts):
        part = slice(data.seq_off[number], data.seq_off[number + 1])
        ids = torch.tensor([[*prompt.token_ids, *data.tokens[part].tolist()]])
        rows = slice(len(prompt.token_ids) - 1, -1)
        on = torch.from_numpy(data.loss_mask[part] != 0)
        log_p = double(ids).logits[0, rows].log_softmax(-1)[on]
        with torch.no_grad():
            log_q, best = teacher(ids).logits[0, rows].log_softmax(-1)[on].topk(4)
        log_p = log_p.gather(1, best)
        rest_p, rest_q = 1 - log_p.exp().sum(1), 1 - log_q.exp().sum(1)
        kl = (log_q.exp() * (log_q - log_p)).sum(1) + rest_q * (rest_q / rest_p).log()
        total, count = total + kl.sum(), count + int(on.sum())
    (total / count).backward()
    assert result.loss.item() == pytest.approx((total / count).item(), rel=1e-3)
    for ours, theirs in zip(student.parameters(), double.parameters(), strict=True):
        assert torch.allclose(ours.grad.double(), theirs.grad, rtol=2e-3, atol=2e-5)


def test_an_import_resumes_and_finds_a_changed_file(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [conversation(seed) for seed in range(4)]
    file = write(tmp_path / "a.jsonl", *lines)
    settings = config(models, file, tmp_path / "store", unit_positions=40)
    first = run_import(settings)
    assert (first.units_total, first.units_new, first.counted) == (2, 2, 4 * 14)
    again = run_import(settings)
    assert (again.units_done_before, again.units_new) == (2, 0)
    names = {segment.name for segment in open_store(tmp_path / "store").head().segments}
    assert names == {"main"}

    whole = adopt.in_units
    calls = iter((lines, lines[1:]))

    def changing(read: Any, positions: int) -> Any:
        write(file, *next(calls))
        return whole(read, positions)

    monkeypatch.setattr(adopt, "in_units", changing)
    with pytest.raises(IntegrityError, match="changed while"):
        run_import(config(models, file, tmp_path / "other", unit_positions=40))
    monkeypatch.setattr(adopt, "in_units", whole)


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        ([NEUTRAL | {"response_ids": [7, 8, N_VOCAB]}], "ids below"),
        ([NEUTRAL | {"prompt_ids": [3] * 300}], "context"),
        ([NEUTRAL | {"id": "a"}, NEUTRAL | {"id": "a", "prompt_ids": [5]}], "two different"),
        ([NEUTRAL | {"reward": 2.0}], "reward 2"),
        ([NEUTRAL | {"loss_mask": [0, 0, 0]}], "no sequence"),
    ],
)
def test_what_the_student_cannot_take_is_refused_before_a_store_is_made(
    models: Path, tmp_path: Path, lines: list[dict[str, Any]], cause: str
) -> None:
    file = write(tmp_path / "a.jsonl", *lines)
    with pytest.raises(PromptError, match=cause):
        run_import(config(models, file, tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_unknown_draws_are_refused_and_known_ones_are_corrected(
    models: Path, tmp_path: Path
) -> None:
    known = NEUTRAL | {"logprobs": [-1.0, None, -2.0]}
    for name, line in (("unknown", NEUTRAL), ("known", known)):
        run_import(config(models, write(tmp_path / name, line), tmp_path / f"{name}-store"))
        store = scored(models, tmp_path / f"{name}-store")
        (segment,) = store.head().rollouts("main")
        stored = store.read_rollouts(segment).b_lp
        expected = [-1.0, math.nan, -2.0] if name == "known" else [math.nan] * 3
        assert stored.tolist() == pytest.approx(expected, nan_ok=True)

        def report(text: str, store: Store = store) -> Any:
            objective = parse_objective(text, k=4 if text.startswith("opd") else None)
            names = {"rollouts": "main", "teacher": "t"}
            return check_objective(objective, store, snapshot=store.head(), **names)

        lines = report("opd").lines()
        assert any("did not sample them, so ages are unknown" in each for each in lines)
        assert "student at the import" in report("opd").support
        if name == "unknown":
            for text in ("sampled_token", "sampled_token + importance", "opd + return_to_go"):
                with pytest.raises(ObjectiveError, match="without their log-probs"):
                    report(text)
        else:
            assert "age unknown, of another program" in report("sampled_token").estimator
