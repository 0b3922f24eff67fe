"""Numbers of the viewer as bytes in a text: small integers, their bytes apart, compressed.

    bytes      base64(zlib(length of the header as uint32, header as JSON, columns))
    column     its lowest bytes, then its next ones: neighbours then resemble each other
    NONE       of two bytes stands for no value

assets/viewer_data.js reads it. Least significant bytes come first.
"""

import json
import zlib
from base64 import b64encode
from collections.abc import Mapping
from typing import Any

import numpy as np

from logitcask.engine.types import Array

NONE = 0xFFFF
STEPS = {"nats": 0.001, "shares": 0.0001, "log_probs": 0.005}
"""Value of one unit: the third decimal of nats, 0.01 % of shares, 0.5 % of a probability."""


def quantised(values: Array, step: float) -> Array:
    """Return uint16 multiples of `step`; NaN is NONE, values beyond are the nearest that fit."""
    found = np.clip(np.round(np.nan_to_num(values, posinf=np.inf) / step), 0, NONE - 1)
    codes: Array = np.where(np.isnan(values), NONE, found).astype(np.uint16)
    return codes


def packed(header: Mapping[str, Any], columns: Mapping[str, Array]) -> str:
    """Return the text of a header and columns of uint8, uint16 or uint32."""
    listed = [[name, each.dtype.itemsize, len(each)] for name, each in columns.items()]
    # Escaped, so a lone surrogate of a broken text stays what it is.
    head = json.dumps({**header, "columns": listed}, separators=(",", ":")).encode()
    parts = [np.uint32(len(head)).astype("<u4").tobytes(), head]
    for each in columns.values():
        width = each.dtype.itemsize
        raw = np.ascontiguousarray(each.astype(f"<u{width}")).view(np.uint8)
        parts.append(raw.reshape(-1, width).T.tobytes())
    return b64encode(zlib.compress(b"".join(parts), 7)).decode()
