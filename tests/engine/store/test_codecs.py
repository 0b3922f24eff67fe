"""Profiles keep their bounds, and no bytes decode to more than the schema allows."""

import json
import math
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Blosc
from pcodec import ChunkConfig, standalone

from logitcask.engine.errors import ConfigError, IntegrityError
from logitcask.engine.store import open_store
from logitcask.engine.store.format import codecs, schema, shards
from logitcask.engine.store.format import segment as segments
from logitcask.engine.store.format.codecs import PROFILES, Profile, from_entry, to_entry
from tests.engine.store.made import commit_rollouts

EVERY = pytest.mark.parametrize("name", PROFILES)


def stored(values: np.ndarray, name: str) -> np.ndarray:
    return from_entry(to_entry(values.astype(np.float32), PROFILES[name]), PROFILES[name])


@EVERY
@settings(derandomize=True, deadline=None, max_examples=300)
@given(lp=st.lists(st.floats(-6e4, 0.0, width=32), min_size=1, max_size=50))
def test_the_error_of_a_log_prob_is_within_the_profile(name: str, lp: list[float]) -> None:
    exact = np.asarray(lp, np.float32)
    error = np.abs(stored(exact, name).astype(np.float64) - exact)
    assert (error <= PROFILES[name].rounding * np.abs(exact.astype(np.float64)) + 2.0**-25).all()


def kl_bound(profile: Profile, second_moment: float) -> float:
    """Bound the nats that the rounding of a row costs: KL(true || stored), both renormalised.

    KL = E[d] + log E[exp(-d)] for errors d of the log-probs, at most E[d^2] / 2 x exp(max |d|), and
    E[d^2] <= u^2 E[(log p)^2], the second moment.
    """
    spread = math.exp(profile.rounding * 2 * math.sqrt(second_moment))
    return profile.rounding**2 * second_moment / 2 * spread


