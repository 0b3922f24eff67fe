"""A store in transformers' Trainer and in TRL's SFTTrainer: their loss and gradient are ours."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from logitcask.engine.errors import ConfigError, ObjectiveError
from logitcask.engine.integrations.trainer import StoreData, distilling
from logitcask.engine.objectives import parse_objective
from logitcask.engine.packing.batches import batches
from logitcask.engine.packing.targets import Targets
from logitcask.engine.store import open_store
from logitcask.engine.training.pack_loss import pack_loss
from tests.engine.tiny import EOS, N_VOCAB, make_model, make_tokenizer

SEQUENCES = 8
# Of TRL's own use of transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def student(place: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(place / "student", dtype=torch.float32)


def settings(kind: type, out: Path, **more: Any) -> Any:
    return kind(
        output_dir=str(out),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=SEQUENCES // 2,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **{"max_steps": 1, **more},
    )


@pytest.mark.parametrize(
    ("trainer", "arguments"), [(Trainer, TrainingArguments), (SFTTrainer, SFTConfig)]
)
def test_an_update_is_that_of_our_own_loss(
    place: Path, tmp_path: Path, trainer: type, arguments: type
) -> None:
    data = StoreData(place / "store", objective="forward_kl", k=8)
    assert len(data) == SEQUENCES
    model = student(place)
    trained = distilling(trainer)(model, settings(arguments, tmp_path), train_dataset=data)
    trained.train()
    line = trained.state.log_history[0]

    store, ours = open_store(place / "store"), student(place)
    names = {"rollouts": "main", "teacher": "t"}
    (pack,) = batches(store, snapshot=store.head(), pack_length=256, **names)
    states = ours.model(pack.input_ids, position_ids=pack.position_ids, use_cache=False)
    result = pack_loss(
        parse_objective("forward_kl", k=8).objective,
        states.last_hidden_state[0, pack.predict_at],
        ours.lm_head.weight,
        pack.targets,
        n_vocab=N_VOCAB,
    )
    result.loss.backward()
    assert line["loss"] == pytest.approx(result.loss.item(), abs=1e-4)
    assert line["overlap/ratio"] == pytest.approx(
        result.metrics["overlap/ratio"].mean().item(), abs=1e-4
    )
    for now, before in zip(model.parameters(), ours.parameters(), strict=True):
        # Plain gradient descent at rate 1: the step is the gradient.
        assert torch.allclose(before - now, before.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("beta", "objective"),
    [(0.0, "forward_kl"), (0.5, "gkd(parameter=0.5)"), (1.0, "full_vocab")],
)
def test_a_full_cache_gives_the_loss_of_a_live_teacher_in_trl(
    place: Path, beta: float, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    k = None if objective == "full_vocab" else N_VOCAB - 1
    data = StoreData(place / "store", objective=objective, k=k)
    batch = data.collate(list(data.rows()))
    model, teacher = student(place), make_model(seed=1)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    targets = Targets(**batch["targets"])
    losses = []
    for ours in (True, False):
        model.zero_grad()
        logits = model(**inputs).logits
        if ours:
            rows = logits.flatten(0, 1)[batch["predict_at"]]
            count = (batch["labels"] != -100).sum()
            loss, _ = data.loss(rows, targets, count)
        else:
            with torch.no_grad():
                live = teacher(**inputs).logits
            loss = GKDTrainer.generalized_jsd_loss(
                logits[:, :-1], live[:, :-1], labels=batch["labels"][:, 1:], beta=beta
            )
        loss.backward()
        losses.append((loss.item(), [each.grad.clone() for each in model.parameters()]))
    (loss, grads), (expected, live_grads) = losses
    assert loss == pytest.approx(expected, abs=1e-5)
    for grad, live_grad in zip(grads, live_grads, strict=True):
        assert torch.allclose(grad, live_grad, atol=1e-5)


def test_what_a_trainer_cannot_serve_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match="whole update"):
        StoreData(place / "store", objective="prune_opd", k=4)
    with pytest.raises(ConfigError, match="teacher"):
        StoreData(place / "store", teacher="other")
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])
    data = StoreData(place / "store")

    def refused(cause: str, model: Any, options: Any = None, **more: Any) -> None:
        options = options or settings(TrainingArguments, tmp_path)
        with pytest.raises(ConfigError) as caught:
            distilling(Trainer)(model, options, **{"train_dataset": data, **more})
        assert cause in str(caught.value)

    refused("Dataset, and this trainer", student(place), train_dataset=rows)
    refused("Dataset, and this trainer", student(place), eval_dataset=rows)
    refused("compute_loss_func would", student(place), compute_loss_func=lambda *_: 0)
    smooth = settings(TrainingArguments, tmp_path, label_smoothing_factor=0.1)
    refused("label_smoothing_factor = 0.1 has no effect", student(place), smooth)
    refused("packing = True", student(place), settings(SFTConfig, tmp_path, packing=True))
    refused("the model has 40 ids", make_model(seed=0, vocab_size=40))
    other = make_tokenizer()
    other.add_tokens(["more"])
    refused("the tokenizer differs", student(place), processing_class=other)


def test_held_out_sequences_are_evaluated_by_their_own_objective(
    place: Path, tmp_path: Path
) -> None:
    held_out = StoreData(place / "store", objective="gkd", k=4)
    trainer = distilling(Trainer)(
        student(place),
        settings(TrainingArguments, tmp_path, per_device_eval_batch_size=SEQUENCES),
        train_dataset=StoreData(place / "store", objective="forward_kl", k=8),
        eval_dataset=held_out,
    )
    batch = held_out.collate(list(held_out.rows()))
    logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = Targets(**batch["targets"])
    expected, _ = held_out.loss(
        logits.flatten(0, 1)[batch["predict_at"]], targets, targets.weight.sum()
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_is_padded_and_its_rows_are_found(place: Path) -> None:
    data = StoreData(place / "store")
    chosen = (0, 5, 3)
    batch = data.collate([{"sequence": i} for i in chosen])
    for line, number in enumerate(chosen):
        alone = data.collate([{"sequence": number}])
        length = alone["input_ids"].shape[1]
        for name, padding in (("input_ids", EOS), ("attention_mask", 0), ("labels", -100)):
            assert batch[name][line, :length].tolist() == alone[name][0].tolist()
            assert batch[name][line, length:].eq(padding).all()
    flat = batch["input_ids"].flatten()
    assert np.array_equal(flat[batch["predict_at"] + 1], batch["targets"]["token"])
