"""Every divergence, tail and support through every op, against autograd of whole rows.

An objective with a plain form, with that of its own, and both with the same metrics.
"""

from dataclasses import replace

import pytest
import torch
from fused_cases import KINDS, SUPPORTS, fused, make_cached, plain_loss
from kernel_objectives import full_vocab_loss
from torch import Tensor

from logitcask.kernels.indexed_linear import indexed_linear
from logitcask.kernels.linear_sparse_kl import linear_sparse_kl
from logitcask.kernels.sparse_kl import sparse_kl

P, V, D, S, K = 4, 150, 8, 12, 6
WEIGHT = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
OPTIONS = {"k": K, "row_weight": WEIGHT}


def assert_gradients(loss: Tensor, reference: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(loss.detach(), reference.detach(), rtol=1e-11, atol=1e-12)
    ours, exact = torch.autograd.grad(loss, leaves), torch.autograd.grad(reference, leaves)
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("divergence", "tail", "support"),
    [
        (divergence, tail, support)
        for divergence, tail in KINDS
        for support in (SUPPORTS if divergence in ("reverse_kl", "jsd") else SUPPORTS[:2])
    ],
)
def test_every_op_equals_full_vocabulary_autograd(divergence: str, tail: str, support: str) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(P, D, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(V, D, generator=generator, dtype=torch.float64).requires_grad_()
    z = (hidden @ head.T).detach().requires_grad_()
    cached = make_cached(z, S, support).to(torch.float64)
    objective, _ = fused(cached, divergence, tail)
    loss = plain_loss(cached, divergence, tail)

    def full(logits: Tensor) -> Tensor:
        return (full_vocab_loss(loss, logits, cached, K) * WEIGHT).sum()

    if (tail, support) != ("renormalize", "sampled"):  # one id renormalised has all the mass
        assert full(z).abs() > 1e-3
        assert full(z) > 0 or tail == "ignore", "without the mass outside it can be less"
    given = sparse_kl(z, cached.ids, objective, **OPTIONS)
    assert_gradients(given.loss, full(z), [z])
    product = full(hidden @ head.T)
    own_form = replace(objective, plain=None)
    ours = linear_sparse_kl(hidden, head, cached.ids, own_form, chunk_rows=3, **OPTIONS)
    assert_gradients(ours.loss, product, [hidden, head])
    for name, value in given.metrics.items():
        near = {"rtol": 1e-9, "atol": 1e-12, "check_dtype": False}
        torch.testing.assert_close(ours.metrics[name], value, **near, msg=name)
    if tail == "renormalize":
        ours = indexed_linear(hidden, head, cached.ids, objective, **OPTIONS)
        assert_gradients(ours.loss, full(hidden @ head.T), [hidden, head])
