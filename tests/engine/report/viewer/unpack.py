"""The packed data of the viewer, read as assets/viewer/data.js does."""

import base64
import json
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from logitcask.engine.report.viewer.pack import NONE

LISTS = ("log_prob", "log_p", "at_student")


def unpack(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return (header, columns); columns of two bytes are values, NaN where there is none."""
    raw = zlib.decompress(base64.b64decode(data["data"]))
    end = 4 + int.from_bytes(raw[:4], "little")
    header, columns = json.loads(raw[4:end]), {}
    for name, width, count in header["columns"]:
        planes = np.frombuffer(raw, np.uint8, width * count, end).reshape(width, count)
        end += width * count
        codes = sum(planes[i].astype(np.int64) << 8 * i for i in range(width))
        columns[name] = codes if width != 2 or _is_id(name) else _values(name, codes, header)
    assert end == len(raw)
    return header, columns


def _is_id(name: str) -> bool:
    return name.endswith(("_id", "token"))


def _values(name: str, codes: np.ndarray, header: dict[str, Any]) -> np.ndarray:
    nats = ("surprise", "entropy", "kl", "span_student", "span_teacher")
    sign = -1 if name.endswith(LISTS) else 1
    kind = "log_probs" if name.endswith(LISTS) else "nats" if name.endswith(nats) else "shares"
    return np.where(codes == NONE, np.nan, sign * codes * header["steps"][kind])


def positions_of(header: dict[str, Any], columns: dict[str, np.ndarray]) -> Iterator[dict]:
    """Yield a mapping for each position of each response, with the numbers of the first teacher."""
    row = scored = entry = own = 0
    ids = columns["text_id"]
    for sequence in header["sequences"]:
        has = bool(sequence["teachers"])
        for position in range(sequence["length"]):
            student = slice(entry, entry + int(columns["student_count"][row]))
            found = {
                "sequence": sequence["number"],
                "position": position,
                "token": int(ids[columns["token"][row]]),
                "text": header["texts"][columns["token"][row]],
                "student": dict(
                    zip(
                        ids[columns["student_id"][student]].tolist(),
                        columns["student_log_prob"][student].tolist(),
                        strict=True,
                    )
                ),
                **{
                    name: columns[name][row]
                    for name in ("flags", "student_surprise", "student_entropy", "student_tail")
                },
            }
            if has:
                mine = slice(own, own + int(columns["0.own_count"][scored]))
                found["own"] = dict(
                    zip(
                        ids[columns["0.own_id"][mine]].tolist(),
                        columns["0.own_log_prob"][mine].tolist(),
                        strict=True,
                    )
                )
                found["at_student"] = columns["0.at_student"][student].tolist()
                found |= {
                    ("teacher_flags" if name == "0.flags" else name[2:]): values[scored]
                    for name, values in columns.items()
                    if name.startswith("0.") and len(values) == len(columns["0.flags"])
                }
                own, scored = mine.stop, scored + 1
            entry, row = student.stop, row + 1
            yield found
