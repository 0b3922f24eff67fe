"""Loss and gradient of DistillKit's sparse losses against ours: its suite has no test of one."""

import ours
import pytest
import torch
from distillkit.lossfuncs.jsd import sparse_js_div
from distillkit.lossfuncs.kl import dense_kl_div, sparse_kl_div
from distillkit.missing_probability import MissingProbabilityHandling as Missing
from values import close, gradient, rows

THEIRS = {"forward_kl": sparse_kl_div, "jsd": sparse_js_div}
TAILS = {Missing.SYMMETRIC_UNIFORM: "bucket", Missing.ZERO: "zero"}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("missing", list(TAILS))
@pytest.mark.parametrize("divergence", list(THEIRS))
def test_sparse(divergence: str, missing: Missing, temperature: float, seed: int) -> None:
    if missing == Missing.SYMMETRIC_UNIFORM and temperature != 1:
        pytest.skip("at another temperature it guesses the teacher's mass outside; no cache has it")
    logits, ids, log_q, weight = rows(seed)

    def theirs(z: torch.Tensor) -> torch.Tensor:
        return THEIRS[divergence](
            z[None], ids[None], log_q[None], mask=weight[None], missing=missing,
            temperature=temperature,
        )  # fmt: skip

    loss = ours.objective(
        divergence, ids.shape[1], TAILS[missing], 0.5 if divergence == "jsd" else None
    )
    teacher = log_q / temperature if missing == Missing.ZERO else log_q

    def mine(z: torch.Tensor) -> torch.Tensor:
        return ours.from_logits(z, ours.targets(ids, teacher), loss, weight, temperature).loss

    close(gradient(mine, logits), gradient(theirs, logits))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dense(temperature: float, seed: int) -> None:
    logits, _, _, weight = rows(seed)
    teacher = logits.flip(0)
    loss = ours.objective("forward_kl", logits.shape[1])
    log_q = (teacher / temperature).log_softmax(-1)

    def theirs(z: torch.Tensor) -> torch.Tensor:
        return dense_kl_div(z[None], teacher[None], mask=weight[None], temperature=temperature)

    def mine(z: torch.Tensor) -> torch.Tensor:
        return ours.from_logits(z, ours.whole_vocabulary(log_q), loss, weight, temperature).loss

    close(gradient(mine, logits), gradient(theirs, logits))
