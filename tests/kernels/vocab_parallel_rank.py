"""One of two ranks of a vocabulary-parallel run: `python vocab_parallel_rank.py RANK INIT OUT`.

Runs every case on this rank's columns and saves its result: none may leave a rank waiting.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from kernel_cases import list_top, make_ids
from kernel_objectives import LOSSES, Teacher, make_teacher, objective
from torch import Tensor

from logitcask.kernels.objective_input import ObjectiveFn, ObjectiveGrad, ObjectiveInput
from logitcask.kernels.vocab_parallel import (
    vocab_parallel_linear_sparse_kl,
    vocab_parallel_sparse_kl,
)

P, V, D, S, K = 5, 700, 24, 12, 6
N_VOCAB = {"even": 690, "narrow": 700, "upper first": 690, "beyond": 350}
"""Case -> ids that count."""
FIRST = {"even": (0, 350), "narrow": (0, 697), "upper first": (400, 0), "beyond": (0, 350)}
"""Case -> first column of rank 0 and of rank 1."""


def seen(loss: str, teacher: Teacher) -> ObjectiveFn:
    """Return the loss as an objective with the live top-k among its metrics."""
    plain = objective(LOSSES[loss](teacher))

    def objective_fn(view: ObjectiveInput) -> ObjectiveGrad:
        grad = plain(view)
        tops = {f"top {j}": view.top_ids[:, j].float() for j in range(K)}
        return grad._replace(metrics={**grad.metrics, **tops})

    return objective_fn


def problem(case: str, rows: int = P) -> dict[str, Any]:
    """Return equal inputs on every rank and in the test.

    hidden [P, D], weight [V, D], logits [P, V], their product, and the shared arguments. Whole
    numbers, so that logits are exact and full of ties, within shards and across.
    """
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randint(-1, 2, (P, D), generator=generator).float()
    weight = torch.randint(-1, 2, (V, D), generator=generator).float()
    hidden[:, 0], weight[:, 0] = 1.0, -40.0  # below the zeros that fill a narrow shard's message
    logits = hidden @ weight.T
    n_vocab = N_VOCAB[case]
    ids = list_top(make_ids(P, n_vocab, S), logits[:, :n_vocab], 4)
    row_weight = torch.rand(P, generator=generator)
    row_weight[2] = 0.0
    return {
        "hidden": hidden[:rows],
        "weight": weight,
        "logits": logits[:rows],
        "shared": {
            "ids": ids[:rows],
            "objective": seen("reverse_kl_overlap", make_teacher(ids)),
            "row_weight": row_weight[:rows],
            "n_vocab": n_vocab,
            "k": K,
        },
    }


def outcome(call: Callable[..., Any], inputs: list[Tensor], **options: Any) -> dict[str, Any]:
    """Return loss, row_loss, metrics and gradients of twice the loss by `inputs`; or the error."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    try:
        result = call(*inputs, **options)
    except (TypeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    grads = torch.autograd.grad(2 * result.loss, inputs)
    return {**result._replace(loss=result.loss.detach())._asdict(), "grads": grads}


def own(case: str, rank: int) -> slice:
    """Return the rank's columns."""
    first = FIRST[case][rank]
    return slice(first, min([f for f in FIRST[case] if f > first], default=V))


def both_forms(case: str, rank: int, rows: int = P, **changed: Any) -> dict[str, dict[str, Any]]:
    """Form -> outcome on this rank."""
    inputs, columns = problem(case, rows), own(case, rank)
    options = inputs["shared"] | {"first": columns.start} | changed
    logits, weight = inputs["logits"][:, columns], inputs["weight"][columns]
    return {
        "logits": outcome(vocab_parallel_sparse_kl, [logits], **options),
        "linear": outcome(vocab_parallel_linear_sparse_kl, [inputs["hidden"], weight], **options),
    }


def good(rank: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Case -> form -> outcome on this rank."""
    found = {case: both_forms(case, rank, chunk_rows=2) for case in N_VOCAB}
    return {
        **found,
        "one chunk": both_forms("narrow", rank),
        "no rows": both_forms("even", rank, 0),
    }


def bad(rank: int) -> dict[str, dict[str, Any]]:
    """Return the outcome of each fault on this rank; rank 0's call is valid by default."""
    inputs, columns = problem("even"), own("even", rank)
    logits, hidden, weight = (
        inputs["logits"][:, columns],
        inputs["hidden"],
        inputs["weight"][columns],
    )
    shared = {**inputs["shared"], "first": columns.start}
    ids = shared["ids"]
    call, linear = vocab_parallel_sparse_kl, vocab_parallel_linear_sparse_kl

    def on_one(**changed: Any) -> dict[str, Any]:
        return outcome(call, [logits], **(shared | changed if rank else shared))

    found = {
        "overlap": on_one(first=340),
        "gap": on_one(first=351),
        "n_vocab over all": outcome(call, [logits], **shared | {"n_vocab": 701}),
        "k": on_one(k=K + 1),
        "ids": on_one(ids=ids.flip(0)),
        "fewer ids": on_one(ids=ids[:, 1:]),
        "row_weight": on_one(row_weight=None),
        "chunk_rows": on_one(chunk_rows=1),
        "refused by one": on_one(ids=ids.int()),
        "refused by both": outcome(call, [logits], **shared | {"k": 0}),
        "forms": outcome(*((linear, [hidden, weight]) if rank else (call, [logits])), **shared),
    }
    with torch.set_grad_enabled(rank == 0):
        found["hidden frozen"] = outcome(linear, [hidden, weight], **shared)
    return found


def main(rank: int, init: Path, out: Path) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's name need not resolve
    dist.init_process_group(
        "gloo", init_method=init.as_uri(), rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    found = {"good": good(rank), "bad": bad(rank)}
    dist.destroy_process_group()
    torch.save(found, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
