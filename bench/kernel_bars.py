"""Bars of the kernels, computed from rows of one device.

A ratio compares two rows of one run on one machine. A bar without its rows is not listed; a missed
bar is.
"""

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
STEPS = 40
"""Updates from one with metrics to the next: metric_sampling.STEPS, which a test compares."""
V = 151_936
"""Qwen3's vocabulary: bars are set at this size."""


def newest(rows: list[Row]) -> list[Row]:
    """Return the rows of the last run of each (device, dtype, section, shape)."""
    last: dict[str, int] = {}
    for row in rows:
        last[_subject(row)] = row["started"]
    return [row for row in rows if row["started"] == last[_subject(row)]]


def _subject(row: Row) -> str:
    return str([row.get(key) for key in ("device", "dtype", "section", "shape", "what")])


def bars(rows: list[Row], device: str) -> list[Row]:
    """Return {bar, value, met} of every bar of the device that has its rows."""
    found = [row for row in newest(rows) if row["device"] == device and row["status"] == "ok"]
    made = _cpu(found) if device == "cpu" else _gpu(found)
    return [bar for bar in made if bar is not None]


def _pick(rows: list[Row], section: str, provider: str, T: int, K: int, H: int = 0) -> Row | None:
    for row in rows:
        s = row.get("shape", {})
        if (row["section"], row.get("provider"), s.get("V")) != (section, provider, V):
            continue
        if (s["T"], s["K"]) == (T, K) and H in (0, s["H"]):
            return row
    return None


def _at_least(text: str, least: float, value: float | None) -> Row | None:
    if value is None:
        return None
    return {"bar": f"{text} >= {least:g}", "value": value, "met": value >= least}


def _at_most(text: str, most: float, value: float | None) -> Row | None:
    if value is None:
        return None
    return {"bar": f"{text} <= {most:g}", "value": value, "met": value <= most}


def _over(key: str, one: Row | None, other: Row | None) -> float | None:
    """Return one / other; None if a row or its value is missing."""
    if one is None or other is None or one.get(key) is None or not other.get(key):
        return None
    return float(one[key] / other[key])


def _memory_ratio(one: Row | None, other: Row | None) -> float | None:
    """Return the ratio of peak bytes without the gradient by the logits, which both need."""
    if one is None or other is None or None in (one["peak_bytes"], other["peak_bytes"]):
        return None
    gradient = 4 * one["shape"]["T"] * one["shape"]["V"]
    return float((one["peak_bytes"] - gradient) / (other["peak_bytes"] - gradient))


def _value(row: Row | None, of: Callable[[Row], float]) -> float | None:
    return None if row is None else of(row)


def mean_of_train(without: Row | None, measured: Row | None) -> float | None:
    """Return the mean ms of an update of `train`, of which one in STEPS has metrics."""
    if without is None or measured is None:
        return None
    return float(without["ms"] + (measured["ms"] - without["ms"]) / STEPS)


def _price(without: Row | None, measured: Row | None) -> float | None:
    mean = mean_of_train(without, measured)
    return None if mean is None or without is None else mean / without["ms"] - 1


