"""Losses of KDFlow, in the fork of SimCT, against ours: ULD, ALM and span_ctkd (SimCT)."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import spans
import torch
from kdflow.algorithms.alm import ALM
from kdflow.algorithms.span_ctkd import SpanCrossTokenizerKD
from kdflow.algorithms.uld import ULD
from kdflow.loss.reverse_kl_div import compute_reverse_kl_div
from torch import Tensor
from values import close, gradient

LIMIT = 50.0
"""tau from which its ALM takes the limit."""
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


def of(kind: Any, **values: Any) -> Any:
    """Return an algorithm without its models."""
    made = kind.__new__(kind)
    vars(made).update(values)
    return made


@SEEDS
@pytest.mark.parametrize("k", [0, 4])
def test_uld(k: int, seed: int) -> None:
    """Compare at the starts of spans; the rest of a top-k is one bin of theirs."""
    made = spans.rows(seed)
    peer = of(ULD, uld_temperature=1.0, uld_top_k=k)
    ours, theirs = ([span[at] for span in made.spans] for at in (0, 2))

    def found(z: Tensor) -> Tensor:
        loss: Tensor = peer._compute_wasserstein_1(z[ours], made.teacher.z[theirs]).sum()
        return loss.double()

    def mine(z: Tensor) -> Tensor:
        return spans.loss("uld", made, z, k=k or 64).sum()

    close(gradient(mine, made.student.z), gradient(found, made.student.z))


@SEEDS
@pytest.mark.parametrize("tau", [1.0, 10.0, 49.0, LIMIT, 100.0])
def test_alm(tau: float, seed: int) -> None:
    """Compare tau times its loss below its limit, and its limit with ours at infinity."""
    made = spans.rows(seed)
    peer = of(ALM, alm_temperature=tau, alm_f_divergence="kl")
    whole = torch.stack([made.teacher.log_probs[b0:b1].sum() for _, _, b0, b1 in made.spans])

    def span_p(z: Tensor) -> Tensor:
        log_p = spans.Model(z, made.student.ids).log_probs
        return torch.stack([log_p[a0:a1].sum() for a0, a1, _, _ in made.spans])

    factor = tau if tau < LIMIT else 1.0

    def found(z: Tensor) -> Tensor:
        loss: Tensor = factor * peer._binarised_f_divergence(whole, span_p(z)).sum()
        return loss

    def mine(z: Tensor) -> Tensor:
        return spans.loss("alm", made, z, tau if tau < LIMIT else math.inf).sum()

    close(gradient(mine, made.student.z), gradient(found, made.student.z))


@SEEDS
def test_alm_tvd(seed: int) -> None:
    log_q, log_p = (-torch.rand(2, 9, generator=torch.Generator().manual_seed(seed)) * 3).double()
    at, below = (
        of(ALM, alm_temperature=tau, alm_f_divergence="tvd")
        ._binarised_f_divergence(log_q, log_p)
        .sum()
        for tau in (LIMIT, LIMIT - 1e-9)
    )
    assert at / below > 45
    pytest.skip("ours has the KL alone; its TVD becomes some 50 times larger where tau reaches 50")


def simct(made: spans.Rows, z: Tensor, teacher: Tensor) -> Tensor:
    """Return its reverse KL over its virtual vocabulary, the sum over spans."""
    ours, theirs = torch.tensor(made.pairs).T
    peer = of(
        SpanCrossTokenizerKD,
        student_overlap_token_ids=ours,
        teacher_overlap_token_ids=theirs,
        _span_debug_count=99,
    )
    segments = [(b0, b1, a0, a1) for a0, a1, b0, b1 in made.spans]
    p, q = peer._build_virtual_vocab_logits(
        segments, z, teacher, made.student.ids.tolist(), made.teacher.ids.tolist()
    )
    loss: Tensor = compute_reverse_kl_div(p.double(), q.double()).double().sum()
    return loss


@SEEDS
@pytest.mark.parametrize("which", ["1:1 spans", "all spans"])
def test_simct(which: str, seed: int) -> None:
    made = spans.rows(seed, spans.ONE_TO_ONE if which == "1:1 spans" else spans.SPANS)

    def mine(z: Tensor) -> Tensor:
        return spans.loss("simct", made, z).sum()

    def found(z: Tensor) -> Tensor:
        return simct(made, z, made.teacher.z)

    if which == "all spans":
        # A constant on the logits of one row changes no probability; row 2 is inside a span.
        moved = made.student.z.clone()
        moved[2] += 3.0
        torch.testing.assert_close(mine(moved), mine(made.student.z))
        assert abs(found(moved) - found(made.student.z)) > 0.01
        pytest.skip(
            "its entry of a span is a mean of raw logits, which a constant on a row changes; ours "
            "is the log-prob of the span"
        )
    close(gradient(mine, made.student.z), gradient(found, made.student.z))


def test_simct_spans() -> None:
    """Show that it closes a span only where the last tokens of both are equal."""

    def tokenizer(*pieces: str) -> Any:
        return SimpleNamespace(decode=lambda ids: pieces[ids[0]], eos_token="</s>")

    peer = of(
        SpanCrossTokenizerKD,
        teacher_tokenizer=tokenizer("a", "b", "c", "d"),
        student_tokenizer=tokenizer("ab", "cd"),
        _debug_count=99,
    )
    assert peer._align_sequences_with_spans([0, 1, 2, 3], [0, 1])[0] == []
    pytest.skip("`ab cd` and `a b c d` have two spans; it finds none, as no last tokens are equal")
