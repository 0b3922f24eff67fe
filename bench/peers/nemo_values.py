"""Loss and gradient of NeMo-RL's distillation loss against ours.

Its own tests list ids more than once in a row (64 draws of 8), which no teacher's top-k does and
ours refuses; so its function gets lists of distinct ids here.
"""

import ours
import pytest
import torch
from nemo_rl.algorithms.loss import DistillationLossConfig, DistillationLossFn, prepare_loss_input
from values import close, gradient, rows

WEIGHT = 0.3
"""Of forward KL in the mixed kind."""
DIVERGENCES = {"forward": "forward_kl", "reverse": "reverse_kl", "mixed": "mixed_kl"}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("K", [8, 64])
@pytest.mark.parametrize("zero_outside", [False, True])
@pytest.mark.parametrize("kind", list(DIVERGENCES))
def test_distillation_loss(kind: str, zero_outside: bool, K: int, seed: int) -> None:
    if zero_outside and kind != "forward":
        pytest.skip(
            "mass outside costs 100 nats by its floor of log q = -100; ours refuses this KL"
        )
    logits, ids, log_q, weight = rows(seed, K)
    n_rows = len(ids)
    loss_fn = DistillationLossFn(
        DistillationLossConfig(kl_type=kind, mixed_kl_weight=WEIGHT, zero_outside_topk=zero_outside)
    )

    def theirs(z: torch.Tensor) -> torch.Tensor:
        # The last position predicts nothing, and the first token is no target.
        data = {
            "input_ids": torch.zeros(1, n_rows + 1, dtype=torch.int64, device=z.device),
            "input_lengths": torch.tensor([n_rows + 1]),
            "token_mask": torch.cat([weight.new_ones(1), weight])[None],
            "sample_mask": torch.ones(1, device=z.device),
            "teacher_topk_logits": torch.cat([log_q, log_q[-1:]])[None],
            "teacher_topk_indices": torch.cat([ids, ids[-1:]])[None],
        }
        wide = torch.cat([z, z[-1:].detach()])[None]
        inputs, data = prepare_loss_input(wide, data, loss_fn)
        one = torch.tensor(1.0)
        return loss_fn(data=data, global_valid_seqs=one, global_valid_toks=one, **inputs)[0]

    loss = ours.objective(
        DIVERGENCES[kind], K, "zero" if zero_outside else "renormalize",
        WEIGHT if kind == "mixed" else None,
    )  # fmt: skip

    def mine(z: torch.Tensor) -> torch.Tensor:
        return ours.from_logits(z, ours.targets(ids, log_q), loss, weight).loss

    close(gradient(mine, logits), gradient(theirs, logits))
