"""Losses over spans of other libraries: their code against their formulas, and their faults."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from logitcask.engine.alignment.token_bytes import token_bytes
from tests.engine.alignment.small_tokenizers import tokenizer_of
from tests.engine.objectives.peer_forms import (
    SPANS,
    Side,
    gold,
    groups_of,
    merged,
    side,
    sorted_l1,
)

PROMPT = 2
PAIRS = torch.tensor([[0, 3], [1, 1], [4, 0], [7, 9]])


@pytest.fixture(scope="module")
def trl() -> Any:
    """Return ULDLoss of TRL's GOLDTrainer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.gold.gold_trainer import ULDLoss
    return ULDLoss


def settings(strategy: str, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.0,
        uld_teacher_temperature=1.0, uld_skip_student_eos=False, uld_skip_teacher_eos=False,
        use_extended_uld=True, uld_token_merge_strategy=strategy, **more,
    )  # fmt: skip


def offsets(which: int) -> list[tuple[int, int]]:
    """Return the bytes of each token of SPANS: a span has ten, and no inner end in common."""
    ends: list[int] = []
    for number, (first, end) in enumerate(groups_of(which)):
        ends += [10 * number + 2 * (i + 1) + which for i in range(end - first - 1)]
        ends.append(10 * number + 10)
    return list(zip([0, *ends[:-1]], ends, strict=True))


def value(loss: Any, student: Side, teacher: Side, z: Tensor) -> Tensor:
    """Return TRL's loss of the student's logits z [P + 1, V], behind a prompt."""

    def batch(at: Side, logits: Tensor, which: int) -> tuple[Tensor, ...]:
        before = logits.new_zeros(PROMPT - 1, logits.shape[1])
        no_label, no_offset = torch.full((PROMPT,), -100), torch.zeros(PROMPT, 2, dtype=torch.int64)
        return (
            torch.cat([before, logits])[None],
            torch.cat([no_label, at.ids])[None],
            torch.cat([torch.zeros(PROMPT, dtype=torch.int64), at.ids])[None],
            torch.cat([no_offset, torch.tensor(offsets(which))])[None],
        )

    ours, theirs = batch(student, z, 0), batch(teacher, teacher.z, 1)
    both = (each for pair in zip(ours, theirs, strict=True) for each in pair)
    found: Tensor = loss(*both)
    return found


STUDENT, TEACHER = side(0, SPANS[-1][1], 9), side(1, SPANS[-1][3], 11)


@pytest.mark.parametrize(("strategy", "rule"), [("observed", "released"), ("bayesian", "bayesian")])
@pytest.mark.parametrize("beta", [None, 0.3])
def test_trl_gold_is_its_formula(trl: Any, strategy: str, rule: str, beta: float | None) -> None:
    loss = trl(settings(strategy))
    if beta is not None:
        weights = {"uld_hybrid_matched_weight": 0.6, "uld_hybrid_unmatched_weight": 0.7}
        loss = trl(settings(strategy, uld_use_hybrid_loss=True, beta=beta, **weights))
        loss._vocab_mapping = {int(b): int(a) for a, b in PAIRS}
        loss._teacher_matched_ids = set(loss._vocab_mapping)
        loss.mapping_tensor = torch.full((11,), -1)
        loss.mapping_tensor[PAIRS[:, 1]] = PAIRS[:, 0]
    z = STUDENT.z.clone().requires_grad_()
    p = merged(Side(z, STUDENT.ids), groups_of(0), rule)
    q = merged(TEACHER, groups_of(1), rule)
    form = sorted_l1(p, q) if beta is None else gold(p, q, PAIRS, beta, (0.6, 0.7))
    (expected,) = torch.autograd.grad(form.mean(), z)
    found = value(loss, STUDENT, TEACHER, z)
    (grad,) = torch.autograd.grad(found, z)
    assert found.item() == pytest.approx(form.mean().item(), rel=1e-12)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


def test_trl_merges_are_no_distributions(trl: Any) -> None:
    """Show oracle O7: both hold .30 for the tokens that are there, and neither sums to 1."""
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]], dtype=torch.float64)
    found = {
        rule: trl(settings(rule))._merge_probabilities_with_alignment_groups(p, [[0, 1]], [0, 1])[0]
        for rule in ("observed", "bayesian")
    }
    assert found["observed"].tolist() == pytest.approx([0.3, 0.15, 0.05])
    assert found["bayesian"].tolist() == pytest.approx([0.12, 0.30, 0.18])
    assert [each.sum().item() for each in found.values()] == pytest.approx([0.5, 0.6])


def sure(at: Side) -> Side:
    """Return a model that is sure of every token of its text, and of no token after it."""
    z = torch.zeros_like(at.z)
    z[torch.arange(len(at.ids)), at.ids] = 100.0
    return Side(z, at.ids)


def test_trl_observed_reads_the_rows_behind_the_tokens(trl: Any) -> None:
    """Show the fault by two models that are both sure of the text, so that any distance is 0."""
    # Neighbours differ: a row behind then has nothing of its token.
    student = sure(Side(STUDENT.z, torch.arange(7) % 9))
    teacher = sure(Side(TEACHER.z, torch.arange(8) % 11))
    right, late = (trl(settings(each)) for each in ("bayesian", "observed"))
    assert value(right, student, teacher, student.z).item() == pytest.approx(0, abs=1e-12)
    # Of five spans those of n:1 and 1:n have mass 1 on one side and none on the other; the last
    # row of all is what follows the text: 9 ids of 1/9 against 11 of 1/11.
    after = 9 * (1 / 9 - 1 / 11) + 2 / 11
    expected = (1 + 1 + after) / 5
    assert value(late, student, teacher, student.z).item() == pytest.approx(expected, abs=1e-6)
    released = [merged(at, groups_of(i), "released") for i, at in enumerate((student, teacher))]
    assert sorted_l1(*released).mean().item() == pytest.approx(expected, abs=1e-12)
    repaired = [merged(at, groups_of(i), "observed") for i, at in enumerate((student, teacher))]
    assert sorted_l1(*repaired).mean().item() == pytest.approx(0, abs=1e-12)


def test_trl_matches_ids_of_other_bytes(trl: Any) -> None:
    """Show that equal strings of two vocabularies are not equal text, and miss equal text."""
    student, teacher = tokenizer_of("byte-level"), tokenizer_of("sentencepiece")
    matched = trl(settings("bayesian", uld_use_hybrid_loss=True), student, teacher)._vocab_mapping
    ours, theirs = token_bytes(student).pieces, token_bytes(teacher).pieces
    wrong = {theirs[b]: ours[a] for b, a in matched.items() if ours[a] != theirs[b]}
    # A character of the map of bytes on one side is itself on the other.
    assert wrong == {"é".encode(): b"\xe9", "ü".encode(): b"\xfc"}
    of_bytes = {piece: index for index, piece in enumerate(ours) if piece}
    missed = [p for b, p in enumerate(theirs) if p in of_bytes and b not in matched]
    assert b" t" in missed
