"""Spans of two tokenizations of one text: between two bytes where both have a boundary."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from logitcask.engine.alignment.token_bytes import CONTROL, TokenBytes
from logitcask.engine.errors import UnitError
from logitcask.engine.types import Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Spans:
    """Finest pieces of a text that are whole tokens on both sides, in the order of the text."""

    rows: Array
    """[S, 4] int64: tokens [a0, a1) of one side and [b0, b1) of the other spell the same bytes."""
    bytes: int
    """Of the text within the spans; a text without gaps has all of its bytes there."""

    def sums(self, log_probs: Array, side: int) -> Array:
        """Return [S] float64, nats: the log-prob of each span by the chain rule.

        log_probs: [n] of the realised tokens of side 0 or 1.
        """
        total = np.concatenate([[0.0], np.cumsum(log_probs.astype(np.float64))])
        found: Array = total[self.rows[:, 2 * side + 1]] - total[self.rows[:, 2 * side]]
        return found


def align(
    a: TokenBytes,
    ids_a: Array,
    b: TokenBytes,
    ids_b: Array,
    *,
    roles: Mapping[int, int] | None = None,
    lead: tuple[int, int] = (0, 0),
) -> Spans:
    """Return the finest common segmentation of two sequences of ids of one text.

    roles: control token of a -> that of b with the same meaning, such as the end of a turn; two of
    them at the same byte are a span of their own, without bytes. Others are in no span, and a span
    that one of them would stand inside is left out: the model has read it between the bytes. lead:
    bytes of each side that are not in the text. Raises UnitError where the two spell texts of other
    lengths.
    """
    lengths_a, lengths_b = a.lengths[ids_a], b.lengths[ids_b]
    ends_a = np.cumsum(np.maximum(lengths_a, 0)) - lead[0]
    ends_b = np.cumsum(np.maximum(lengths_b, 0)) - lead[1]
    size, other = (int(ends[-1]) if len(ends) else 0 for ends in (ends_a, ends_b))
    if size != other:
        raise UnitError(
            f"two tokenizations of one text spell {size} and {other} bytes",
            hint="encode the bytes that the first one spells, see ByteEncoder",
        )
    text_a, text_b = np.flatnonzero(lengths_a > 0), np.flatnonzero(lengths_b > 0)
    _, at_a, at_b = np.intersect1d(
        ends_a[text_a], ends_b[text_b], assume_unique=True, return_indices=True
    )
    rows = np.stack(
        [
            *(text_a[_begins(at_a)], text_a[at_a] + 1),
            *(text_b[_begins(at_b)], text_b[at_b] + 1),
        ],
        axis=1,
    )
    inside = _controls(lengths_a, rows[:, :2]) | _controls(lengths_b, rows[:, 2:])
    rows = rows[~inside]
    size = int((ends_a[rows[:, 1] - 1] - ends_a[rows[:, 0]] + lengths_a[rows[:, 0]]).sum())
    if len(rows) and rows[0, 0] == (text_a[0] if len(text_a) else -1):
        size -= lead[0]
    paired = _paired(ids_a, lengths_a, ends_a, ids_b, lengths_b, ends_b, roles or {})
    rows = np.concatenate([rows, paired])
    return Spans(rows=rows[np.argsort(rows[:, 0], kind="stable")], bytes=size)


def _begins(at: Array) -> Array:
    """Return the first token of each span, from its last."""
    found: Array = np.concatenate([[0], at[:-1] + 1])[: len(at)].astype(np.int64)
    return found


def _controls(lengths: Array, spans: Array) -> Array:
    """Return [S] bool, spans with a token without text among theirs."""
    count = np.concatenate([[0], np.cumsum(lengths == CONTROL)])
    found: Array = count[spans[:, 1]] > count[spans[:, 0]]
    return found


def _paired(
    ids_a: Array,
    lengths_a: Array,
    ends_a: Array,
    ids_b: Array,
    lengths_b: Array,
    ends_b: Array,
    roles: Mapping[int, int],
) -> Array:
    """Return [C, 4], the control tokens with a partner at the same byte, each of them once."""
    waiting: dict[tuple[int, int], list[int]] = {}
    for j in np.flatnonzero(lengths_b == CONTROL).tolist():
        waiting.setdefault((int(ids_b[j]), int(ends_b[j])), []).append(j)
    found = []
    for i in np.flatnonzero(lengths_a == CONTROL).tolist():
        partners = waiting.get((roles.get(int(ids_a[i]), -1), int(ends_a[i])))
        if partners:
            j = partners.pop(0)
            found.append((i, i + 1, j, j + 1))
    return np.array(found, np.int64).reshape(-1, 4)
