"""NeMo-RL's distillation from a store: no teacher is loaded, and no server samples.

    stored = StoreTeacher("./store", k=64)
    distillation_train(student_policy, stored, StoreGeneration(stored), dataloader, ...)

Facts of NVIDIA-NeMo/RL at 7ea279ab: `distillation_train` (nemo_rl/algorithms/distillation.py) calls
three methods of its teacher policy. `get_topk_logits` (models/policy/lm_policy.py) gives [B, S, k]
where row i is about token i + 1; `get_distillation_topk_logprobs_from_logits`
(distributed/model_utils.py) drops the last row, and normalises the k values by log_softmax: stored
log-probs differ from logits by a constant of the row, which that takes away. Of its generation it
calls three too, in `generate_responses` (experience/rollouts.py), and a weight synchronizer
(`refit_policy_generation` in algorithms/grpo.py).
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.integrations.sequences import StoredSequences


class StoreTeacher:
    """A teacher policy of NeMo-RL whose answers are the scores of a store, by exact ids."""

    def __init__(
        self,
        store: str | Path,
        *,
        k: int,
        rollouts: str | None = None,
        teacher: str | None = None,
        snapshot: int | str | None = None,
    ) -> None:
        """Open a store, as StoredSequences, whose errors are raised.

        k: as `distillation.topk_logits_k` of NeMo-RL.
        """
        self.stored = StoredSequences(
            store, k=k, rollouts=rollouts, teacher=teacher, snapshot=snapshot
        )
        self._k = k

    def prepare_for_lp_inference(self) -> None:
        """Do nothing: no model comes to the GPU."""

    def offload_after_refit(self) -> None:
        """Do nothing: no model leaves the GPU."""

    def get_topk_logits(
        self,
        data: Mapping[str, Any],
        k: int,
        micro_batch_size: int | None = None,
        timer: Any = None,
    ) -> dict[str, torch.Tensor]:
        """Return topk_logits float32 and topk_indices int64, [B, S, k], of B padded sequences.

        data: input_ids [B, S], input_lengths [B], and token_mask [B, S] where tokens with a loss
        are 1. A row without one needs no answer. After the last of them come the tokens of
        NeMo-RL's environment, which the store need not have. Rows that the store has no scores of
        are zeros, and none of them has a loss. Raises IncompleteError for a sequence that is not in
        the store, or has a loss at a token before the stored response; ConfigError for another k.
        """
        if k != self._k:
            raise ConfigError(
                f"NeMo-RL wants {k} ids, and this teacher was opened with k = {self._k}",
                hint="give StoreTeacher the k of distillation.topk_logits_k",
            )
        input_ids, lengths = (data[name].cpu().numpy() for name in ("input_ids", "input_lengths"))
        mask = data["token_mask"].cpu().numpy()
        ids = np.zeros((*input_ids.shape, k), np.int64)
        logprobs = np.zeros(ids.shape, np.float32)
        for row, length in enumerate(lengths):
            trained = np.flatnonzero(mask[row, :length])
            if not len(trained):
                continue
            ends = dict.fromkeys((int(length), int(trained[-1]) + 1))
            found = next(
                filter(None, (self.stored.find(input_ids[row, :end]) for end in ends)), None
            )
            if found is None:
                raise IncompleteError(
                    f"row {row}: no sequence of the store has these {' or '.join(map(str, ends))} "
                    "token ids",
                    hint="sampled responses are new ones: give NeMo-RL those of the store, "
                    "StoreGeneration",
                )
            if trained[0] < found.prompt:
                raise IncompleteError(
                    f"row {row} has a loss at token {trained[0]}, and its stored response begins "
                    f"at token {found.prompt}",
                    hint="give NeMo-RL the prompts that the rollouts were sampled from",
                )
            rows = slice(found.prompt - 1, len(found.ids) - 1)
            ids[row, rows], logprobs[row, rows] = found.topk_ids, found.topk_logprobs
        return {"topk_logits": torch.from_numpy(logprobs), "topk_indices": torch.from_numpy(ids)}


class StoreGeneration:
    """A generation of NeMo-RL that returns stored responses, found by the ids of the prompt.

    A prompt with several responses gives one after the other, and then the first again.
    """

    def __init__(self, teacher: StoreTeacher) -> None:
        """Read the store of a teacher."""
        self._stored = teacher.stored
        self._used: Counter[int] = Counter()
        self.weight_synchronizer = self

    def prepare_for_generation(self, *_: Any, **__: Any) -> bool:
        """Do nothing: no engine wakes up."""
        return True

    def finish_generation(self, *_: Any, **__: Any) -> bool:
        """Do nothing: no engine sleeps."""
        return True

    def sync_weights(self, *_: Any, **__: Any) -> dict[str, float]:
        """Do nothing: stored responses have the version that sampled them."""
        return {}

    def generate(self, data: Mapping[str, Any], greedy: bool = False) -> dict[str, torch.Tensor]:
        """Return stored responses to B prompts.

        data: input_ids [B, S] right-padded, input_lengths [B]. Returns output_ids [B, L] int64,
        padded with zeros, generation_lengths and unpadded_sequence_lengths [B] int64. Raises
        IncompleteError for a prompt that is not in the store.
        """
        found = []
        for row, length in enumerate(data["input_lengths"].tolist()):
            numbers = self._stored.of_prompt(data["input_ids"][row, :length].cpu().numpy())
            if not numbers:
                raise IncompleteError(
                    f"prompt {row} of the batch, of {length} tokens, is not in the store",
                    hint="give NeMo-RL the prompts and the chat template that the rollouts were "
                    "sampled with, and switch its validation off",
                )
            found.append(self._stored[numbers[self._used[numbers[0]] % len(numbers)]])
            self._used[numbers[0]] += 1
        output = torch.zeros(len(found), max(len(each.ids) for each in found), dtype=torch.int64)
        for row, each in enumerate(found):
            output[row, : len(each.ids)] = torch.from_numpy(each.ids)
        return {
            "output_ids": output,
            "generation_lengths": torch.tensor([len(e.ids) - e.prompt for e in found]),
            "unpadded_sequence_lengths": torch.tensor([len(e.ids) for e in found]),
        }
