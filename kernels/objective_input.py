"""Input and output of an objective, a function that returns loss and gradient of C rows."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class ObjectiveInput(NamedTuple):
    """The student's log-probs on C rows.

    Float tensors are float32, or float64 for float64 logits; natural logs.
    """

    index: Tensor  # type: ignore[assignment]  # it hides tuple.index, which is not needed
    """[C] int64: positions of these rows in the call."""
    log_p: Tensor
    """[C, S]: the student's log-prob at the listed ids; -inf where the id is -1."""
    top_ids: Tensor
    """[C, K] int64: the student's live top-k, best first."""
    top_log_p: Tensor
    """[C, K]: its log-probs."""
    entropy: Tensor
    """[C] nats: the student's entropy."""


class ObjectiveGrad(NamedTuple):
    """Loss of C rows and its derivatives.

    For a loss of {log p at S} alone, dense and dense_at_ids are both -sum(at_ids). With a tail
    bucket of mass r = 1 - sum p they differ at the listed ids, because r depends on p there as
    well. They are separate so that terms near 1/r can cancel before they are rounded.
    """

    loss: Tensor
    """[C] nats, not weighted."""
    at_ids: Tensor
    """[C, S]: derivative of the loss by log p at the listed ids, without the dense coefficients.
    Ignored where the id is -1."""
    dense: Tensor
    """[C]: coefficient of p_v at ids that are not listed."""
    dense_at_ids: Tensor
    """[C, S]: coefficient of p_v at the listed ids."""
    metrics: dict[str, Tensor]
    """name -> [C]. The same names for every chunk of rows."""
    dense_log: Tensor | None = None
    """[C]: coefficient of p_v log p_v at every id, listed or not, 0 where p_v is. The
    entropy H of p needs it: dH/dy_v = -p_v log p_v - H p_v. None: 0."""


ObjectiveFn = Callable[[ObjectiveInput], ObjectiveGrad]


class SparseLoss(NamedTuple):
    """Result of a loss on P rows."""

    loss: Tensor
    """[]: sum over rows of row_weight * row_loss; differentiable."""
    row_loss: Tensor
    """[P] nats, not weighted, detached."""
    metrics: dict[str, Tensor]
    """name -> [P], detached."""
