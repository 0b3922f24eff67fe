"""Weights of rows, by hand, and the same for every packing of an update."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from logitcask.engine.objectives import loss_weights, parse_objective
from logitcask.engine.objectives.loss_weights import prune_weights, stepwise_weights
from logitcask.engine.objectives.modifiers import Prune, Stepwise
from logitcask.engine.packing.targets import Targets
from tests.engine.objectives.full_rows import make_full

PLAIN = parse_objective("sampled_token").objective


def rows_of(lengths: list[int], seed: int = 0) -> Targets:
    """Return sequences of these lengths, with random distributions."""
    generator = torch.Generator().manual_seed(seed)
    live, teacher = torch.randn(2, sum(lengths), 20, generator=generator, dtype=torch.float64)
    targets = make_full(live * 2, live + teacher, student_k=8, kept=8).targets
    return replace(
        targets,
        sequence=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        position=torch.cat([torch.arange(n) for n in lengths]),
    )


def cut(rows: Targets, sequences: list[int]) -> Targets:
    """Select some sequences of a pack as a new pack."""
    index = torch.cat([(rows.sequence == s).nonzero()[:, 0] for s in sequences])
    part = rows.at(index)
    order = {s: i for i, s in enumerate(sequences)}
    return replace(part, sequence=torch.tensor([order[int(s)] for s in part.sequence]))


def test_aggregations_by_hand() -> None:
    """Check oracle 14: lengths 1 and 3, losses 1 and 5, 5, 5; one row of the second is masked."""
    rows = rows_of([1, 3])
    rows = replace(rows, weight=torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    loss = torch.tensor([1.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    expected = {"token-mean": 11 / 3, "sequence-mean": (1 + 5) / 2, "sequence-sum": (1 + 10) / 2}
    for how, value in expected.items():
        weights, divisor = loss_weights(PLAIN, [rows], how)
        assert float((weights[0] * loss).sum() / divisor) == pytest.approx(value), how


def test_prune_by_hand() -> None:
    """Count bad rows from their position on, separately per response, without masked rows."""
    how = Prune(overlap=0.5, drop=0.3, floor=0.1, k=4)
    rows = rows_of([4, 3])
    bad = [True, False, True, True, False, True, True]
    rank = torch.full_like(rows.q_rank, 1 << 30)
    for r, is_bad in enumerate(bad):
        rank[r, : 1 if is_bad else 2] = torch.arange(1 if is_bad else 2)
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 1.0], dtype=torch.float64)
    rows = replace(rows, q_rank=rank, n_kept=torch.full((7,), 4), weight=mask)
    expected = torch.tensor([0.8, 0.8, 0.5, 0.2, 1.1, 1.1, 0.8], dtype=torch.float64)
    torch.testing.assert_close(prune_weights(rows, how), expected)
    # With k' = 1, one shared id is a full overlap: a short list of the teacher costs nothing.
    few = replace(rows, n_kept=torch.ones(7, dtype=torch.int64))
    assert prune_weights(few, how).tolist() == pytest.approx([1.1] * 7)


def test_stepwise_by_hand() -> None:
    """Use steps of two tokens; |log p - log q| is 1, 3 | 1, 1 | 4 and, in a second response, 2."""
    rows = rows_of([5, 1])
    gap = torch.tensor([1.0, 3, 1, 1, 4, 2], dtype=torch.float64)
    rows = replace(
        rows, student_logprobs=-gap, teacher_logprobs=torch.zeros(6, dtype=torch.float64)
    )
    weights = stepwise_weights(rows, Stepwise(tokens=2, delta=0.5))
    expected = torch.tensor([1, 1, 1.5, 1.5, 0.5, 1], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0)


def test_the_share_of_highest_entropy_is_kept() -> None:
    rows = rows_of([6, 4])
    entropy = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10], dtype=torch.float64)
    mask = torch.ones(10, dtype=torch.float64)
    mask[9] = 0  # the largest is not trained on, so it does not count
    rows = replace(rows, student_entropy=entropy, weight=mask)
    objective = parse_objective("sampled_token+keep_entropy(share=0.34)").objective
    (weights,), divisor = loss_weights(objective, [rows], "token-mean")
    assert weights.tolist() == [0.0] * 6 + [1.0] * 3 + [0.0]
    assert divisor == 9, "modifiers do not change the divisor"


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "sequence-sum"])
@pytest.mark.parametrize(
    "name", ["sampled_token", "prune_opd", "sod", "reopold", "opd+prune(overlap=0.6)+keep_entropy"]
)
def test_packing_accumulation_and_processes_change_nothing(name: str, aggregation: str) -> None:
    objective = parse_objective(name).objective
    rows = rows_of([7, 1, 12, 5, 9], seed=4)
    (whole,), divisor = loss_weights(objective, [rows], aggregation)
    by_sequence = [whole[rows.sequence == s] for s in range(5)]
    packs = [[3, 0], [4], [2, 1]]
    parts, same = loss_weights(objective, [cut(rows, ids) for ids in packs], aggregation)
    assert same == divisor
    for ids, part in zip(packs, parts, strict=True):
        torch.testing.assert_close(part, torch.cat([by_sequence[s] for s in ids]), rtol=0, atol=0)
    # Two processes: an all-gather gives each the entropies of the other.
    mine, theirs = ([cut(rows, [3, 0])], [cut(rows, [4]), cut(rows, [2, 1])])
    gathered: list[object] = []

    def weights_of(packed: list[Targets], other: list[Targets]) -> tuple[list[Tensor], Tensor]:
        def all_gather(value: object) -> list[object]:
            remote = [
                (entropy, 1.0)
                for rows in other
                for entropy in rows.student_entropy[rows.weight > 0].tolist()
            ]
            gathered.append(remote)
            return [value, remote]

        return loss_weights(objective, packed, aggregation, all_gather)

    (first, one), (second, two) = weights_of(mine, theirs), weights_of(theirs, mine)
    assert one + two == divisor
    for got, expected in zip([*first, *second], parts, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert bool(gathered) == ("keep_entropy" in [m.name for m in objective.modifiers])


def test_an_update_without_rows_weighs_nothing() -> None:
    empty = rows_of([2]).at(torch.zeros(0, dtype=torch.int64))
    for name in ("sampled_token", "prune_opd", "sod", "reopold"):
        (weights,), divisor = loss_weights(
            parse_objective(name).objective, [empty], "sequence-mean"
        )
        assert len(weights) == 0
        assert divisor == 0
