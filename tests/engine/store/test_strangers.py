"""An untrusted store with matching digests: bounds of memory, and checks of values."""

import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numcodecs import blosc

import logitcask.engine.store.store as opened
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store import open_store
from logitcask.engine.store.format import checks, codecs, ragged, rollouts, schema
from logitcask.engine.store.format import layouts as layout
from logitcask.engine.store.format.entry import sha256
from logitcask.engine.store.log.lines import decode_sealed
from logitcask.engine.store.merge import pack, unpack
from logitcask.engine.store.verify import verify
from tests.engine.store.made import (
    ROLLOUT_PROVENANCE,
    commit_rollouts,
    commit_scores,
    key,
    make_rollouts,
    make_scores,
)

DEFAULT = codecs.profile("default")


def test_a_blosc_frame_reads_no_memory_but_its_own() -> None:
    """Refuse 16 bytes that claim to hold 4 KiB: blosc would read the memory behind them."""
    leaking = bytes([2, 1, 0x02, 1]) + b"".join(
        size.to_bytes(4, "little") for size in (4096, 4096, 4096 + 16)
    )
    out = np.zeros(4096, np.uint8)
    with pytest.raises(ValueError, match="a frame of other than its 16 bytes"):
        codecs.decompress("blosc", memoryview(leaking), out)
    assert not out.any()


@pytest.mark.parametrize("part", [b"[]", b'{"":{}}', b'"",[0]'])
def test_a_record_of_many_small_values_costs_less_than_its_bytes(part: bytes) -> None:
    """Refuse it before the parse, which would make about 20 bytes of each."""
    line = b"[" + b",".join([part] * (schema.MAX_RECORD_BYTES // (len(part) + 1) - 50)) + b"]"
    data = line + b'\n{"sha256":"' + sha256(line).encode() + b'"}\n'
    assert len(data) < schema.MAX_RECORD_BYTES
    tracemalloc.start()
    with pytest.raises(IntegrityError, match="JSON values, at most 300000"):
        decode_sealed(data, "log/0000000000.json")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 3 * len(data)


@pytest.mark.parametrize("codec", ["pcodec", "blosc"])
def test_no_untrusted_chunk_harms_the_process(codec: str) -> None:
    rng = random.Random(0)
    values = np.random.default_rng(0).integers(0, 50, 3000).astype(np.uint16)
    if codec == "blosc":
        sound = blosc.compress(values, b"zstd", 5, blosc.BITSHUFFLE)
    else:
        from pcodec import ChunkConfig, standalone

        sound = standalone.simple_compress(values, ChunkConfig())
    out = np.zeros_like(values)
    codecs.decompress(codec, memoryview(sound), out)
    assert np.array_equal(out, values)
    refused = 0
    for _ in range(2000):
        bad = bytearray(sound)
        for _ in range(rng.randrange(1, 4)):
            # Headers decide most.
            bad[rng.randrange(rng.choice([16, 40, len(bad)]))] = rng.randrange(256)
        try:
            codecs.decompress(codec, memoryview(bytes(bad)), out)
        except Exception:  # Whatever it is, `segment.decode` makes an IntegrityError of it.
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": lambda d: d.ids.repeat(2)[: len(d.ids)]}, "names an id twice"),
        ({"ids": lambda d: d.ids + 40}, "integers from 0 to 49"),
        ({"mult": lambda d: d.mult + (np.arange(len(d.ids)) == 0)}, "adds up to 6 on one row and"),
        ({"mult": lambda d: d.mult * 0}, "integers from 1 to 4096"),
        ({"lp": lambda d: d.lp + 9}, "a log-prob of"),
        ({"lp": lambda d: d.lp * np.nan}, "a log-prob of nan"),
        ({"mult": lambda d: d.mult[1:]}, "mult has shape"),
        ({"cnt": lambda d: d.cnt + 1}, "counts that do not add up"),
    ],
    ids=["twice", "vocabulary", "sum", "never", "positive", "nan", "short", "counts"],
)
def test_impossible_draws_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    valid = make_rollouts(1, draws=True)
    assert valid.draws is not None
    changed = {name: how(valid.draws) for name, how in change.items()}
    bad = replace(valid, draws=replace(valid.draws, **changed))
    store = open_store(tmp_path / "s", create=True)
    with pytest.raises(StoreError, match=words):
        checks.check_rollouts(bad, {"student": {"n_vocab": 50}})
    provenance = ROLLOUT_PROVENANCE | {"student": {"base_weights": "sha256:root", "n_vocab": 50}}
    with pytest.raises(StoreError, match=words):
        store.commit_rollouts(
            bad,
            name="main",
            unit_key=key(1),
            unit={"version": 0, "first": 0},
            provenance=provenance,
        )
    assert not store.head().segments


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -0.25, 1.0001])
def test_an_invalid_reward_is_refused(tmp_path: Path, wrong: float) -> None:
    valid = make_rollouts(1, reward=True)
    assert valid.reward is not None
    bad = valid.reward.copy()
    bad[1] = wrong
    with pytest.raises(StoreError, match=r"rollouts\.reward holds .* in \[0, 1\]"):
        checks.check_rollouts(replace(valid, reward=bad), {})
    with pytest.raises(StoreError, match=r"reward has shape \(5,\), not \(6,\)"):
        checks.check_rollouts(replace(valid, reward=valid.reward[1:]), {})
    store = open_store(tmp_path / "s", create=True)
    segment = commit_rollouts(store, 1, reward=True)
    arrays = store.read_arrays(segment)
    store.check_arrays(segment, arrays, ())
    with pytest.raises(IntegrityError, match="contradict each other"):
        store.check_arrays(segment, arrays | {"reward": bad}, ())


