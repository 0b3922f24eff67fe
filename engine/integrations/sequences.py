"""The scored sequences of a store, found by their exact token ids, or those of their prompt.

The index has 32 bytes a sequence: two hashes, and its number next to each. Ids of equal hash are
compared whole, so an answer is never that of another sequence.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.integrations.stored import check_topk, open_stored
from logitcask.engine.store import open_store
from logitcask.engine.types import Array

_TOKENS = (
    "prompt_offsets",
    "prompt_tokens",
    "prompt_index",
    "response_offsets",
    "response_tokens",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSequence:
    """A sequence of L tokens, R of them the response; log-probs in nats, at temperature 1."""

    ids: Array
    """[L] int64, the prompt first."""
    prompt: int
    """Tokens of the prompt."""
    mask: Array
    """[R] bool, the response tokens with a loss."""
    topk_ids: Array
    """[R, K] int64, the teacher's best ids at each response position, best first."""
    topk_logprobs: Array
    """[R, K] float32."""
    teacher_logprobs: Array
    """[R] float32, at the response's own tokens."""
    behavior_logprobs: Array
    """[R] float32, of the distribution that the response was drawn from; NaN = not recorded."""
    reward: float | None
    """None where the store has no rewards."""


class StoredSequences:
    """The sequences of a store with a teacher's scores: by number, and by their ids."""

    def __init__(
        self,
        store: str | Path,
        *,
        k: int,
        rollouts: str | None = None,
        teacher: str | None = None,
        snapshot: int | str | None = None,
    ) -> None:
        """Open a store, as `open_stored`.

        k: ids of the teacher at each position; 0 = only the response's own tokens. Reads all ids
        once, and keeps none. Raises ObjectiveError where the scores have fewer ids than k, or do
        not have all positions.
        """
        self._source, self._members = open_stored(store, rollouts, teacher, snapshot)
        check_topk(self._source, k)
        if coverage := self._source.coverage():
            raise ObjectiveError(
                f"the teacher's scores have {coverage}, and this trainer needs them all",
                hint="score the rest: `logitcask score` with another name, for all positions",
            )
        self._k = k
        hashes = np.zeros((len(self._members), 2), np.uint64)
        reader, at = open_store(store), 0
        for unit, (segment, _) in enumerate(self._source.pairs):
            arrays = reader.read_arrays(segment, _TOKENS)
            prompts = _split(arrays["prompt_tokens"], arrays["prompt_offsets"])
            responses = _split(arrays["response_tokens"], arrays["response_offsets"])
            for sequence in self._members[self._members[:, 0] == unit, 1]:
                prompt = prompts[int(arrays["prompt_index"][sequence])]
                whole = np.concatenate([prompt, responses[sequence]])
                hashes[at] = _hash(whole), _hash(prompt)
                at += 1
        self._whole, self._prompts = (_Index(each) for each in hashes.T)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, number: int) -> StoredSequence:
        """Return sequence `number`, from 0 in the order of the store.

        Raises ObjectiveError where its teacher kept fewer ids than k, IndexError for no sequence.
        """
        if not 0 <= number < len(self):
            raise IndexError(number)
        pack = self._source.pack(self._members[number : number + 1])
        targets, rows = pack.targets, len(pack.targets)
        if int(targets.n_kept.min()) < self._k:
            raise ObjectiveError(
                f"sequence {number} has {int(targets.n_kept.min())} exact ids of the teacher at a "
                f"position, and k is {self._k}",
                hint="give a smaller k, or score again with a larger --teacher-topk-min",
            )
        ids = np.full((rows, self._k), -1, np.int64)
        logprobs = np.full((rows, self._k), -np.inf, np.float32)
        rank = targets.q_rank.numpy()
        row, column = np.nonzero(rank < self._k)
        ids[row, rank[row, column]] = targets.ids.numpy()[row, column]
        logprobs[row, rank[row, column]] = targets.q_log_p.numpy()[row, column]
        tokens = pack.input_ids[0].numpy()
        return StoredSequence(
            ids=tokens,
            prompt=len(tokens) - rows,
            mask=targets.weight.numpy() > 0,
            topk_ids=ids,
            topk_logprobs=logprobs,
            teacher_logprobs=targets.teacher_logprobs.numpy(),
            behavior_logprobs=targets.behavior_logprobs.numpy(),
            reward=None if targets.reward is None else float(targets.reward[0]),
        )

    def find(self, ids: Sequence[int] | Array) -> StoredSequence | None:
        """Return the sequence of exactly these ids [L], prompt and response; None if there is none.

        Of several with the same ids it is the first.
        """
        key_ids = np.asarray(ids, np.int64)
        for number in self._whole.numbers(key_ids):
            found = self[number]
            if np.array_equal(found.ids, key_ids):
                return found
        return None

    def of_prompt(self, ids: Sequence[int] | Array) -> list[int]:
        """Return the numbers of the sequences whose prompt has exactly these ids, in order."""
        key_ids = np.asarray(ids, np.int64)
        return [
            number
            for number in self._prompts.numbers(key_ids)
            if np.array_equal((found := self[number]).ids[: found.prompt], key_ids)
        ]


class _Index:
    """Numbers by hash, sorted: 16 bytes each."""

    def __init__(self, hashes: Array) -> None:
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def numbers(self, ids: Array) -> list[int]:
        """Return the numbers of this hash, in order."""
        key = _hash(ids)
        first, last = (int(np.searchsorted(self._hashes, key, s)) for s in ("left", "right"))
        return [int(each) for each in self._order[first:last]]


def _hash(ids: Array) -> np.uint64:
    """Return a 64-bit hash of token ids [L]."""
    digest = hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _split(flat: Array, offsets: Array) -> list[Array]:
    return np.split(flat, offsets[1:-1])
