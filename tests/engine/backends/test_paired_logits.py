"""Logits of two models on the same rows."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from logitcask.engine.backends.scoring import paired_logits
from logitcask.engine.errors import ModelError
from tests.engine.cached import make_unit

VOCAB, NEVER = 40, 1 << 30


def network(*, switch: int = NEVER, batch_tokens: int = 64, scale: float = 1.0) -> Any:
    """Make a network whose hidden state is the id, and whose logits are multiples of it."""
    return SimpleNamespace(
        switch=switch,
        batch_tokens=batch_tokens,
        n_vocab=VOCAB,
        device=torch.device("cpu"),
        hidden=lambda ids, mask, positions, cache: ids[:, :, None].float(),
        logits=lambda hidden: hidden.expand(-1, VOCAB) * scale,
    )


def test_both_are_of_the_same_rows_each_once() -> None:
    rollouts = make_unit(0, lengths=[5, 3, 0, 4, 6, 2]).rollouts
    seen = []
    for rows, first, second in paired_logits(
        network(), network(batch_tokens=16, scale=2.0), rollouts
    ):
        assert torch.equal(2 * first, second)
        seen += rows.tolist()
    assert sorted(seen) == list(range(rollouts.positions))


def test_ropes_that_switch_at_other_lengths_are_refused_on_longer_sequences() -> None:
    rollouts = make_unit(0, lengths=[5, 3, 0, 4, 6, 2]).rollouts
    with pytest.raises(ModelError, match="rows do not match"):
        list(paired_logits(network(), network(switch=7), rollouts))