@pytest.mark.parametrize("name", ["mc_counts", "mc_ids", "mc_multiplicities", "mc_logprobs"])
def test_untrusted_draws_are_checked(tmp_path: Path, name: str) -> None:
    store = open_store(tmp_path / "s", create=True)
    segment = commit_rollouts(store, 1, draws=True)
    arrays = store.read_arrays(segment)
    store.check_arrays(segment, arrays, ())
    bad = arrays[name].copy()
    bad[0] = {
        "mc_counts": bad[0] + 1,
        "mc_ids": bad[1],
        "mc_multiplicities": 0,
        "mc_logprobs": 1.0,
    }[name]
    with pytest.raises(IntegrityError, match="contradict each other"):
        store.check_arrays(segment, arrays | {name: bad}, ())


def forged(**arrays: Any) -> dict[str, np.ndarray]:
    """Return the arrays of rollouts, some of them replaced."""
    arrays_of_rollouts = rollouts.encode(make_rollouts(1), DEFAULT)
    text = {name: np.frombuffer(a, np.uint8) for name, a in arrays.items() if type(a) is bytes}
    return arrays_of_rollouts | arrays | text


M, T = 2000, 200_000


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        # Each prompt the same 200,000 tokens: 400 million of them from 13 KB.
        (
            {
                "prompt_offsets": np.tile(np.asarray([0, T], np.int64), M // 2 + 1)[: M + 1],
                "prompt_tokens": np.zeros(T, np.uint32),
                "prompt_json": b"[" + b",".join([b"{}"] * M) + b"]",
            },
            "offsets that do not divide",
        ),
        ({"prompt_json": b"[" * 200_000}, "nested too deeply"),
        ({"prompt_json": b"[" + b"[]," * schema.MAX_JSON_VALUES + b"[]]"}, "at most 4194304"),
        ({"prompt_json": b'{"id": "x"}'}, "does not describe 3 prompts"),
        (
            {"prompt_json": b"[" + b",".join([b'{"id": {}, "answer": 7, "extra": []}'] * 3) + b"]"},
            "is not a string",
        ),
        (
            {"response_offsets": np.asarray([0, 2**63 - 1, -2, 0, 1, 2, 0], np.int64)},
            "do not divide",
        ),
        (
            {"prompt_index": np.asarray([0, 1, 2, 3, 0, 1], np.uint32)},
            "a sequence of prompt 3, of 3",
        ),
    ],
)
def test_untrusted_rollouts(arrays: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, StoreError), match=words):
        checks.check_rollouts(rollouts.decode(forged(**arrays), DEFAULT), {})


