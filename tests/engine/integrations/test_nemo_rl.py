"""A teacher and a generation of NeMo-RL that are a store, by a reference of NeMo-RL's loss.

The reference is what `get_distillation_topk_logprobs_from_logits` and `DistillationLossFn` of
NVIDIA-NeMo/RL 7ea279ab do on one GPU; NeMo-RL itself does not install with torch for CPUs.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.integrations.nemo_rl import StoreGeneration, StoreTeacher
from logitcask.engine.objectives import parse_objective
from logitcask.engine.packing.batches import batches
from logitcask.engine.store import open_store
from logitcask.engine.training.pack_loss import pack_loss
from tests.engine.tiny import N_VOCAB

K, PAD = 5, 0


@pytest.fixture(scope="module")
def stored(place: Path) -> StoreTeacher:
    return StoreTeacher(place / "store", k=K)


def train_data(stored: StoreTeacher, environment: int = 0) -> dict[str, torch.Tensor]:
    """Return all sequences as NeMo-RL's training data, with tokens of an environment at the end."""
    found = [stored.stored[number] for number in range(len(stored.stored))]
    width = max(len(each.ids) for each in found) + environment + 1
    data = {
        "input_ids": torch.full((len(found), width), PAD),
        "token_mask": torch.zeros(len(found), width),
        "input_lengths": torch.tensor([len(each.ids) + environment for each in found]),
    }
    for row, each in enumerate(found):
        data["input_ids"][row, : len(each.ids)] = torch.from_numpy(each.ids)
        data["input_ids"][row, len(each.ids) :][:environment] = 7
        data["token_mask"][row, each.prompt : len(each.ids)] = 1
    return data


@pytest.mark.parametrize("environment", [0, 2])
def test_the_loss_of_nemo_rl_is_our_renormalised_forward_kl(
    place: Path, stored: StoreTeacher, environment: int
) -> None:
    data = train_data(stored, environment)
    answer = stored.get_topk_logits(data, k=K)
    student = AutoModelForCausalLM.from_pretrained(place / "student", dtype=torch.float32)
    logits = student(data["input_ids"], use_cache=False).logits
    p = log_softmax(logits.gather(-1, answer["topk_indices"]), -1)[:, :-1]
    q = log_softmax(answer["topk_logits"], -1)[:, :-1]
    mask = data["token_mask"][:, 1:]
    loss = ((q.exp() * (q - p)).sum(-1) * mask).sum() / mask.sum()
    loss.backward()
    theirs = student.lm_head.weight.grad.clone()

    student.zero_grad()
    store = open_store(place / "store")
    names = {"rollouts": "main", "teacher": "t"}
    (pack,) = batches(store, snapshot=store.head(), pack_length=256, **names)
    inner = student.model(pack.input_ids, position_ids=pack.position_ids, use_cache=False)
    ours = pack_loss(
        parse_objective("forward_kl(tail=renormalize)", k=K).objective,
        inner.last_hidden_state[0, pack.predict_at],
        student.lm_head.weight,
        pack.targets,
        n_vocab=N_VOCAB,
    )
    ours.loss.backward()
    assert loss.item() == pytest.approx(ours.loss.item(), abs=1e-5)
    assert torch.allclose(theirs, student.lm_head.weight.grad, atol=1e-5)


def test_every_response_of_a_prompt_is_generated_once(stored: StoreTeacher) -> None:
    every = [stored.stored[number] for number in range(len(stored.stored))]
    length = max(each.prompt for each in every)
    prompts: dict[str, Any] = {
        "input_ids": torch.full((len(every), length), PAD),
        "input_lengths": torch.tensor([each.prompt for each in every]),
    }
    for row, each in enumerate(every):
        prompts["input_ids"][row, : each.prompt] = torch.from_numpy(each.ids[: each.prompt])
    generation = StoreGeneration(stored)
    for _ in range(2):
        output = generation.generate(prompts)
        lengths = output["unpadded_sequence_lengths"]
        made = [
            ids[:n].tolist() for ids, n in zip(output["output_ids"], lengths.tolist(), strict=True)
        ]
        assert sorted(made) == sorted(each.ids.tolist() for each in every)
        assert (lengths - output["generation_lengths"]).tolist() == [e.prompt for e in every]
    prompts["input_ids"][0, 0] += 1
    with pytest.raises(IncompleteError, match="prompt 0 of the batch"):
        generation.generate(prompts)


def test_a_sequence_that_is_not_stored_is_refused(stored: StoreTeacher) -> None:
    data = train_data(stored)
    early = {**data, "token_mask": torch.ones_like(data["token_mask"])}
    with pytest.raises(IncompleteError, match="row 0 has a loss at token 0"):
        stored.get_topk_logits(early, k=K)
    data["input_ids"][3, 2] += 1
    with pytest.raises(IncompleteError, match="row 3"):
        stored.get_topk_logits(data, k=K)
    data["token_mask"][3] = 0
    assert stored.get_topk_logits(data, k=K)["topk_logits"][3].abs().max() == 0
    with pytest.raises(ConfigError, match="wants 4 ids"):
        stored.get_topk_logits(data, k=4)
