"""Recorded log-probs as the JSON of vLLM and SGLang, written column by column.

Each value is the shortest or a longer decimal that parses to the same float64 as the server's own
text. Texts are columns of bytes; a zero byte is none and is removed at the end.
"""

from collections.abc import Sequence

import numpy as np

from logitcask.engine.tap.record import Record
from logitcask.engine.types import Array

_SMALLEST = 1 / 64
"""From here on 18 decimals are enough for float64, and the integers below fit 64 bits."""
_BITS = 29
"""A float32 of at least _SMALLEST is a multiple of 2^-29."""
_NUMBER = 25
"""Characters of a number at most."""
_THREE = np.frombuffer("".join(f"{i:03}" for i in range(1000)).encode(), np.uint8).reshape(1000, 3)
MINUS_INFINITY = b"-9999.0"
"""vLLM writes it for -inf."""


def prompt_logprobs(record: Record, k: int) -> bytes:
    """Return vLLM's list: null, then an object a position, its own token first, then by rank."""
    rows, width = len(record.lp), min(k, record.k)
    own, top = record.ids[1:, None], record.top[:, :width]
    ids = np.concatenate([own, top], 1)
    lp = np.concatenate([record.lp[:, None], record.top_lp[:, :width]], 1)
    # A server that gives no ranks beyond the best K leaves this one: the least that it can be.
    own_rank = np.where(record.rank > 0, record.rank, record.k + 1)
    rank = np.concatenate(
        [own_rank[:, None], np.broadcast_to(np.arange(1, width + 1), (rows, width))], 1
    )
    shown = np.ones((rows, width + 1), bool)
    shown[:, 1:] = top != own
    first = np.zeros((rows, width + 1), bool)
    first[:, 0] = True
    begin = np.where(first[shown][:, None], _bytes(b'},{"'), _bytes(b'\0\0,"'))
    cells: list[Array | bytes] = [
        begin,
        _integers(ids[shown]),
        b'":{"logprob":',
        _numbers(lp[shown]),
        b',"rank":',
        _integers(rank[shown]),
        b"}",
    ]
    return b"[null," + _join(cells)[2:] + b"}]"


def sglang_own(record: Record, start: int) -> bytes:
    """Return SGLang's input_token_logprobs of the positions from `start`, without the list's end.

    The first has no log-prob, as for SGLang.
    """
    head = b"[[null,%d,null]" % int(record.ids[start])
    cells: list[Array | bytes] = [
        b",[",
        _numbers(record.lp[start:]),
        b",",
        _integers(record.ids[start + 1 :]),
    ]
    return head + _join([*cells, b",null]"]) + b"]"


def sglang_top(record: Record, start: int, k: int) -> bytes:
    """Return SGLang's input_top_logprobs of the positions from `start`; the first has none."""
    top, lp = record.top[start:, :k], record.top_lp[start:, :k]
    rows, width = top.shape
    first = np.zeros((rows, width), bool)
    first[:, 0] = True
    begin = np.where(first.reshape(-1, 1), _bytes(b"],[["), _bytes(b"\0\0,["))
    numbers, ids = _numbers(lp.reshape(-1)), _integers(top.reshape(-1))
    cells: list[Array | bytes] = [begin, numbers, b",", ids, b",null]"]
    return b"[null" + _join(cells)[1:] + b"]]" if rows and width else b"[null]"


def _join(columns: Sequence[Array | bytes]) -> bytes:
    """Join columns [n, width] uint8, or texts for all rows, into one text."""
    rows = max((len(each) for each in columns if not isinstance(each, bytes)), default=0)
    widths = [len(each) if isinstance(each, bytes) else each.shape[1] for each in columns]
    cells = np.empty((rows, sum(widths)), np.uint8)
    at = 0
    for each, width in zip(columns, widths, strict=True):
        cells[:, at : at + width] = _bytes(each) if isinstance(each, bytes) else each
        at += width
    return cells.tobytes().translate(None, b"\0")


def _bytes(text: bytes) -> Array:
    found: Array = np.frombuffer(text, np.uint8)
    return found


def _integers(values: Array) -> Array:
    """Return the decimals of integers of at least 0, [n, width] with zero bytes on the left."""
    left = values.astype(np.int64)
    width = len(str(int(left.max(initial=0))))
    digits = np.empty((len(left), width), np.uint8)
    for place in range(width - 1, -1, -1):
        # The last digit is there even for 0.
        absent = (left == 0) if place < width - 1 else np.zeros(len(left), bool)
        left, digit = np.divmod(left, 10)
        digits[:, place] = np.where(absent, 0, digit + 48)
    return digits


def _numbers(values: Array) -> Array:
    """Return float32 log-probs as decimals, [n, 25] with zero bytes."""
    size = np.negative(values, dtype=np.float64)
    plain = (size >= _SMALLEST) & (size < 10_000)
    if not plain.all():
        return _any_numbers(values, plain)
    whole = np.floor(size)
    # Exact: a multiple of 2^-29, so 18 decimals come from two products of 9 digits.
    part = ((size - whole) * (1 << _BITS)).astype(np.int64) * 1_000_000_000
    cells = np.empty((len(size), _NUMBER), np.uint8)
    cells[:, 0] = ord("-")
    cells[:, 1:6] = 0
    digits = _integers(whole)
    cells[:, 6 - digits.shape[1] : 6] = digits
    cells[:, 6] = ord(".")
    for at in (7, 16):
        nine = part >> _BITS
        part = (part & ((1 << _BITS) - 1)) * 1_000_000_000
        high, low = np.divmod(nine, 1000)
        cells[:, at + 6 : at + 9] = _THREE[low]
        high, low = np.divmod(high, 1000)
        cells[:, at + 3 : at + 6] = _THREE[low]
        cells[:, at : at + 3] = _THREE[high]
    return cells


def _any_numbers(values: Array, plain: Array) -> Array:
    cells = np.empty((len(values), _NUMBER), np.uint8)
    cells[plain] = _numbers(values[plain])
    others = [
        MINUS_INFINITY if value == -np.inf else repr(value).encode()
        for value in values[~plain].tolist()
    ]
    cells[~plain] = np.array(others, f"S{_NUMBER}").view(np.uint8).reshape(-1, _NUMBER)
    return cells
