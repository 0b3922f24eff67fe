"""SGLang's `/generate`: the request for one sequence, and its answer as arrays.

One list of chosen ids holds for all positions of a request. So the rows of a sequence are divided
(`divide_rows`), and each part requests the union of its rows' ids. Its log-probs begin at its first
row, and what is before that comes from the server's prefix cache.

The facts of the form, with SGLang's files, are in the README of the room.
"""

import base64
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from logitcask.engine.backends.returned import ReturnedTopK, reject_answer
from logitcask.engine.store.format import ragged
from logitcask.engine.types import Array, IdLists

SGLANG = "/generate"
PART_ENTRIES = 1 << 15
"""Log-probs at chosen ids in one answer, about 1 MB of JSON; one row may have more."""
EXPECTED_BYTES = 34
"""Of `[log-prob, id, null]` in JSON, with 17 digits ..."""
MOST_BYTES = 64
"""... and at most."""


def build_body(ids: list[int], rows: int, k: int, extra_ids: IdLists | None) -> dict[str, Any]:
    """Return the JSON object that requests the log-probs of the last `rows` tokens.

    Nothing is sampled. Versions that do not know flat top log-probs send them nested.
    """
    body: dict[str, Any] = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": len(ids) - rows - 1,
        "top_logprobs_num": k,
        "return_flat_raw_top_logprobs": True,
        "return_flat_raw_top_logprobs_b64": True,
    }
    if extra_ids is not None:
        body["token_ids_logprob"] = np.unique(extra_ids.ids).tolist()
    return body


def count_entries(rows: int, k: int, extra_ids: IdLists | None) -> int:
    """Return the number of log-probs in an answer, with those of the position after the last."""
    union = 0 if extra_ids is None else len(np.unique(extra_ids.ids))
    return (rows + 2) * (1 + k + union)


def divide_rows(extra_ids: IdLists) -> Iterator[slice]:
    """Divide rows into parts of at most PART_ENTRIES: rows of a part times their distinct ids."""
    off = ragged.starts(extra_ids.cnt)
    first, union = 0, set[int]()
    for row in range(len(extra_ids.cnt)):
        ids = extra_ids.ids[int(off[row]) : int(off[row + 1])].tolist()
        if row > first and (row - first + 1) * len(union.union(ids)) > PART_ENTRIES:
            yield slice(first, row)
            first, union = row, set[int]()
        union.update(ids)
    yield slice(first, len(extra_ids.cnt))


def read_answer(
    found: Any, ids: Sequence[int], rows: int, k: int, extra_ids: IdLists | None
) -> ReturnedTopK:
    """Return the log-probs of an answer; AnswerError unless it is complete and for these ids."""
    meta = found.get("meta_info")
    if not isinstance(meta, dict):
        reject_answer("without meta_info")
    reason = meta.get("finish_reason")
    if isinstance(reason, dict) and reason.get("type") == "abort":
        reject_answer(f"that the request was aborted: {reason.get('message')}")
    counted = meta.get("prompt_tokens")
    if counted is not None and counted != len(ids):
        reject_answer(f"for another number of tokens than the {len(ids)} that were sent")
    first = len(ids) - rows
    own = meta.get("input_token_logprobs")
    if not isinstance(own, list) or len(own) != rows + 1:
        count = len(own) if isinstance(own, list) else "no"
        reject_answer(f"log-probs of {count} tokens, and {rows + 1} were requested")
    lp, echoed = _read_entries([[each] for each in own[1:]], 1, first)
    _check_echo(echoed[:, 0], np.array(ids, np.int64), first)
    top_ids, top_lp = _read_topk(meta, rows, k, first)
    place = top_ids == np.array(ids[first:], np.int64)[:, None]
    return ReturnedTopK(
        lp=lp[:, 0].astype(np.float32),
        ids=top_ids,
        top_lp=top_lp.astype(np.float32),
        at=None if extra_ids is None else _read_chosen(meta, rows, extra_ids, first),
        rank=np.where(place.any(1), place.argmax(1) + 1 if k else 0, 0),
    )


def _check_echo(echoed: Array, ids: Array, first: int) -> None:
    """Reject other tokens than were sent. SGLang echoes the last id of its head as 0."""
    sent = ids[first:]
    wrong = (echoed != sent) & ~((echoed == 0) & (sent == ids.max()))
    if wrong.any():
        at = int(wrong.argmax())
        reject_answer(f"position {first + at} without the token {sent[at]} that was sent")


