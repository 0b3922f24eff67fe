"""TRL's AsyncDistillationTrainer fed from a store: no vLLM, no teacher.

    worker = StoreRolloutWorker("./store", k=64)
    trainer = AsyncDistillationTrainer(
        model, args, train_dataset=prompts, rollout_worker=worker, weight_transfer=NoWeights()
    )

The trainer is TRL's own, unchanged: it reads stored sequences from the queue into which its worker
would put new ones. Set `max_staleness` of its config to more than its updates, since the rollouts
do not get newer, and `token_budget`, which it would ask a server for.
"""

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.engine.errors import IncompleteError
from logitcask.engine.integrations.stored import check_topk, open_stored
from logitcask.engine.packing.source import Pack
from logitcask.engine.types import Array

AHEAD = 256
"""Sequences that wait in the queue, at most."""


class StoreRolloutWorker:
    """A rollout worker of TRL whose samples are the sequences of a store, in random order."""

    def __init__(
        self,
        store: str | Path,
        *,
        k: int,
        sampled_token: bool = True,
        rollouts: str | None = None,
        teacher: str | None = None,
        snapshot: int | str | None = None,
        epochs: int = 1,
        seed: int = 0,
    ) -> None:
        """Open a store, as `open_stored`.

        k: ids of the teacher's top-k of each position, as `teacher_top_k` of TRL's config.
        sampled_token: also the sampled token, as TRL's own worker; False = the top-k alone, whose
        loss with beta = 0 and the tail bucket is our forward_kl. epochs: passes over the store.
        Raises ObjectiveError where the scores have fewer ids than k.
        """
        self._source, self._members = open_stored(store, rollouts, teacher, snapshot)
        check_topk(self._source, k)
        self._k, self._sampled, self._epochs, self._seed = k, sampled_token, epochs, seed
        self._stopped, self._thread = threading.Event(), threading.Thread(target=self._fill)
        self._failure: BaseException | None = None
        self.rollout_buffer: queue.Queue[Any] = queue.Queue(maxsize=AHEAD)
        self.metrics_queue: queue.Queue[Any] = queue.Queue()

    def __len__(self) -> int:
        return len(self._members) * self._epochs

    def start(self) -> None:
        """Begin to fill the queue."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread that fills the queue."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def update_model_version(self, model_version: int) -> None:
        """Ignore it: stored sequences have the version that sampled them."""

    def check_health(self, stale_after_s: float) -> None:
        """Raise IncompleteError where the store is used up, and the error of its reading."""
        if self._failure is not None:
            raise self._failure
        if not self._thread.is_alive() and self.rollout_buffer.empty():
            raise IncompleteError(
                f"the trainer wants more than the {len(self)} sequences of {self._epochs} epochs",
                hint="give a larger `epochs`, or fewer max_steps",
            )

    def _fill(self) -> None:
        try:
            for sample in self._samples():
                while not self._stopped.is_set():
                    with suppress(queue.Full):
                        self.rollout_buffer.put(sample, timeout=0.1)
                        break
        except BaseException as error:  # raised again by check_health, in the trainer's thread
            self._failure = error

    def _samples(self) -> Iterator[Any]:
        from trl.experimental.async_distillation.async_rollout_worker import RolloutSample

        rng = np.random.default_rng(self._seed)
        for epoch in range(self._epochs):
            for index in rng.permutation(len(self._members)):
                if self._stopped.is_set():
                    return
                pack = self._source.pack(self._members[index : index + 1])
                ids, logprobs, mask = self._columns(pack)
                yield RolloutSample(
                    prompt=[],
                    completion=[],
                    input_ids=pack.input_ids[0].numpy(),
                    completion_mask=mask,
                    teacher_topk_ids=ids,
                    teacher_topk_logprobs=logprobs,
                    model_version=0,
                    metrics={},
                    teacher_id="default",
                    prompt_id=epoch * len(self._members) + int(index),
                )

    def _columns(self, pack: Pack) -> tuple[Array, Array, Array]:
        """Return the teacher's ids [L, k + 1], their log-probs, and the loss mask [L].

        Entry i is about predicting token i. -1 and -inf pad.
        """
        length, targets = pack.input_ids.shape[1], pack.targets
        ids = np.full((length, self._k + 1), -1, np.int64)
        logprobs = np.full((length, self._k + 1), -np.inf, np.float32)
        mask = np.zeros(length, np.int64)
        at = (pack.predict_at + 1).numpy()
        mask[at] = (targets.weight > 0).numpy()
        rank, columns = targets.q_rank.numpy(), targets.ids.numpy()
        row, column = np.nonzero(rank < self._k)
        ids[at[row], rank[row, column]] = columns[row, column]
        logprobs[at[row], rank[row, column]] = targets.q_log_p.numpy()[row, column]
        if self._sampled:
            outside = (ids[at] != targets.token.numpy()[:, None]).all(1)
            ids[at[outside], self._k] = targets.token.numpy()[outside]
            logprobs[at[outside], self._k] = targets.teacher_logprobs.numpy()[outside]
        return ids, logprobs, mask


class NoWeights:
    """A weight transfer of TRL that sends nothing: no sampler waits for weights."""

    def init_weight_transfer(self) -> None: ...

    def pause(self) -> None: ...

    def send_weights(self, iterator: Iterator[Any]) -> None:
        """Use the iterator up, as its gathers need every process."""
        for _ in iterator:
            pass

    def resume(self) -> None: ...

    def destroy(self) -> None: ...
