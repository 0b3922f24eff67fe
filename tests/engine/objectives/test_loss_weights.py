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
    """Sequences of these lengths, with random distributions."""
    generator = torch.Generator().manual_seed(seed)
    live, teacher = torch.randn(2, sum(lengths), 20, generator=generator, dtype=torch.float64)
    targets = make_full(live * 2, live + teacher, student_k=8, kept=8).targets
    return replace(
        targets,
        sequence=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        position=torch.cat([torch.arange(n) for n in lengths]),
    )


def cut(rows: Targets, sequences: list[int]) -> Targets:
    """Some sequences of a pack as a pack of their own."""
    index = torch.cat([(rows.sequence == s).nonzero()[:, 0] for s in sequences])
    part = rows.at(index)
    order = {s: i for i, s in enumerate(sequences)}
    return replace(part, sequence=torch.tensor([order[int(s)] for s in part.sequence]))


def test_aggregations_by_hand() -> None:
    """Oracle 14: lengths 1 and 3, losses 1 and 5, 5, 5; one row of the second is masked."""
    rows = rows_of([1, 3])
    rows = replace(rows, weight=torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    loss = torch.tensor([1.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    want = {"token-mean": 11 / 3, "sequence-mean": (1 + 5) / 2, "sequence-sum": (1 + 10) / 2}
    for how, value in want.items():
        weights, divisor = loss_weights(PLAIN, [rows], how)
        assert float((weights[0] * loss).sum() / divisor) == pytest.approx(value), how


def test_prune_by_hand() -> None:
    """Bad rows count from where they stand, anew in every response, masked ones not at all."""
    how = Prune(overlap=0.5, drop=0.3, floor=0.1, k=4)
    rows = rows_of([4, 3])
    bad = [True, False, True, True, False, True, True]
    rank = torch.full_like(rows.q_rank, 1 << 30)
    for r, is_bad in enumerate(bad):
        rank[r, : 1 if is_bad else 2] = torch.arange(1 if is_bad else 2)
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 1.0], dtype=torch.float64)
    rows = replace(rows, q_rank=rank, n_kept=torch.full((7,), 4), weight=mask)
    want = [0.8, 0.8, 0.5, 0.2, 1.1, 1.1, 0.8]
    torch.testing.assert_close(prune_weights(rows, how), torch.tensor(want, dtype=torch.float64))
    # 1 of k' = 1 is a whole overlap: a teacher that kept fewer is not held against the student.
    few = replace(rows, n_kept=torch.ones(7, dtype=torch.int64))
    assert prune_weights(few, how).tolist() == pytest.approx([1.1] * 7)


def test_stepwise_by_hand() -> None:
    """Steps of two tokens; |log p - log q| of 1, 3 | 1, 1 | 4 in one response, 2 | in the next."""
    rows = rows_of([5, 1])
    gap = torch.tensor([1.0, 3, 1, 1, 4, 2], dtype=torch.float64)
    rows = replace(
        rows, student_logprobs=-gap, teacher_logprobs=torch.zeros(6, dtype=torch.float64)
    )
    weights = stepwise_weights(rows, Stepwise(tokens=2, delta=0.5))
    want = torch.tensor([1, 1, 1.5, 1.5, 0.5, 1], dtype=torch.float64)
    torch.testing.assert_close(weights, want, rtol=1e-5, atol=0)


def test_the_least_sure_share_of_an_update_is_kept() -> None:
    rows = rows_of([6, 4])
    entropy = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10], dtype=torch.float64)
    mask = torch.ones(10, dtype=torch.float64)
    mask[9] = 0  # the largest is not trained on, so it takes nobody's place
    rows = replace(rows, student_entropy=entropy, weight=mask)
    what = parse_objective("sampled_token+keep_entropy(share=0.34)").objective
    (weights,), divisor = loss_weights(what, [rows], "token-mean")
    assert weights.tolist() == [0.0] * 6 + [1.0] * 3 + [0.0]
    assert divisor == 9, "modifiers leave the divisor alone"


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
    # Two processes: each says what the other must hear.
    mine, theirs = ([cut(rows, [3, 0])], [cut(rows, [4]), cut(rows, [2, 1])])
    heard: list[object] = []

    def of(packed: list[Targets], other: list[Targets]) -> tuple[list[Tensor], Tensor]:
        def both(value: object) -> list[object]:
            said = [rows.student_entropy[rows.weight > 0].tolist() for rows in other]
            heard.append(said)
            return [value, said]

        return loss_weights(objective, packed, aggregation, both)

    (first, one), (second, two) = of(mine, theirs), of(theirs, mine)
    assert one + two == divisor
    for got, want in zip([*first, *second], parts, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert bool(heard) == ("keep_entropy" in [m.name for m in objective.modifiers])


def test_an_update_without_rows_weighs_nothing() -> None:
    empty = rows_of([2]).at(torch.zeros(0, dtype=torch.int64))
    for name in ("sampled_token", "prune_opd", "sod", "reopold"):
        (weights,), divisor = loss_weights(
            parse_objective(name).objective, [empty], "sequence-mean"
        )
        assert len(weights) == 0
        assert divisor == 0
