"""Span advantage: the sampled reverse KL of the student to a teacher with another tokenizer.

A_s = log q(span s) - log p(span s), both by the chain rule over their own tokens. A token of span s
has the weight

    R = A_s + gamma A_s+1 + gamma^2 A_s+2 + ...        (+ gamma A_s-1 for the first token of s)

and the loss is -sg[R] log p(token). At gamma = 1, on policy, its mean gradient is that of KL(p ||
q~) over responses, where q~(y) is the teacher's probability of its own tokenization of the text of
y. q~ does not sum to 1 over the student's sequences, but its sum does not depend on the student.

A sum of A over earlier spans may be left out of R if it is known before the token is drawn. With
one tokenizer that is every earlier span. With two, the token decides if the span before it ends
there, or goes on (`the` or `the|re`): so A_s-1 stays in. The rest is right as long as the teacher
would not divide the text before the last token's span otherwise, whatever follows.

At gamma = 0 each span has its own A_s, as the sampled token has in Eq.3 of arXiv 2604.13016; with
equal tokenizers the loss is that of `sampled_token`. Spans that are not trained on have no A.

The modifier `importance` multiplies the loss of a span at gamma = 0 by p(s) / b(s), held fixed, b
the distribution that its tokens were drawn from: the draw of the span is corrected, not its prefix.
"""

import torch
from torch import Tensor

from logitcask.engine.objectives.spans.log_probs import SpanLogProbs

RATIO_BOUND = 20.0
"""Largest |log ratio|, as of the modifiers of rows."""


def advantage(x: SpanLogProbs, _: int, gamma: float) -> Tensor:
    """Return [G] -A_s as the value, and -sum_i sg[R_i] grad log p(y_i) as its gradient."""
    a = torch.where(x.trained, x.teacher - x.student, 0.0).detach()
    # The value of log p - sg[log p] is 0, its gradient that of log p.
    if not gamma:
        return -a - a * _score(x.student)
    sequence = x.rows.sequence[x.first]
    first = torch.where(x.known, x.token_log_p[x.first], 0.0)
    to_go, before = returns(a, sequence, gamma), gamma * earlier(a, sequence)
    return -a - to_go * _score(x.student) - before * _score(first)


def importance(x: SpanLogProbs, cap: float) -> Tensor:
    """Return [G] p(s) / b(s) without a gradient, at most `cap` if that is above 0."""
    log_b = x.rows.behavior_logprobs.to(x.log_p.dtype)
    log_ratio = x.sums(torch.where(x.trained_rows, x.token_log_p - log_b, 0.0).detach())
    ratio = log_ratio.clamp(-RATIO_BOUND, RATIO_BOUND).exp()
    return ratio.clamp(max=cap) if cap else ratio


def _score(log_p: Tensor) -> Tensor:
    """Return zeros with the gradient of log p."""
    return log_p - log_p.detach()


def returns(a: Tensor, sequence: Tensor, gamma: float) -> Tensor:
    """Return [G] a_s + gamma a_s+1 + ... to the end of the sequence of each span."""
    found, of = a.tolist(), sequence.tolist()
    for i in range(len(found) - 2, -1, -1):
        if of[i] == of[i + 1]:
            found[i] += gamma * found[i + 1]
    return torch.tensor(found, dtype=a.dtype, device=a.device)


def earlier(a: Tensor, sequence: Tensor) -> Tensor:
    """Return [G] a of the span before each in its sequence, 0 for the first."""
    out = torch.zeros_like(a)
    out[1:] = torch.where(sequence[1:] == sequence[:-1], a[:-1], 0.0)
    return out