def _read_topk(meta: dict[str, Any], rows: int, k: int, first: int) -> tuple[Array, Array]:
    """Return ([R, k] ids, [R, k] log-probs) in the server's order, of the flat or nested form."""
    if not k:
        return np.zeros((rows, 0), np.int64), np.zeros((rows, 0))
    name = "input_top_logprobs"
    if f"{name}_shape" not in meta:
        nested = _rows_after_first(meta, name, rows)
        top_lp, top_ids = _read_entries(nested, k, first)
        return top_ids, top_lp
    if meta[f"{name}_shape"] != [rows, k] or meta.get(f"{name}_null_prefix") != 1:
        reject_answer(f"best ids of another shape than [{rows}, {k}], after one position")
    top_lp = _unpack(meta, f"{name}_val_flat", "float32", rows * k).reshape(rows, k)
    top_ids = _unpack(meta, f"{name}_idx_flat", "int32", rows * k).reshape(rows, k)
    return top_ids.astype(np.int64), top_lp


def _unpack(meta: dict[str, Any], name: str, dtype: str, count: int) -> Array:
    """Return [count] numbers of base64 little-endian bytes."""
    packed = meta.get(f"{name}_b64")
    if not isinstance(packed, str) or meta.get(f"{name}_b64_dtype") != dtype:
        reject_answer(f"without {name}_b64 in {dtype}")
    if len(packed) > 6 * count + 8:
        reject_answer(f"{len(packed)} characters for {count} numbers")
    try:
        data = base64.b64decode(packed, validate=True)
    except ValueError:
        data = b""
    if len(data) != 4 * count:
        reject_answer(f"{name}_b64 that does not hold {count} numbers")
    found: Array = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))
    return found


def _read_chosen(meta: dict[str, Any], rows: int, extra_ids: IdLists, first: int) -> Array:
    """Return [A] float32, flat, at the chosen ids."""
    union = np.unique(extra_ids.ids).astype(np.int64)
    if not len(union):
        return np.zeros(0, np.float32)
    nested = _rows_after_first(meta, "input_token_ids_logprobs", rows)
    lp, ids = _read_entries(nested, len(union), first)
    if (ids != union).any():
        reject_answer(f"position {first + int((ids != union).any(1).argmax())} with other ids")
    row = ragged.row_of_entry(extra_ids.cnt)
    found: Array = lp[row, np.searchsorted(union, extra_ids.ids)].astype(np.float32)
    return found


def _rows_after_first(meta: dict[str, Any], name: str, rows: int) -> list[Any]:
    """Return the lists of the positions after the first, which has none."""
    found = meta.get(name)
    if not isinstance(found, list) or len(found) != rows + 1 or found[0]:
        count = f"{len(found)} positions" if isinstance(found, list) else "nothing"
        reject_answer(f"{count} in {name}, and an empty one with {rows} after it was requested")
    return found[1:]


def _read_entries(nested: Sequence[Any], width: int, first: int) -> tuple[Array, Array]:
    """Return ([R, width] float64 log-probs, [R, width] ids) of lists of `[log-prob, id, text]`.

    Raises AnswerError that names the first wrong position.
    """
    try:
        return _columns(nested, width)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        for place, row in enumerate(nested, first):
            _check_row(row, width, place)
        raise AssertionError("one position is wrong") from error


def _check_row(row: Any, width: int, place: int) -> None:
    if not isinstance(row, list) or len(row) != width:
        count = len(row) if isinstance(row, list) else "no"
        reject_answer(f"{count} log-probs at position {place}, and {width} were requested")
    try:
        _columns([row], width)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError):
        # orjson writes NaN and infinities as null.
        reject_answer(f"a log-prob at position {place} that is null, NaN or infinite, or no id")


def _columns(nested: Sequence[Any], width: int) -> tuple[Array, Array]:
    """Raise one of several errors where any entry is wrong."""
    if any(len(row) != width for row in nested):
        raise ValueError("another number of entries")
    count = len(nested) * width
    lp = np.fromiter((each[0] for each in chain.from_iterable(nested)), np.float64, count)
    ids = np.fromiter((each[1] for each in chain.from_iterable(nested)), np.int64, count)
    if not np.isfinite(lp).all():
        raise ValueError("a log-prob that is no number")
    return lp.reshape(-1, width), ids.reshape(-1, width)