def test_an_untrusted_extent() -> None:
    sound = {name: forged()[name] for name in rollouts.EXTENT}
    counts = {"T": int(sound["prompt_offsets"][-1]), "P": int(sound["response_offsets"][-1])}
    assert len(rollouts.extent(sound, counts).prompt_ids) == 3
    for bad in (
        {"prompt_offsets": sound["prompt_offsets"][::-1].copy()},
        {"response_offsets": np.asarray([0, 2**63 - 1, -2, 0, 1, 2, counts["P"]], np.int64)},
        {"prompt_json": np.frombuffer(b"[" * 200_000, np.uint8)},
        {"prompt_index": sound["prompt_index"] + 3},
    ):
        with pytest.raises(ValueError, match=r"."):
            rollouts.extent(sound | bad, counts)


def test_rows_longer_than_any_scorers() -> None:
    """Refuse them: the work grows with the longest row."""
    cnt = np.asarray([schema.MAX_K + 1, 1], np.uint16)
    flat = np.zeros(schema.MAX_K + 2)
    arrays = {
        **dict.fromkeys(("teacher_logprobs", "entropy", "log_tail"), np.zeros(2, np.float32)),
        "topk_counts": cnt,
        "topk_ids": np.arange(len(flat), dtype=np.uint32),
        "topk_logprobs": flat.astype(np.float16),
    }
    with pytest.raises(ValueError, match="a row of 4097 entries, at most 4096"):
        layout.decode(arrays, DEFAULT, None)
    with pytest.raises(ValueError, match="do not add up"):
        layout.decode(arrays | {"topk_counts": cnt - 1}, DEFAULT, None)


def test_one_long_row_does_not_make_the_others_long() -> None:
    rng = np.random.default_rng(0)
    cnt = rng.integers(0, 9, 500).astype(np.uint16)
    cnt[[3, 499]] = 300
    values = rng.integers(0, 40, int(cnt.sum())).astype(np.uint16)
    rows = np.split(values, np.cumsum(cnt)[:-1])
    expected = [(row[None, :] < row[:, None]).sum(1) for row in rows]
    assert np.array_equal(ragged.rank_in_row(values, cnt), np.concatenate(expected))


UNSAID: list[Callable[[Any], Any]] = [
    lambda s: replace(s, lp=np.full_like(s.lp, np.nan)),
    lambda s: replace(s, log_tail=np.full_like(s.log_tail, 5.0)),
    lambda s: replace(s, entropy=np.full_like(s.entropy, np.inf)),
    lambda s: replace(s, entropy_hi=s.entropy - 1),
    lambda s: replace(s, entropy_hi=s.entropy + np.nan),
    lambda s: replace(s, entropy_hi=s.entropy + np.inf),
    lambda s: replace(s, ids=np.zeros_like(s.ids)),
    lambda s: replace(s, entry_lp=np.full_like(s.entry_lp, 3.0), at_lp=None),
]


@pytest.mark.parametrize("change", UNSAID)
def test_impossible_scores_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]
) -> None:
    """Refuse them in `unpack` and `verify --deep` as in a commit."""
    store = open_store(tmp_path / "theirs", create=True)
    data = make_rollouts(1, student=False)
    base = commit_rollouts(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(opened, "check_scores", lambda *_: None)
        commit_scores(store, base, 1, scores=change(make_scores(1, data)))
    assert verify(store).segments == 2
    with pytest.raises(IntegrityError, match="contradict each other"):
        verify(store, deep=True)
    mine = open_store(tmp_path / "mine", create=True)
    with pytest.raises(IntegrityError, match="contradict each other"):
        unpack(mine, pack(store, tmp_path / "packed"))
    assert len(mine.head().segments) == 1, "the rollouts are sound"
