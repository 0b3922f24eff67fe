"""The mean gradient over every response of a small student, against that of the KL it claims."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from logitcask.engine.objectives import parse_objective
from logitcask.engine.training.pack_loss import pack_loss
from tests.engine.objectives.spans.formulas import build_targets

TEXT = ("a", "b", "ab", "")
STOP = 3
LONGEST = 3
PREFIXES = [p for n in range(LONGEST) for p in product(range(STOP), repeat=n)]
"""The student's ids before a token."""
RESPONSES = [
    *((*p, STOP) for p in PREFIXES),
    *product(range(STOP), repeat=LONGEST),
]
TEACHERS = {
    "same": None,  # the student's own tokens
    "bytes": ("a", "b"),
    "pairs": ("ab", "ba", "bb", "a", "b"),  # the longest that fits: spans of several on both sides
}


def encode(response: tuple[int, ...], teacher: str) -> list[str]:
    """Return the teacher's tokens of a response; the end of a turn is written as `.`."""
    words = TEACHERS[teacher]
    end = ["."] if response[-1] == STOP else []
    text = [TEXT[y] for y in response if y != STOP]
    if words is None:
        return text + end
    rest, found = "".join(text), []
    while rest:
        found.append(next(word for word in words if rest.startswith(word)))
        rest = rest.removeprefix(found[-1])
    return found + end


def log_q(tokens: list[str], at: int) -> float:
    """Return the teacher's log-prob of a token behind the ones before it: any function does."""
    seed = hash_of(tokens[:at])
    z = torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return float(z.log_softmax(0)[("a", "b", "ab", "ba", "bb", ".").index(tokens[at])])


def hash_of(tokens: list[str]) -> int:
    return sum(7**i * (ord(c) - 40) for i, c in enumerate("|".join(tokens)))


def spans_of(response: tuple[int, ...], tokens: list[str]) -> list[tuple[int, int]]:
    """Return how many tokens of each side the finest common spans have."""
    spans, n, m = [], 0, 0
    ours = theirs = 0
    for y in response:
        if y == STOP:
            spans.append((1, 1))
            break
        n, ours = n + 1, ours + len(TEXT[y])
        while theirs < ours:
            theirs += len(tokens[sum(each for _, each in spans) + m])
            m += 1
        if theirs == ours:
            spans.append((n, m))
            n = m = 0
    return spans


def mean_gradient(z: Tensor, teacher: str, gamma: float) -> Tensor:
    """Return the gradient by the logits z [prefixes, 4], the mean over all responses."""
    rows: list[int] = []
    flat: dict[str, Any] = {k: [] for k in ("token", "span", "q", "m", "sequence", "position")}
    log_p = z.log_softmax(-1)
    share = []
    number = 0
    for s, response in enumerate(RESPONSES):
        tokens = encode(response, teacher)
        at = [PREFIXES.index(response[:i]) for i in range(len(response))]
        rows += at
        steps = torch.stack([log_p[r, y] for r, y in zip(at, response, strict=True)])
        share += [float(steps.sum().exp())] * len(at)
        done = 0
        for n, m in spans_of(response, tokens):
            q = sum(log_q(tokens, j) for j in range(done, done + m))
            flat["span"] += [number] * n
            flat["q"] += [q] * n
            flat["m"] += [m] * n
            done, number = done + m, number + 1
        assert done == len(tokens)
        flat["token"] += response
        flat["sequence"] += [s] * len(response)
        flat["position"] += range(len(response))
    targets = build_targets(
        token=flat["token"],
        lists=[[(y, float("-inf"), 1 << 30)] for y in flat["token"]],
        ours=[0] * len(rows),
        n_kept=[0] * len(rows),
        tail=[0.0] * len(rows),
        old=log_p[rows],
        weight=[1.0] * len(rows),
        span=flat["span"],
        span_log_q=flat["q"],
        span_row_log_q=flat["q"],
        span_tokens=flat["m"],
        sequence=flat["sequence"],
        position=flat["position"],
    )
    leaf = z.clone().requires_grad_()
    objective = parse_objective(f"span_advantage(parameter={gamma})").objective
    weight = torch.tensor(share, dtype=torch.float64)
    head = torch.eye(4).double()
    result = pack_loss(objective, leaf[rows], head, targets, n_vocab=4, row_weight=weight)
    return torch.autograd.grad(result.loss, leaf)[0]


def of_teacher(response: tuple[int, ...], teacher: str) -> float:
    tokens = encode(response, teacher)
    return sum(log_q(tokens, j) for j in range(len(tokens)))


def kl_gradient(z: Tensor, teacher: str) -> Tensor:
    """Return the gradient of KL(p || q~) over responses."""
    leaf = z.clone().requires_grad_()
    log_p, total = leaf.log_softmax(-1), torch.zeros(()).double()
    for response in RESPONSES:
        steps = [log_p[PREFIXES.index(response[:i]), y] for i, y in enumerate(response)]
        own = torch.stack(steps).sum()
        total = total + own.exp() * (own - of_teacher(response, teacher))
    return torch.autograd.grad(total, leaf)[0]


@pytest.fixture
def z() -> Tensor:
    return torch.randn(
        len(PREFIXES), 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


@pytest.mark.parametrize("teacher", TEACHERS)
def test_with_the_whole_return_it_is_the_gradient_of_the_kl_of_responses(
    z: Tensor, teacher: str
) -> None:
    found, expected = mean_gradient(z, teacher, 1.0), kl_gradient(z, teacher)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert (mean_gradient(z, teacher, 0.0) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("teacher", ["same", "bytes"])
def test_without_a_return_it_is_the_gradient_of_the_kl_of_each_span(
    z: Tensor, teacher: str
) -> None:
    """Use teachers whose spans are one token of the student: no later text decides on their end."""
    leaf = z.clone().requires_grad_()
    log_p, total = leaf.log_softmax(-1), torch.zeros(()).double()
    for r, prefix in enumerate(PREFIXES):
        steps = [log_p[PREFIXES.index(prefix[:i]), y] for i, y in enumerate(prefix)]
        reached = torch.stack([torch.zeros(()).double(), *steps]).sum().detach().exp()
        before = of_teacher(prefix, teacher) if prefix else 0.0
        every = [of_teacher((*prefix, y), teacher) - before for y in range(4)]
        q = torch.tensor(every, dtype=torch.float64)
        total = total + reached * (log_p[r].exp() * (log_p[r] - q)).sum()
    (expected,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(mean_gradient(z, teacher, 0.0), expected, rtol=0, atol=1e-10)
