"""The beginning of a response in a sequence of ids."""

from collections.abc import Sequence

import numpy as np

from logitcask.engine.types import Array


def after(ids: Array, marker: Sequence[int]) -> int:
    """Return the tokens up to the last occurrence of a marker, its own included.

    0 where it does not occur, or nothing follows it.
    """
    width = len(marker)
    if not 0 < width < len(ids):
        return 0
    starts = len(ids) - width + 1
    same = [ids[at : at + starts] == each for at, each in enumerate(marker)]
    found = np.flatnonzero(np.all(same, axis=0))
    end = int(found[-1]) + width if len(found) else 0
    return end if end < len(ids) else 0
