"""DistillKit's compressed log-probs: its configuration, and bytes <-> ids and log-probs.

A position has K ids, best first. Its log-probs are `exact_k` numbers as they are, then the
coefficients of a least-squares fit of all others over their index t, then bins of residuals: a
scale, and integers of a few bits. Ids are integers of ceil(log2 d) bits. Bits come with the highest
first, numbers in little-endian order (arcee-ai/DistillKit, distillkit/compression, commit a61c2e7).
"""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np
import torch
import yaml
from pydantic import Field, StrictBool, StrictInt, ValidationError, model_validator

from logitcask.engine.config.section import Section
from logitcask.engine.errors import PromptError
from logitcask.engine.types import Array

CONFIG = "compression_config.yaml"
"""Name of the configuration, next to the Parquet files."""
LOGPROBS, IDS = "compressed_logprobs", "bytepacked_indices"
"""Columns with the bytes of each position."""
LEGACY = ("packed_indices", "exact_values", "coeffs")
"""Columns of the older form."""
_MOST_BYTES = 1 << 16
_MOST_K = 4096

Dtype: TypeAlias = Literal["float16", "bfloat16", "float32", "float64"]
Count: TypeAlias = Annotated[StrictInt, Field(ge=1, le=_MOST_K)]


class Bin(Section):
    """Residuals of a scale of their own."""

    scale_dtype: Dtype
    element_bits: Annotated[StrictInt, Field(ge=1, le=32)]
    num_elements: Count

    @property
    def bytes(self) -> int:
        """Return the bytes of the scale and the packed integers."""
        return _size(self.scale_dtype) + _packed(self.num_elements, self.element_bits)


class Compression(Section):
    """The configuration with which a file was written."""

    d: Annotated[StrictInt, Field(ge=2, le=1 << 24)]
    """Ids of the vocabulary."""
    k: Count
    exact_k: Annotated[StrictInt, Field(ge=0, le=_MOST_K)]
    exact_dtype: Dtype = "float32"
    polynomial_terms: (
        tuple[Annotated[StrictInt, Field(ge=0, le=16)] | Literal["sqrt", "exp"], ...] | None
    ) = None
    """Exponents of t, and functions of it."""
    term_dtype: Dtype = "float32"
    residual_bins: tuple[Bin, ...]
    delta_encoding: StrictBool = True
    error_diffusion: StrictBool = False
    """Concerns the writing alone."""
    normalize_t: StrictBool = False

    @model_validator(mode="after")
    def _fits(self) -> "Compression":
        if self.exact_k > self.k:
            raise ValueError(f"exact_k = {self.exact_k} is above k = {self.k}")
        if self.exact_k < self.k and not self.polynomial_terms and not self.residual_bins:
            raise ValueError("exact_k < k needs polynomial_terms or residual_bins")
        if sum(each.num_elements for each in self.residual_bins) > self.k - self.exact_k:
            raise ValueError("residual_bins hold more than k - exact_k elements")
        return self

    @property
    def id_bits(self) -> int:
        """Return the bits of an id, computed in float32 as DistillKit does."""
        return int(torch.log2(torch.tensor(self.d, dtype=torch.float32)).ceil())

    @property
    def id_bytes(self) -> int:
        """Return the bytes of a position's ids."""
        return _packed(self.k, self.id_bits)

    @property
    def logprob_bytes(self) -> int:
        """Return the bytes of a position's log-probs."""
        terms = len(self.polynomial_terms or ()) * _size(self.term_dtype)
        bins = sum(each.bytes for each in self.residual_bins)
        return self.exact_k * _size(self.exact_dtype) + terms + bins

    @property
    def is_exact(self) -> bool:
        """Return whether the log-probs are float32 or better, as the teacher gave them."""
        return (
            self.exact_k == self.k
            and self.exact_dtype in ("float32", "float64")
            and not self.delta_encoding
        )


def exact(k: int, n_vocab: int) -> Compression:
    """Return the configuration that keeps k log-probs in float32, bit for bit."""
    return Compression(d=n_vocab, k=k, exact_k=k, residual_bins=(), delta_encoding=False)


