"""Span advantage: the sampled reverse KL of the student to a teacher with another tokenizer.

A_s = log q(span s) - log p(span s), both by the chain rule over their own tokens. The loss
-sum_s sg[A_s + gamma A_s+1 + ...] log p(span s) has, at gamma = 1 and on policy, the mean gradient
of KL(p || q~) over responses, where q~(y) is the teacher's probability of its own tokenization of
the text of y. q~ does not sum to 1 over the student's sequences, but its sum does not depend on the
student. At gamma = 0 each span has its own A_s, as the sampled token has in Eq.3 of arXiv
2604.13016; with equal tokenizers the loss is that of `sampled_token`.
"""

import torch
from torch import Tensor

from logitcask.engine.objectives.spans.log_probs import SpanLogProbs


def advantage(x: SpanLogProbs, _: int, gamma: float) -> Tensor:
    """Return [G] -A_s as the value, -sg[A_s + gamma A_s+1 + ...] grad log p(span) as gradient."""
    a = (x.teacher - x.student).detach()
    to_go = returns(a, x.rows.sequence[x.first], gamma) if gamma else a
    # The value of log p - sg[log p] is 0, its gradient that of log p.
    return -a - to_go * (x.student - x.student.detach())


def returns(a: Tensor, sequence: Tensor, gamma: float) -> Tensor:
    """Return [G] a_s + gamma a_s+1 + ... to the end of the sequence of each span."""
    found, of = a.tolist(), sequence.tolist()
    for i in range(len(found) - 2, -1, -1):
        if of[i] == of[i + 1]:
            found[i] += gamma * found[i + 1]
    return torch.tensor(found, dtype=a.dtype, device=a.device)
