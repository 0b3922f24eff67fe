"""Assignment of sequences to packs, and the order of the packs, fixed before training starts.

A plan is a pure function of the snapshot, the names, the seed, the epochs and the pack length. So
the same call gives the same packs on any number of processes, also after additions to the store,
and a resumed run compares one digest to continue with the same data.
"""

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from logitcask.engine.errors import ConfigError
from logitcask.engine.models.identity import digest
from logitcask.engine.types import PACK_LENGTH, Array

WINDOW_BYTES = 512 << 20
"""Bytes of the decoded units whose sequences are shuffled together. Fewer mix less, more need more
memory: while one window is read, the next is decoded."""

PACKS = 64
"""Full packs of an epoch, where their length follows from the data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of every sequence of one segment."""

    seg_id: str
    prompt_ids: tuple[str, ...]
    """[M] ids of the prompts, for messages."""
    seq_prompt: Array
    """[N] index into prompt_ids."""
    prompt: Array
    """[N] prompt tokens."""
    response: Array
    """[N] response tokens."""
    size_bytes: int = 0
    """Bytes of the decoded segment and its scores."""


def default_pack_length(lengths: Sequence[Lengths]) -> int:
    """Return 1/PACKS of the tokens, at least the longest sequence and at most PACK_LENGTH.

    A pack is an update by default: one of PACK_LENGTH would hold a small store whole.
    """
    tokens = [s.prompt + s.response for s in lengths]
    share = -(-sum(int(each.sum()) for each in tokens) // PACKS)
    longest = max((int(each.max(initial=1)) for each in tokens), default=1)
    return min(max(longest, share), PACK_LENGTH)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanKey:
    """Inputs of a plan, except the segments."""

    snapshot: int
    snapshot_sha256: str
    rollouts: str
    teacher: str
    seed: int
    epochs: int
    pack_length: int
    """Tokens of a pack at most, prompts included."""
    window_bytes: int = WINDOW_BYTES
    """Bytes of units shuffled together; a larger unit is a window by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Segments that are decoded together, and the packs of their sequences."""

    ordinals: tuple[int, ...]
    end: int
    """Index after that of its last pack."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlan:
    """Packs of all epochs, in training order."""

    key: PlanKey
    members: Array
    """[sequences x epochs, 2] int64: (segment ordinal, sequence), pack after pack."""
    offsets: Array
    """[packs + 1] int64: pack i has members offsets[i] : offsets[i + 1]."""
    windows: tuple[Window, ...]
    longest: int
    """Tokens of the longest sequence, prompt included."""
    digest: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pack(self, index: int) -> Array:
        """Return the [n, 2] members of a pack; none after the last pack, to pad the last update."""
        if index >= len(self):
            return self.members[:0]
        return self.members[self.offsets[index] : self.offsets[index + 1]]

    def window(self, index: int) -> int:
        """Return the window of a pack; the number of windows after the last pack."""
        return bisect.bisect_left(self.windows, index, key=lambda window: window.end - 1)


def make_plan(key: PlanKey, lengths: Sequence[Lengths]) -> PackPlan:
    """Shuffle the segments, and shuffle and pack the sequences of each window of them.

    Packing is first-fit-decreasing, and equal lengths keep their shuffled order; packs of a window
    are shuffled too. Sequences without a response token are left out. Raises ConfigError for a
    sequence longer than a pack.
    """
    for segment in lengths:
        _check_fits(segment, key.pack_length)
    packs: list[Array] = []
    windows: list[Window] = []
    for epoch in range(key.epochs):
        rng = np.random.default_rng([key.seed, epoch])
        order = rng.permutation(len(lengths)).tolist()
        for chosen in _windows(order, [lengths[i].size_bytes for i in order], key.window_bytes):
            packs += _pack(_sequences(lengths, chosen), key.pack_length, rng)
            windows.append(Window(ordinals=tuple(chosen), end=len(packs)))
    members = np.concatenate([np.zeros((0, 2), np.int64), *packs])
    offsets = np.cumsum([0, *map(len, packs)], dtype=np.int64)
    content = hashlib.sha256(members.astype("<i8").tobytes() + offsets.astype("<i8").tobytes())
    inputs = asdict(key)
    # The keys under which the digests of earlier runs were taken.
    inputs["tokens_per_batch"] = inputs.pop("pack_length")
    inputs["pin"], inputs["pin_sha256"] = inputs.pop("snapshot"), inputs.pop("snapshot_sha256")
    return PackPlan(
        key=key,
        members=members,
        offsets=offsets,
        windows=tuple(windows),
        longest=max((int((s.prompt + s.response).max(initial=0)) for s in lengths), default=0),
        digest=digest(
            {
                "key": inputs,
                "segments": [segment.seg_id for segment in lengths],
                "rows": content.hexdigest(),
            }
        ),
    )


def windows_at_most(total_bytes: int, window_bytes: int = WINDOW_BYTES) -> int:
    """Return the maximum number of windows of units of `total_bytes`.

    Two consecutive windows together exceed `window_bytes`.
    """
    return 2 * (total_bytes // window_bytes) + 1


def _windows(order: list[int], sizes: list[int], most: int) -> Iterator[list[int]]:
    """Cut `order` into windows of at most `most` bytes, or of one larger unit."""
    window: list[int] = []
    total = 0
    for ordinal, size in zip(order, sizes, strict=True):
        if window and total + size > most:
            yield window
            window, total = [], 0
        window.append(ordinal)
        total += size
    if window:
        yield window


def _check_fits(segment: Lengths, budget: int) -> None:
    total = segment.prompt + segment.response
    if len(total) and total.max() > budget:
        worst = int(total.argmax())
        prompt_id = segment.prompt_ids[int(segment.seq_prompt[worst])]
        raise ConfigError(
            f"a response to prompt {prompt_id!r} has {total[worst]} tokens with its prompt, over "
            f"pack_length = {budget}, and a sequence never spans packs",
            hint=f"--pack-length {total[worst]} or more",
        )


def _sequences(lengths: Sequence[Lengths], chosen: list[int]) -> Array:
    """Return [n, 3] (segment ordinal, sequence, tokens) of the sequences with a response."""
    parts = []
    for ordinal in chosen:
        segment = lengths[ordinal]
        sequence = np.flatnonzero(segment.response > 0)
        tokens = (segment.prompt + segment.response)[sequence]
        parts.append(np.stack([np.full_like(sequence, ordinal), sequence, tokens], 1))
    return np.concatenate(parts).astype(np.int64)


def _pack(sequences: Array, budget: int, rng: np.random.Generator) -> list[Array]:
    """Return the members [n, 2] of each pack, in a shuffled order."""
    shuffled = sequences[rng.permutation(len(sequences))]
    longest_first = shuffled[np.argsort(-shuffled[:, 2], kind="stable")]
    room = np.full(len(sequences) + 1, budget, np.int64)
    pack_of = np.zeros(len(sequences), np.int64)
    used = 0
    for i, tokens in enumerate(longest_first[:, 2]):
        # room[used] is an empty pack, so one always fits.
        pack_of[i] = np.argmax(room[: used + 1] >= tokens)
        room[pack_of[i]] -= tokens
        used = max(used, int(pack_of[i]) + 1)
    by_pack = np.argsort(pack_of, kind="stable")
    cuts = np.flatnonzero(np.diff(pack_of[by_pack])) + 1
    packs = np.split(longest_first[by_pack, :2], cuts) if used else []
    return [packs[i] for i in rng.permutation(len(packs))]
