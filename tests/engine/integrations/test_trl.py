"""TRL's AsyncDistillationTrainer, unchanged, on the sequences of a store."""

import queue
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcask.engine import integrations
from logitcask.engine.errors import IncompleteError, ObjectiveError
from logitcask.engine.integrations.trl import NoWeights, StoreRolloutWorker
from logitcask.engine.objectives import parse_objective
from logitcask.engine.packing.batches import batches
from logitcask.engine.store import open_store
from logitcask.engine.training.pack_loss import pack_loss
from tests.engine.tiny import N_VOCAB

# Of TRL's own use of transformers and of torch.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
SEQUENCES, K = 8, 6


class Prompts(torch.utils.data.Dataset[Any]):
    """Prompts that stay unread."""

    column_names = ("prompt",)

    def __len__(self) -> int:
        return SEQUENCES

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"prompt": "x"}


def test_two_updates_are_those_of_our_forward_kl(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    # TRL asks for the name of a GPU, to report the use of its peak, on a CPU too.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "none")
    from trl.experimental.async_distillation import (
        AsyncDistillationConfig,
        AsyncDistillationTrainer,
    )

    worker = StoreRolloutWorker(place / "store", k=K, sampled_token=False, epochs=4)
    args = AsyncDistillationConfig(
        output_dir=str(tmp_path),
        model_init_kwargs={"attn_implementation": "sdpa", "dtype": "float32"},
        beta=0.0,
        teacher_top_k=K,
        add_tail_bucket=True,
        token_budget=0,
        per_device_train_batch_size=SEQUENCES,
        gradient_accumulation_steps=1,
        max_steps=2,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        max_staleness=10**6,
        weight_sync_steps=10**6,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = AsyncDistillationTrainer(
        model=str(place / "student"),
        args=args,
        train_dataset=Prompts(),
        processing_class=AutoTokenizer.from_pretrained(place / "student"),
        rollout_worker=worker,
        weight_transfer=NoWeights(),
    )
    trainer.train()
    worker.stop()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]

    store = open_store(place / "store")
    ours = AutoModelForCausalLM.from_pretrained(place / "student", dtype=torch.float32)
    names = {"rollouts": "main", "teacher": "t"}
    (pack,) = batches(store, snapshot=store.head(), pack_length=256, **names)
    expected = []
    for _ in range(2):
        ours.zero_grad()
        inner = ours.model(pack.input_ids, position_ids=pack.position_ids, use_cache=False)
        result = pack_loss(
            parse_objective("forward_kl", k=K).objective,
            inner.last_hidden_state[0, pack.predict_at],
            ours.lm_head.weight,
            pack.targets,
            n_vocab=N_VOCAB,
        )
        result.loss.backward()
        expected.append(result.loss.item())
        with torch.no_grad():
            for each in ours.parameters():
                each -= 0.1 * each.grad
    assert losses == pytest.approx(expected, abs=1e-5)
    for now, mine in zip(trainer.model.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(now, mine, atol=1e-5)


def test_samples_hold_the_top_k_and_the_sampled_token(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    worker = StoreRolloutWorker(place / "store", k=2)
    worker.start()
    store = open_store(place / "store")
    (segment,) = store.head().rollouts("main")
    data = store.read_rollouts(segment)
    found = 0
    for _ in range(SEQUENCES):
        sample = worker.rollout_buffer.get(timeout=600)
        rows = sample.completion_mask.nonzero()[0]
        for at in rows:
            ids, lps = sample.teacher_topk_ids[at], sample.teacher_topk_logprobs[at]
            assert lps[0] >= lps[1] > -torch.inf
            token = sample.input_ids[at]
            assert token in ids, "the sampled token is a candidate"
            assert (ids[2] == -1) == (token in ids[:2])
        found += len(rows)
    assert found == data.positions
    with pytest.raises(queue.Empty):
        worker.rollout_buffer.get(timeout=0.2)
    worker.stop()
    with pytest.raises(IncompleteError, match="8 sequences of 1 epochs"):
        worker.check_health(1.0)


def test_more_ids_than_the_scores_have_are_refused(place: Path) -> None:
    with pytest.raises(ObjectiveError, match="at least 99"):
        StoreRolloutWorker(place / "store", k=N_VOCAB + 1)


@pytest.mark.parametrize("name", ["sft", "async"])
def test_the_scripts_of_the_readme_run(
    place: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "none")
    monkeypatch.chdir(tmp_path)
    page = Path(integrations.__file__).with_name("README.md").read_text()
    (script,) = re.findall(rf"```python {name}\n(.*?)```", page, re.S)
    for text, other in (
        ("Qwen/Qwen3-1.7B", str(place / "student")),
        ("./store", str(place / "store")),
        ('"out", ', '"out", use_cpu=True, bf16=False, report_to=[], save_strategy="no", '),
        ("max_steps=2", 'max_steps=2, model_init_kwargs={"attn_implementation": "sdpa"}'),
    ):
        script = script.replace(text, other)
    found: dict[str, Any] = {}
    exec(script, found)
    losses = [line["loss"] for line in found["trainer"].state.log_history if "loss" in line]
    assert found["trainer"].state.global_step >= 2
    assert all(0 < loss < 10 for loss in losses)
