"""Three objectives, written as losses of K-sized tensors; their coefficients come from autograd on
those tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from logitcask.kernels.objective_input import ObjectiveFn, ObjectiveGrad, ObjectiveInput

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(log_p [C, S], index [C], top_ids [C, K]) -> loss [C]"""


@dataclass(frozen=True)
class Teacher:
    """log q at ids, and of the tail; natural logs."""

    ids: Tensor
    """[P, S] int64, -1 is padding."""
    log_q: Tensor
    """[P, S], -inf where the id is -1."""
    log_tail: Tensor
    """[P]"""

    def to(self, dtype: torch.dtype) -> "Teacher":
        return Teacher(self.ids, self.log_q.to(dtype), self.log_tail.to(dtype))


def make_teacher(ids: Tensor, seed: int = 0) -> Teacher:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(ids.shape[0], ids.shape[1] + 1, generator=generator, dtype=torch.float64) * 2
    z[:, :-1].masked_fill_(ids.cpu() < 0, -torch.inf)
    log_q = z.log_softmax(-1).to(ids.device, torch.float32)
    return Teacher(ids, log_q[:, :-1], log_q[:, -1])


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor, on: Tensor) -> Tensor:
    """sum p (log p - log q) over `on`, without 0 * inf in value or gradient."""
    return torch.where(on, p * (log_p - log_q).masked_fill(~on, 0.0), 0.0).sum(-1)


def forward_kl_tail(teacher: Teacher) -> Loss:
    """KL(q || p) on S and one bucket for the rest."""

    def loss(log_p: Tensor, index: Tensor, top_ids: Tensor) -> Tensor:
        log_q, log_tail = teacher.log_q[index], teacher.log_tail[index]
        on = teacher.ids[index] >= 0
        rest = 1 - log_p.exp().masked_fill(~on, 0.0).sum(-1)
        return _kl(log_q.exp(), log_q, log_p, on) + log_tail.exp() * (log_tail - rest.log())

    return loss


def reverse_kl_renormalised(teacher: Teacher) -> Loss:
    """KL(p~ || q~), both renormalised on S."""

    def loss(log_p: Tensor, index: Tensor, top_ids: Tensor) -> Tensor:
        return _reverse_kl_on(teacher.ids[index] >= 0, log_p, teacher.log_q[index])

    return loss


def reverse_kl_overlap(teacher: Teacher) -> Loss:
    """KL(p~ || q~), both renormalised on the intersection of S and the live top-k; 0 where that is
    empty."""

    def loss(log_p: Tensor, index: Tensor, top_ids: Tensor) -> Tensor:
        live = (teacher.ids[index][:, :, None] == top_ids[:, None, :]).any(-1)
        return _reverse_kl_on(live, log_p, teacher.log_q[index])

    return loss


def _reverse_kl_on(on: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    # -1e9 instead of -inf: the softmax of a row that is off everywhere stays finite
    log_p = log_p.masked_fill(~on, -1e9).log_softmax(-1)
    log_q = log_q.masked_fill(~on, -1e9).log_softmax(-1)
    return _kl(log_p.exp(), log_p, log_q, on)


LOSSES: dict[str, Callable[[Teacher], Loss]] = {
    "forward_kl_tail": forward_kl_tail,
    "reverse_kl_renormalised": reverse_kl_renormalised,
    "reverse_kl_overlap": reverse_kl_overlap,
}


def objective(loss: Loss) -> ObjectiveFn:
    """Return the loss as an ObjectiveFn; both dense coefficients are -sum(at_ids)."""

    def objective_fn(view: ObjectiveInput) -> ObjectiveGrad:
        with torch.enable_grad():
            log_p = view.log_p.detach().requires_grad_()
            value = loss(log_p, view.index, view.top_ids)
            (g,) = torch.autograd.grad(value.sum(), log_p)
        dense = -g.sum(-1)
        metrics = {"entropy": view.entropy, "listed_mass": view.log_p.exp().sum(-1)}
        return ObjectiveGrad(value.detach(), g, dense, dense[:, None].expand_as(g), metrics)

    return objective_fn


def forward_kl_tail_closed(teacher: Teacher) -> ObjectiveFn:
    """forward_kl_tail in closed form, where the dense coefficient differs at the listed ids: dz = p
    - q there."""

    def objective_fn(view: ObjectiveInput) -> ObjectiveGrad:
        q = teacher.log_q[view.index].exp()
        rest = 1 - view.log_p.exp().sum(-1)
        dense = 1 - teacher.log_tail[view.index].exp() / rest
        value = forward_kl_tail(teacher)(view.log_p, view.index, view.top_ids)
        return ObjectiveGrad(value, -q, dense, torch.ones_like(q), {})

    return objective_fn


def plus_entropy(plain: ObjectiveFn, factor: Tensor) -> ObjectiveFn:
    """Add factor [P] times H(p) to the loss: dH/dy_v = -p_v log p_v - H p_v, at every id."""

    def objective_fn(view: ObjectiveInput) -> ObjectiveGrad:
        output, f = plain(view), factor[view.index].to(view.entropy.dtype)
        h = f * view.entropy
        return output._replace(
            loss=output.loss + h,
            dense=output.dense - h,
            dense_at_ids=output.dense_at_ids - h[:, None],
            dense_log=-f,
        )

    return objective_fn


def entropy_of(logits: Tensor, n_vocab: int | None = None) -> Tensor:
    """Return the entropy [P] by log_softmax of whole rows; logits of -inf add nothing."""
    log_p = logits[:, :n_vocab].log_softmax(-1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


def full_vocab_loss(
    loss: Loss, logits: Tensor, teacher: Teacher, k: int, n_vocab: int | None = None
) -> Tensor:
    """Return the loss [P] by autograd through log_softmax of whole rows."""
    z = logits[:, :n_vocab]
    log_p = (
        z.log_softmax(-1)
        .gather(1, teacher.ids.clamp(min=0))
        .masked_fill(teacher.ids < 0, -torch.inf)
    )
    top_ids = z.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return loss(log_p, torch.arange(len(z), device=z.device), top_ids)
