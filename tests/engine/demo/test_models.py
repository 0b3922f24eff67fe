"""The demo's models: ordinary folders, and an accuracy that is counted correctly."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from logitcask.engine.demo.models import (
    CHARACTERS,
    STOP,
    Size,
    accuracy,
    make_model,
    make_tokenizer,
    save,
)
from logitcask.engine.demo.task import Problem, Task
from logitcask.engine.models.identity import model_ref
from logitcask.engine.prompts.prompts import load_tokenizer

TINY = Size(hidden=8, layers=1, intermediate=16, heads=1)


def test_folder_is_an_ordinary_model(tmp_path: Path):
    tokenizer = make_tokenizer()
    save(make_model(TINY, 0), tokenizer, tmp_path)
    ref = model_ref(str(tmp_path), chat_template=False)
    assert (ref.n_vocab, ref.stop_ids, ref.version) == (97, (STOP,), 0)
    loaded = load_tokenizer(tmp_path)
    text = "".join(CHARACTERS) + "  don't . , ?  "
    ids = loaded(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert loaded.decode(ids) == text


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = make_model(TINY, 3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = make_model(TINY, 3).state_dict(), make_model(TINY, 4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


class Recites(torch.nn.Module):
    """A model that answers problem i with text i; its cache is the number of calls."""

    def __init__(self, texts: list[str], stops: bool = True) -> None:
        super().__init__()
        self.rows = [make_tokenizer()(t)["input_ids"] + [STOP] * stops for t in texts]

    def forward(self, *, input_ids: Any, past_key_values: Any, **_: Any) -> Any:
        step = past_key_values or 0
        assert input_ids.shape[1] == (6 if step == 0 else 1)
        logits = torch.zeros(len(self.rows), 1, 97)
        for i, row in enumerate(self.rows):
            # After its end a row generates a token that would make the answer wrong.
            logits[i, 0, row[step] if step < len(row) else row[0]] = 1.0
        return SimpleNamespace(logits=logits, past_key_values=step + 1)


def problems() -> list[Problem]:
    return [Problem(12, "+", b, 2) for b in range(20, 24)]


def test_accuracy_is_the_share_of_right_answers():
    texts = [p.solution for p in problems()]
    texts[2] = texts[2][:-1]
    texts[3] = ">35"
    model = Recites(texts).train()
    assert accuracy(model, make_tokenizer(), problems(), Task(2).max_new_tokens) == 0.75
    assert model.training


@pytest.mark.parametrize("room", [3, 32])
def test_an_answer_that_never_stops_is_not_one(room: int):
    model = Recites([">" + p.answer for p in problems()], stops=False)
    assert accuracy(model, make_tokenizer(), problems(), room) == 0.0
