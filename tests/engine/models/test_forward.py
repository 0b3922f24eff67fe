"""Hidden states of packs and padded batches: each sequence as if it were alone."""

from typing import Any

import pytest
import torch

from logitcask.engine.models.forward import (
    NEVER,
    backbone,
    cuts,
    folded_head,
    pack_states,
    rope_switch,
    sequence_states,
)
from logitcask.engine.models.load import hidden_states
from tests.engine.tiny import make_model
from tests.models.build import make_family


def two_sequences() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 99, (1, 20), generator=generator)
    return ids, torch.cat([torch.arange(8), torch.arange(12)])[None]


def leak(model: Any, packed: torch.Tensor) -> float:
    """Return the largest difference of a packed row's states from those of its sequences alone."""
    ids, _ = two_sequences()
    alone = [model.base_model(input_ids=part).last_hidden_state for part in ids.split([8, 12], 1)]
    return float((packed - torch.cat(alone, 1)[0]).abs().max())


@torch.no_grad()
def test_packed_sequences_do_not_attend_to_each_other() -> None:
    model = make_model()
    ids, positions = two_sequences()
    assert leak(model, hidden_states(model, ids, positions)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "trap",
    [{"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones(1, 20).long()}],
    ids=["cache", "mask of ones"],
)
def test_with_a_cache_or_a_mask_they_would(trap: dict[str, Any]) -> None:
    model = make_model()
    ids, positions = two_sequences()
    out = model.base_model(input_ids=ids, position_ids=positions, **trap)
    assert leak(model, out.last_hidden_state[0]) > 0.1


def test_the_forward_pass_has_no_cache_and_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    assert model.config.use_cache, "by default, the model would make a cache"
    calls: list[dict[str, Any]] = []
    forward = model.base_model.forward

    def spy(**kwargs: Any) -> Any:
        calls.append(kwargs)
        return forward(**kwargs)

    monkeypatch.setattr(model.base_model, "forward", spy)
    hidden_states(model, *two_sequences())
    assert calls[0]["use_cache"] is False
    assert calls[0].keys() == {"input_ids", "position_ids", "use_cache"}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "gpt_oss", "mpt"])
def test_a_padded_pack_is_each_sequence_alone(name: str) -> None:
    model = make_family(name)
    assert leak(model, pack_states(model, *two_sequences(), packed=False)) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
def test_a_row_has_the_rotary_factors_of_its_own_prefix(packed: bool) -> None:
    model = make_family("phi3 longrope")
    switch = rope_switch(model.config)
    assert switch == 64
    generator = torch.Generator().manual_seed(1)
    lengths = (switch - 5, switch, switch + 1, switch + 9, 3)
    sequences = [torch.randint(99, (n,), generator=generator) for n in lengths]
    found = sequence_states(model, sequences, packed=packed)
    for ids, states in zip(sequences, found, strict=True):
        for row in {0, min(len(ids), switch) - 1, len(ids) - 1}:
            alone = backbone(model)(input_ids=ids[None, : row + 1]).last_hidden_state[0, row]
            torch.testing.assert_close(states[row], alone, atol=1e-4, rtol=1e-4)
    together = [torch.cat(sequences)[None], torch.cat([torch.arange(n) for n in lengths])[None]]
    torch.testing.assert_close(
        pack_states(model, *together, packed=packed), torch.cat(found), atol=1e-4, rtol=1e-4
    )


def test_other_ropes_never_switch() -> None:
    assert rope_switch(make_model().config) == NEVER
    assert rope_switch(make_family("mistral").config) == NEVER


def test_cuts_cover_a_sequence() -> None:
    assert cuts(7, NEVER) == [(0, 7, 7)]
    assert cuts(7, 7) == [(0, 7, 7)]
    assert cuts(9, 7) == [(0, 7, 7), (7, 9, 9)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "phi", "llama4_text"])
def test_states_times_the_head_are_the_logits(name: str) -> None:
    model = make_family(name)
    ids = torch.arange(32)[None]
    states, weight = folded_head(model, hidden_states(model, ids, ids))
    torch.testing.assert_close(
        states @ weight.T, model(input_ids=ids).logits[0], atol=1e-4, rtol=1e-4
    )