def read_config(folder: Path) -> Compression:
    """Read the configuration next to the files of a folder. Raises PromptError."""
    file = folder / CONFIG
    hint = "write the logprob_compressor of the capture into it; DistillKit's README lists its keys"
    try:
        with file.open("rb") as stream:
            text = stream.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise PromptError(f"{file} is longer than {_MOST_BYTES} bytes", hint=hint)
        found = yaml.safe_load(text)
    except OSError as error:
        cause = f"{file} cannot be read: {error.strerror or error}"
        raise PromptError(cause, hint=hint) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        cause = " ".join(str(error).split())[:200]
        raise PromptError(f"{file} is not YAML: {cause}", hint=hint) from error
    if isinstance(found, dict) and "polynomial_degree" in found:
        raise PromptError(f"{file}: {LEGACY_CAUSE}", hint=LEGACY_HINT)
    try:
        return Compression.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PromptError(f"{file}: {where}: {first['msg']}"[:300], hint=hint) from error


LEGACY_CAUSE = (
    "the legacy form holds logits less their mean and no log-sum-exp, so the log-probs are unknown"
)
LEGACY_HINT = "capture the teacher again with a logprob_compressor, or `logitcask score` the texts"


def encode(ids: Array, logprobs: Array, config: Compression) -> tuple[Array, Array]:
    """Return the bytes of ids and log-probs, [R, K] each, of a configuration of `exact`.

    -> [R, 4 K] and [R, id_bytes] uint8.
    """
    rows = np.ascontiguousarray(logprobs, "<f4").view(np.uint8)
    shifts = np.arange(config.id_bits - 1, -1, -1)
    bits = (ids.astype(np.int64)[:, :, None] >> shifts) & 1
    return rows, np.packbits(bits.astype(np.uint8).reshape(len(ids), -1), axis=1)


def decode(logprobs: Array, ids: Array, config: Compression) -> tuple[Array, Array]:
    """Return (ids [R, K] int64, log-probs [R, K] float64) of the bytes of R positions.

    logprobs: [R, logprob_bytes] uint8; ids: [R, id_bytes] uint8. The values are those that
    DistillKit computes: rounded to `exact_dtype`, by sums in `term_dtype`.
    """
    found = _unpack(ids, config.k, config.id_bits)
    out = _torch(config.exact_dtype)
    left = torch.from_numpy(np.ascontiguousarray(logprobs))
    values, left = _numbers(left, config.exact_k, config.exact_dtype)
    terms, rest = config.polynomial_terms or (), config.k - config.exact_k
    coeffs, left = _numbers(left, len(terms), config.term_dtype)
    residual = torch.zeros(len(left), rest, dtype=out)
    parts = []
    for each in config.residual_bins:
        scale, left = _numbers(left, 1, each.scale_dtype)
        size = _packed(each.num_elements, each.element_bits)
        packed, left = left[:, :size], left[:, size:]
        whole = torch.from_numpy(_unpack(packed.numpy(), each.num_elements, each.element_bits))
        if each.element_bits == 1:
            parts.append((whole.float() * 2 - 1) * scale)
        else:
            parts.append((whole - 2 ** (each.element_bits - 1)).float() * scale)
    if parts:
        residual = torch.cat(parts, 1)
        residual = torch.nn.functional.pad(residual, (0, rest - residual.shape[1]))
    fitted = residual.to(out)
    if terms:
        basis = _basis(terms, rest, _torch(config.term_dtype), config.normalize_t)
        fitted = (basis * coeffs[:, None, :]).sum(-1) + fitted
    values = torch.cat([values, fitted.to(out)], 1)
    if config.delta_encoding:
        values = values.float().cumsum(1).to(out)
    return found, values.double().numpy()


def _basis(
    terms: tuple[int | Literal["sqrt", "exp"], ...], count: int, dtype: torch.dtype, unit: bool
) -> torch.Tensor:
    """Return the terms at t = 0, 1, ... [count, terms]; unit: at t from 0 to 1."""
    t = torch.linspace(0, 1, count, dtype=dtype) if unit else torch.arange(count, dtype=dtype)
    named = {"sqrt": torch.sqrt, "exp": torch.exp}
    return torch.stack([named[e](t) if isinstance(e, str) else t**e for e in terms], -1)


def _numbers(data: torch.Tensor, count: int, dtype: Dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first `count` numbers of each row, and the bytes behind them."""
    size = count * _size(dtype)
    return data[:, :size].contiguous().view(_torch(dtype)), data[:, size:]


def _unpack(data: Array, count: int, bits: int) -> Array:
    """Return [R, count] int64 of packed integers."""
    flat = np.unpackbits(data, axis=1, count=count * bits).reshape(len(data), count, bits)
    weights = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    found: Array = flat.astype(np.int64) @ weights
    return found


def _torch(dtype: Dtype) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype)
    return found


def _size(dtype: Dtype) -> int:
    return _torch(dtype).itemsize


def _packed(count: int, bits: int) -> int:
    """Return the bytes of `count` packed integers."""
    return (count * bits + 7) // 8