def _cpu(rows: list[Row]) -> list[Row | None]:
    def logits(name: str) -> Row | None:
        return _pick(rows, "logits", name, 128, 64)

    def indexed(name: str, T: int = 1024) -> Row | None:
        return _pick(rows, "indexed", name, T, 16, 1024)

    def plain(text: str, slow: Row | None, ours: Row | None) -> Row | None:
        name = (
            ""
            if slow is None or ours is None
            else f": `{slow['provider']}` over `{ours['provider']}`"
        )
        return _at_least(f"best plain torch, {text}{name}", 1, _over("ms", slow, ours))

    hidden = (_pick(rows, "hidden", name, 128, 64) for name in ("closed", "ours"))
    top = (_pick(rows, "topk", name, 128, 64) for name in ("torch", "ours"))
    best = [
        plain("from logits, all metrics, 128 rows", logits("closed"), logits("ours")),
        plain("from hidden states, all metrics, 128 rows", *hidden),
        plain("top-k, 128 rows", *top),
        plain("live support, 1024 rows", indexed("closed-live"), indexed("ours-live")),
        plain("live support, frozen head, 1024 rows", indexed("closed-live-frozen"),
              indexed("ours-live-frozen")),
        *(
            plain(f"known support, {text}{T} rows", indexed(f"gathered{end}", T),
                  indexed(f"ours-teacher{end}", T))
            for T in (1024, 4096)
            for text, end in (("", ""), ("head's gradient as rows, ", "-rows"),
                              ("frozen head, ", "-frozen"))
        ),
    ]  # fmt: skip
    eager, ours = logits("eager"), logits("ours")
    mean = mean_of_train(indexed("train"), indexed("train-metrics"))
    return [
        *sorted((bar for bar in best if bar), key=lambda bar: float(bar["value"])),
        *(
            _at_most(f"metrics of `train`, 1024 rows, over an update's loss, {text}", 0.2,
                     _price(indexed(name), indexed(f"{name}-metrics")))
            for name, text in (("train-frozen", "frozen head"), ("train", "dense gradient"))
        ),
        *(
            _at_least(f"`{peer}` over what `train` runs with its metrics, 1024 rows", 3,
                      _value(indexed(peer), lambda row: row["ms"] / mean) if mean else None)
            for peer in ("distillkit", "trl", "verl")
        ),
        *(
            _at_most(f"peak memory, 1024 rows: `ours-teacher` over `{peer}`", 0.5,
                     _over("peak_bytes", indexed("ours-teacher"), indexed(peer)))
            for peer in ("distillkit", "trl", "verl", "dense")
        ),
        _at_least("from logits, all metrics, 128 rows: `eager` over `ours`", 2,
                  _over("ms", eager, ours)),
        _at_most("the same, peak memory without the gradient: `ours` over `eager`", 0.25,
                 _memory_ratio(ours, eager)),
        _at_least("student's live support, 1024 rows: `dense-live` over `ours-live`", 2.5,
                  _over("ms", indexed("dense-live"), indexed("ours-live"))),
        _at_least("known support, 1024 rows: `dense` over `ours-teacher`", 20,
                  _over("ms", indexed("dense"), indexed("ours-teacher"))),
    ]  # fmt: skip


def _gpu(rows: list[Row]) -> list[Row | None]:
    scan = next(
        (r for r in rows if (r.get("what"), r.get("setting")) == ("scan", "as shipped")), None
    )
    share = _value(scan, lambda row: row["of_copy"])
    made = [_at_least("statistics of 4096 rows: share of the copy rate", 0.85, share)]
    for K, most in ((16, 1.15), (64, 1.30)):
        ours = _pick(rows, "logits", "ours", 4096, K)
        name = f"from logits, all metrics, 4096 rows, k={K}"
        made.append(_at_most(f"{name}: ms", most, _value(ours, lambda row: row["ms"])))
        for peer, least in (("eager", 8), ("compile", 3)):
            ratio = _over("ms", _pick(rows, "logits", peer, 4096, K), ours)
            made.append(_at_least(f"{name}: `{peer}` over `ours`", least, ratio))
        peak = _value(ours, lambda row: row["peak_bytes"] / (4096 * V * 2))
        made.append(_at_most(f"{name}: peak memory over the logits' size", 1.5, peak))
    hidden = _pick(rows, "hidden", "ours", 8192, 64, 4096)
    name = "from hidden states, 8192 rows, H=4096"
    share, peak = _value(hidden, lambda row: row["of_limit"]), _value(hidden, _memory_in_chunks)
    made.append(_at_least(f"{name}: share of the products' limit", 0.9, share))
    made.append(
        _at_most(f"{name}: peak memory without gradients, over a chunk of 4096 rows", 1.5, peak)
    )
    for text, least, slow, fast in (
        ("teacher's support", 15, "dense", "ours-teacher"),
        ("student's live support", 2.2, "dense-live", "ours-live"),
        ("the same, frozen head", 2.5, "dense-live-frozen", "ours-live-frozen"),
    ):
        both = [_pick(rows, "indexed", provider, 4096, 16, 4096) for provider in (slow, fast)]
        name = f"{text}, 4096 rows, H=4096: `{slow}` over `{fast}`"
        made.append(_at_least(name, least, _over("ms", *both)))
    return made


def _memory_in_chunks(row: Row) -> float:
    """Return peak bytes over a chunk of logits, without gradients and the head's float32 sum."""
    s = row["shape"]
    gradients = 2 * s["T"] * s["H"] + (2 + 4) * s["V"] * s["H"]
    return float((row["peak_bytes"] - gradients) / (4096 * s["V"] * 2))
