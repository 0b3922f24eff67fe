"""One recorded answer, and its frame in a file.

A frame is a head of 44 bytes with the lengths and a CRC-32 of its own, then the arrays, whose
CRC-32 is in the head. A frame without arrays marks that all frames before it are verified.
"""

import hashlib
import struct
import zlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from logitcask.engine.types import Array

MOST_TOKENS, MOST_K = 1 << 22, 4096
_HEAD = struct.Struct("<4sIIIII16sI")
HEAD_BYTES = _HEAD.size
_RECORD, _VERIFIED = b"tapr", b"tapv"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The teacher's best K ids at every position of L tokens but the first, and their own."""

    ids: Array
    """[L] uint32, as sent."""
    boundary: int
    """Tokens of the prompt; 0 = unknown."""
    lp: Array
    """[L - 1] float32, log-prob of the token that stands there."""
    rank: Array
    """[L - 1] uint32, its rank from 1 in the vocabulary; 0 = beyond K, and not known closer."""
    top: Array
    """[L - 1, K] uint32, best ids in the server's order."""
    top_lp: Array
    """[L - 1, K] float32."""

    @property
    def k(self) -> int:
        return int(self.top.shape[1])


class Head(NamedTuple):
    """The head of a frame."""

    kind: Literal["record", "verified"]
    tokens: int
    k: int
    boundary: int
    repeated: bool
    """A sealed file holds the same ids already, with fewer log-probs."""
    body_crc: int
    key: bytes

    @property
    def size(self) -> int:
        """Return the bytes of the frame."""
        rows = max(0, self.tokens - 1)
        return HEAD_BYTES + 4 * self.tokens + rows * (8 + 8 * self.k)


def key_of(ids: Array) -> bytes:
    """Return the 16 bytes by which the record of these ids is found; the ids are compared too."""
    return hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=16).digest()


def encode(record: Record, *, repeated: bool = False) -> bytes:
    """Return the frame of a record."""
    arrays = (record.ids, record.lp, record.rank, record.top, record.top_lp)
    kinds = ("<u4", "<f4", "<u4", "<u4", "<f4")
    body = b"".join(a.astype(kind).tobytes() for a, kind in zip(arrays, kinds, strict=True))
    count = len(record.ids)
    crc, key = zlib.crc32(body), key_of(record.ids)
    return _head(_RECORD, count, record.k, record.boundary, int(repeated), crc, key) + body


def encode_verified() -> bytes:
    """Return the frame that marks all frames before it as verified."""
    return _head(_VERIFIED, 0, 0, 0, 0, 0, bytes(16))


def _head(*fields: bytes | int) -> bytes:
    head = _HEAD.pack(*fields, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head))


def decode_head(data: bytes) -> Head | None:
    """Parse the first bytes of a frame; None unless they are a complete and valid head."""
    if len(data) < HEAD_BYTES:
        return None
    magic, tokens, k, boundary, repeated, body_crc, key, crc = _HEAD.unpack_from(data)
    if crc != zlib.crc32(data[: HEAD_BYTES - 4]) or magic not in (_RECORD, _VERIFIED):
        return None
    if magic == _RECORD and not (2 <= tokens <= MOST_TOKENS and k <= MOST_K and boundary < tokens):
        return None
    kind: Literal["record", "verified"] = "record" if magic == _RECORD else "verified"
    return Head(kind, tokens, k, boundary, bool(repeated), body_crc, key)


def decode(head: Head, body: bytes) -> Record | None:
    """Return the record of a frame; None for damaged bytes."""
    if len(body) != head.size - HEAD_BYTES or zlib.crc32(body) != head.body_crc:
        return None
    rows, entries = head.tokens - 1, (head.tokens - 1) * head.k
    words = np.frombuffer(body, "<u4")
    ends = np.cumsum([head.tokens, rows, rows, entries, entries])
    ids, lp, rank, top, top_lp = np.split(words, ends[:-1])
    return Record(
        ids=ids,
        boundary=head.boundary,
        lp=lp.view("<f4"),
        rank=rank,
        top=top.reshape(rows, head.k),
        top_lp=top_lp.view("<f4").reshape(rows, head.k),
    )