@EVERY
@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.sampled_from([2, 16, 64, 256, 4096]),
    spread=st.sampled_from([0.0, 0.3, 2.0, 8.0]),
)
def test_the_kl_of_a_row_is_within_the_profile(name: str, seed: int, k: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    lp = log_softmax(rng.normal(0, 1, k) * spread)
    profile = PROFILES[name]
    kl = kl_nats(lp, stored(lp, name))
    bound = kl_bound(profile, float((np.exp(lp) * lp**2).sum()))
    # float32 log-probs are themselves off by some 2^-24.
    assert -1e-9 < kl <= bound + 1e-9
    assert bound <= kl_bound(profile, math.log(schema.MAX_K) ** 2) * 1.05 + 1e-12


def rows_like_a_language_models() -> np.ndarray:
    """Return [2000, 64] log-probs: mean entropy near half a nat, most mass on few ids."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (2000, 64)) - np.arange(64) * rng.exponential(0.5, (2000, 1))
    logits[:, 0] += rng.exponential(4.0, 2000)
    return log_softmax(logits)


@pytest.mark.parametrize(
    ("name", "mean", "most"),
    [("default", 1e-6, 1e-5), ("interop", 1e-6, 1e-5), ("compact", 1e-4, 1e-3), ("raw32", 0, 0)],
)
def test_kl_of_ordinary_rows(name: str, mean: float, most: float) -> None:
    lp = rows_like_a_language_models()
    kl = kl_nats(lp, stored(lp, name))
    assert kl.mean() <= mean + 1e-12
    assert kl.max() <= most + 1e-12


@pytest.mark.parametrize(
    ("name", "loss", "gradient"),
    [("default", 2e-4, 2e-3), ("interop", 2e-4, 2e-3), ("compact", 2e-3, 2e-2), ("raw32", 0, 0)],
)
def test_loss_and_gradient_of_forward_kl_from_stored_values(
    name: str, loss: float, gradient: float
) -> None:
    """Compare KL(q || p) over stored ids, both renormalised, and p - q, its gradient by z."""
    lq = rows_like_a_language_models()
    lp = log_softmax(lq + np.random.default_rng(1).normal(0, 0.5, lq.shape))
    off = log_softmax(stored(lq, name).astype(np.float64))
    exact, ours = kl_nats(lq, lp), kl_nats(off, lp)
    assert np.abs(ours - exact).mean() <= loss + 1e-6
    g, g_off = np.exp(lp) - np.exp(lq), np.exp(lp) - np.exp(off)
    relative = np.linalg.norm(g_off - g, axis=1).mean() / np.linalg.norm(g, axis=1).mean()
    assert relative <= gradient + 1e-6


@EVERY
def test_impossible_and_improbable_stay_different(name: str) -> None:
    given_lp = np.asarray([0.0, -1e-9, -12.5, -65504.0, -1e6, -np.inf], np.float32)
    back = stored(given_lp, name)
    assert np.isneginf(back).tolist() == [False] * 5 + [True]
    assert (np.diff(back) <= 0).all(), "rounding keeps the order"


def test_bfloat16_rounds_to_nearest_even() -> None:
    import torch

    values = -np.random.default_rng(0).exponential(5, 20_000).astype(np.float32)
    theirs = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    assert np.array_equal(stored(values, "compact"), theirs)


def test_unknown_profile_lists_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        codecs.profile("tiny")
    assert "default, compact, interop, raw32" in caught.value.hint


def test_every_profile_has_entry_arrays_of_its_dtype() -> None:
    for layout in ("student", "dedup", "full", "sampled", "extension"):
        kinds = {
            name: {segments.dtype_of(spec, profile) for profile in PROFILES.values()}
            for name, spec in schema.specs(layout).items()
        }
        varies = {name for name, found in kinds.items() if len(found) > 1}
        assert varies == {"student_topk_logprobs", "topk_logprobs", "at_student_logprobs"} & set(
            kinds
        )


def test_interop_is_read_by_another_zarr(tmp_path: Path) -> None:
    import tensorstore

    store = open_store(tmp_path / "cask", create=True)
    segment = commit_rollouts(store, 3, student=True, profile="interop")
    rollouts = store.read_rollouts(segment)
    assert rollouts.student is not None

    def theirs(name: str) -> np.ndarray:
        base = {"driver": "file", "path": f"{store.url}/{segment.path}"}
        place = {"driver": "zip", "base": base, "path": f"{name}/"}
        return tensorstore.open({"driver": "zarr3", "kvstore": place}).result().read().result()

    assert np.array_equal(theirs("response_tokens"), rollouts.tokens)
    assert np.array_equal(theirs("student_topk_ids"), rollouts.student.ids)
    assert np.array_equal(
        theirs("student_topk_logprobs").astype(np.float32), rollouts.student.entry_lp
    )
    assert json.loads(theirs("prompt_json").tobytes())[0]["id"] == rollouts.prompts[0].id


# Shards.


def crc(data: bytes) -> bytes:
    import google_crc32c

    return data + google_crc32c.value(data).to_bytes(4, "little")


def shard(*chunks: bytes) -> bytes:
    """Build a shard: chunks with their checksums, and a valid index."""
    sealed = [crc(chunk) for chunk in chunks]
    offsets = np.cumsum([0, *map(len, sealed[:-1])])
    index = np.asarray([[o, len(c)] for o, c in zip(offsets, sealed, strict=True)], "<u8")
    return b"".join(sealed) + crc(index.tobytes())


def packed(values: np.ndarray, codec: str) -> bytes:
    if codec == "pcodec":
        return standalone.simple_compress(values, ChunkConfig())
    return bytes(Blosc("zstd", 5, Blosc.BITSHUFFLE).encode(values))


def zarr_options(dtype: str, codec: str) -> dict[str, Any]:
    """Return the arguments of zarr's create_array that choose the codecs."""
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
    from zarr.codecs.numcodecs import PCodec

    if codec == "pcodec":
        serializer, compressors = PCodec(level=8), [Crc32cCodec()]
    else:
        size = np.dtype(dtype).itemsize
        shuffle = "noshuffle" if size == 1 else "bitshuffle"
        blosc = BloscCodec(cname="zstd", clevel=5, shuffle=shuffle, typesize=size)
        serializer, compressors = BytesCodec(), [blosc, Crc32cCodec()]
    return {"serializer": serializer, "compressors": compressors, "filters": None}


@pytest.mark.parametrize("codec", ["pcodec", "blosc"])
@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    length=st.integers(1, 300),
    chunk=st.sampled_from([1, 7, 64]),
    dtype=st.sampled_from(["uint16", "uint32", "int64", "float16", "float32", "uint8"]),
)
def test_an_array_is_to_the_byte_what_zarr_writes(
    codec: str, length: int, chunk: int, dtype: str
) -> None:
    codec = codecs.codec_of(dtype, PROFILES["interop" if codec == "blosc" else "default"])
    import zarr
    from zarr.storage import MemoryStore

    rng = np.random.default_rng(length)
    values = rng.integers(0, 60_000, length).astype(dtype)
    objects: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")
        array = zarr.create_array(
            MemoryStore(objects),
            shape=values.shape,
            dtype=dtype,
            chunks=(chunk,),
            shards=(-(-length // chunk) * chunk,),
            config={"write_empty_chunks": True},
            **zarr_options(dtype, codec),
        )
        array[:] = values
    shape: Any = {"chunk": chunk, "shard": -(-length // chunk) * chunk, "length": length}
    shape |= {"dtype": dtype, "codec": codec}
    theirs = {name: buffer.to_bytes() for name, buffer in objects.items()}
    assert shards.encode(values, **shape) == theirs["c/0"]
    ours = shards.metadata(**shape)
    assert json.loads(ours) == json.loads(theirs["zarr.json"])
    assert shards.metadata_fault(ours, **shape) == ""
    got = shards.decode(theirs["c/0"], **shape)
    assert got.dtype == values.dtype
    assert np.array_equal(got, values)


SHAPE = {"dtype": "uint32", "length": 8, "chunk": 4, "shard": 8}


@pytest.mark.parametrize("codec", ["pcodec", "blosc"])
@pytest.mark.parametrize("sizes", [(4, 3), (5, 4), (4, 5), (0, 4), (4, 4000)])
def test_a_chunk_of_another_size_is_refused(codec: str, sizes: tuple[int, int]) -> None:
    data = shard(*(packed(np.arange(n, dtype=np.uint32), codec) for n in sizes))
    with pytest.raises((ValueError, RuntimeError)):
        shards.decode(data, codec=codec, **SHAPE)


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_shard_that_is_cut_is_refused(cut: int) -> None:
    chunks = [packed(np.arange(4, dtype=np.uint32), "pcodec") for _ in range(2)]
    data = shard(*chunks)
    assert shards.decode(data, codec="pcodec", **SHAPE).tolist() == [0, 1, 2, 3] * 2
    with pytest.raises(ValueError, match=r"checksum|index|chunk"):
        shards.decode(data[:-cut], codec="pcodec", **SHAPE)


@pytest.mark.parametrize("index", [[[0, 2**63], [0, 4]], [[2**64 - 1] * 2] * 2, [[10**9, 9]] * 2])
def test_an_index_that_points_elsewhere_is_refused(index: list[list[int]]) -> None:
    data = bytes(100) + crc(np.asarray(index, "<u8").tobytes())
    with pytest.raises(ValueError, match=r"missing or reaches beyond"):
        shards.decode(data, codec="pcodec", **SHAPE)


BOMB = """
import resource, sys
import numpy as np
from pathlib import Path
from typing import Any
from logitcask.engine.store.format import shards
data = Path(sys.argv[1]).read_bytes()
shape = {"dtype": "uint32", "length": 8, "chunk": 4, "shard": 8}
shards.codecs.decompress  # what decodes is imported before memory is counted
import pcodec, numcodecs.blosc
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    shards.decode(data, codec=sys.argv[2], **shape)
    print("decoded")
except (ValueError, RuntimeError) as error:
    print(type(error).__name__)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def bombs() -> Iterator[tuple[str, str, bytes]]:
    """Yield 12 kilobytes-long shards that decode to up to 2 GB where the schema allows 32 bytes."""
    for size in (1 << 20, 1 << 24, 1 << 26):
        zeros = np.zeros(size, np.uint32)
        for codec in ("pcodec", "blosc"):
            chunk = packed(zeros, codec)
            yield f"{codec}-{size}-first", codec, shard(chunk, chunk)
            good = packed(np.arange(4, dtype=np.uint32), codec)
            yield f"{codec}-{size}-second", codec, shard(good, chunk)


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))


def test_bombs_stay_small(tmp_path: Path) -> None:
    trials = 0
    for name, codec, data in bombs():
        file = tmp_path / name
        file.write_bytes(data)
        done = subprocess.run(
            [sys.executable, "-c", BOMB, str(file), codec],
            capture_output=True,
            text=True,
            preexec_fn=limit,
        )
        assert done.returncode == 0, done.stderr
        outcome, grown_kb = done.stdout.split()
        assert outcome in ("ValueError", "RuntimeError"), name
        assert int(grown_kb) < 32_000, f"{name}: {grown_kb} KB"
        trials += 1
    assert trials == 12


def test_a_record_of_too_much_memory_is_not_read(tmp_path: Path) -> None:
    """Refuse it: a few hundred kilobytes of equal chunks could decode to all the memory."""
    from logitcask.engine.store.log import record
    from tests.engine.store.made import commit_scores

    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        store = open_store(Path(folder) / "cask", create=True)
        segment = commit_scores(store, commit_rollouts(store, 3, student=True), 3)
        fields = record.encode_segment(segment)
    huge = fields | {"add": [*fields["add"]]}
    at = record.ADD.index("counts")
    huge["add"][at] = fields["add"][at] | {"P": 1 << 20, "E": 1 << 30}
    with pytest.raises(IntegrityError, match=r"bytes decoded"):
        record.decode_segment(huge, "here")
    assert record.decode_segment(fields, "here").seg_id == segment.seg_id


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def kl_nats(lp: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return KL(p || other), `other` renormalised."""
    return (np.exp(lp) * (lp - log_softmax(other.astype(np.float64)))).sum(-1)
