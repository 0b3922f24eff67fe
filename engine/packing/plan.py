"""Which sequences share a packed row, and in which order rows come: fixed before training starts.

A plan is a pure function of the snapshot, the names, the seed, the epochs and the token budget. So
the same call gives the same rows on any number of processes, whatever was added to the store since,
and a resumed run can prove by one digest that it goes on with the same data.
"""

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from logitcask.engine.errors import ConfigError
from logitcask.engine.models.identity import digest
from logitcask.engine.types import Array

WINDOW_BYTES = 512 << 20
"""Of the decoded units whose sequences are shuffled together. A smaller one mixes less, a larger
one wants more memory: while one window is read, the next is decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of every sequence of one segment; all that a plan knows of it."""

    seg_id: str
    prompt_ids: tuple[str, ...]
    """[M] the prompts' ids, for messages."""
    seq_prompt: Array
    """[N] index into prompt_ids."""
    prompt: Array
    """[N] prompt tokens."""
    response: Array
    """[N] response tokens."""
    size_bytes: int = 0
    """Of the segment and its scores, decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanKey:
    """Everything that a plan depends on beside the segments themselves."""

    snapshot: int
    snapshot_sha256: str
    rollouts: str
    teacher: str
    seed: int
    epochs: int
    pack_length: int
    """Tokens of a row at most, prompts included."""
    window_bytes: int = WINDOW_BYTES
    """Decoded units that are shuffled together; one that is larger is a window of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Segments that are decoded together, and the rows that are made of them."""

    ordinals: tuple[int, ...]
    end: int
    """The row behind its last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlan:
    """Rows of all epochs, in training order."""

    key: PlanKey
    members: Array
    """[sequences x epochs, 2] int64: (segment ordinal, sequence), row after row."""
    row_off: Array
    """[rows + 1] int64: row i owns members row_off[i] : row_off[i + 1]."""
    windows: tuple["Window", ...]
    """In order."""
    digest: str

    def __len__(self) -> int:
        return len(self.row_off) - 1

    def row(self, index: int) -> Array:
        """[n, 2] members of a row; none beyond the last row, which pads the last update."""
        if index >= len(self):
            return self.members[:0]
        return self.members[self.row_off[index] : self.row_off[index + 1]]

    def window(self, index: int) -> int:
        """Which window a row is of; the number of windows beyond the last row."""
        return bisect.bisect_left(self.windows, index, key=lambda window: window.end - 1)


def make_plan(key: PlanKey, lengths: Sequence[Lengths]) -> PackPlan:
    """Segments in a drawn order; in each window of them the sequences are shuffled and packed.

    Packing is first-fit-decreasing, and equal lengths keep their drawn order; rows of a window are
    shuffled too. Sequences without a response token are left out. Raises ConfigError for a sequence
    that no row can hold.
    """
    for segment in lengths:
        _check_fits(segment, key.pack_length)
    rows: list[Array] = []
    windows: list[Window] = []
    for epoch in range(key.epochs):
        rng = np.random.default_rng([key.seed, epoch])
        order = rng.permutation(len(lengths)).tolist()
        for chosen in _windows(order, [lengths[i].size_bytes for i in order], key.window_bytes):
            rows += _pack(_sequences(lengths, chosen), key.pack_length, rng)
            windows.append(Window(ordinals=tuple(chosen), end=len(rows)))
    flat = np.concatenate([np.zeros((0, 2), np.int64), *rows])
    row_off = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    content = hashlib.sha256(flat.astype("<i8").tobytes() + row_off.astype("<i8").tobytes())
    inputs = asdict(key)
    # The keys under which the digests of earlier runs were taken.
    inputs["pin"], inputs["pin_sha256"] = inputs.pop("snapshot"), inputs.pop("snapshot_sha256")
    inputs["tokens_per_batch"] = inputs.pop("pack_length")
    name = digest(
        {
            "key": inputs,
            "segments": [segment.seg_id for segment in lengths],
            "rows": content.hexdigest(),
        }
    )
    return PackPlan(key=key, members=flat, row_off=row_off, windows=tuple(windows), digest=name)


def windows_at_most(total_bytes: int, window_bytes: int = WINDOW_BYTES) -> int:
    """How many windows units of so many bytes together can make: two in a row exceed one."""
    return 2 * (total_bytes // window_bytes) + 1


def _windows(order: list[int], sizes: list[int], most: int) -> Iterator[list[int]]:
    """`order` cut where the next unit would be too much."""
    window: list[int] = []
    held = 0
    for ordinal, size in zip(order, sizes, strict=True):
        if window and held + size > most:
            yield window
            window, held = [], 0
        window.append(ordinal)
        held += size
    if window:
        yield window


def _check_fits(segment: Lengths, budget: int) -> None:
    total = segment.prompt + segment.response
    if len(total) and total.max() > budget:
        worst = int(total.argmax())
        prompt_id = segment.prompt_ids[int(segment.seq_prompt[worst])]
        raise ConfigError(
            f"a response to prompt {prompt_id!r} has {total[worst]} tokens with its prompt, over "
            f"pack_length = {budget}, and a sequence never spans rows",
            hint=f"--pack-length {total[worst]} or more",
        )


def _sequences(lengths: Sequence[Lengths], chosen: list[int]) -> Array:
    """[n, 3] (segment ordinal, sequence, tokens) of the sequences that have a response."""
    parts = []
    for ordinal in chosen:
        segment = lengths[ordinal]
        sequence = np.flatnonzero(segment.response > 0)
        tokens = (segment.prompt + segment.response)[sequence]
        parts.append(np.stack([np.full_like(sequence, ordinal), sequence, tokens], 1))
    return np.concatenate(parts).astype(np.int64)


def _pack(sequences: Array, budget: int, rng: np.random.Generator) -> list[Array]:
    shuffled = sequences[rng.permutation(len(sequences))]
    longest_first = shuffled[np.argsort(-shuffled[:, 2], kind="stable")]
    room = np.full(len(sequences) + 1, budget, np.int64)
    row_of = np.zeros(len(sequences), np.int64)
    used = 0
    for i, tokens in enumerate(longest_first[:, 2]):
        # room[used] is an untouched row, so something always fits.
        row_of[i] = np.argmax(room[: used + 1] >= tokens)
        room[row_of[i]] -= tokens
        used = max(used, int(row_of[i]) + 1)
    by_row = np.argsort(row_of, kind="stable")
    cuts = np.flatnonzero(np.diff(row_of[by_row])) + 1
    rows = np.split(longest_first[by_row, :2], cuts) if used else []
    return [rows[i] for i in rng.permutation(len(rows))]
