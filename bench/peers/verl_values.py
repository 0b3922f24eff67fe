"""Loss, gradient and overlap of verl's truncated forward KL against ours."""

from types import SimpleNamespace

import ours
import pytest
import torch
from values import close, gradient, rows
from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("K", [1, 16, 64])
@pytest.mark.parametrize("chunked", [False, True])
def test_forward_kl_topk(chunked: bool, K: int, seed: int) -> None:
    logits, ids, log_q, weight = rows(seed, K)
    config = SimpleNamespace(
        distillation_loss=SimpleNamespace(
            log_prob_min_clamp=None, use_chunked_topk=chunked, chunked_topk_chunk_size=3
        )
    )
    ends = torch.tensor([0, len(ids)], device=ids.device)

    def output(z: torch.Tensor) -> dict[str, torch.Tensor]:
        return compute_forward_kl_topk(
            student_logits=z[None],
            teacher_topk_log_probs=torch.nested.nested_tensor_from_jagged(log_q, offsets=ends),
            teacher_topk_ids=torch.nested.nested_tensor_from_jagged(ids, offsets=ends),
            config=config,
            data_format="thd",
        )

    def theirs(z: torch.Tensor) -> torch.Tensor:
        return (weight * output(z)["distillation_losses"][0]).sum()

    loss = ours.objective("forward_kl", K, "ignore")

    def mine(z: torch.Tensor) -> torch.Tensor:
        return ours.from_logits(z, ours.targets(ids, log_q), loss, weight).loss

    close(gradient(mine, logits), gradient(theirs, logits))
    if K == 16:  # the k of our metrics
        metrics = ours.from_logits(logits, ours.targets(ids, log_q), loss).metrics
        assert torch.equal(
            (metrics["overlap/ratio"] * K).round(), output(logits)["overlap_count"][0]
        )
