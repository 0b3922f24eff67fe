"""Sums of metrics over single sequences, and the paired comparison of two models on the same ones.

Positions of one response are not independent, nor are responses to one prompt, so a standard error
is over prompts. A mean is a ratio of sums over all sequences, m = sum_i s_i / sum_i t_i, s the sum
of a metric over the t positions that count; the difference of two models is that of s_b - s_a:

    se(m)^2 = G / (G - 1) sum_g (sum_{i in g} s_i - m t_i)^2 / (sum_i t_i)^2

over the G prompts g (linearised ratio estimator with clusters: Cochran, Sampling Techniques, 3rd
ed., 6.3 and 9A.2). Pairing takes out what a sequence has in common for both models.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.engine.config.parse.strict_json import parse_json
from logitcask.engine.errors import ConfigError, IdentityError
from logitcask.engine.metrics.paper_code import METRICS_RELEASED
from logitcask.engine.probes.metrics import Measured
from logitcask.engine.prompts.source import read_lines
from logitcask.engine.types import Array

SAME = ("store", "snapshot", "snapshot_sha256", "rollouts", "teacher", "teacher_weights")
"""Keys that must be equal in two files that are compared."""
MODEL = ("model", "weights")
"""Keys of the measured model."""
HINT = "write both files by `logitcask probe metrics --per-sequence FILE` of this version"


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceSums:
    """Sums over each of N sequences, of one model on the rows of a snapshot."""

    source: Mapping[str, Any]
    """Value of each key of SAME and MODEL."""
    prompt: tuple[str, ...]
    """[N] id of the prompt."""
    number: Array
    """[N] int64, as `store show --sequence` counts them."""
    tokens: Array
    """[N] float64, above 0: sum of the loss mask."""
    sums: Mapping[str, Array]
    """Metric -> [N] float64, sum over these tokens; NaN where it is not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A metric of two models, a and b: means per token, nats where it is one."""

    metric: str
    a: float | None
    b: float | None
    ratio: float | None
    """b / a."""
    difference: float | None
    """b - a."""
    se: float | None
    """Standard error of the difference, over prompts; None for one prompt."""
    z: float | None
    """difference / se."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    a: Mapping[str, Any]
    """Measured model, as MODEL."""
    b: Mapping[str, Any]
    sequences: int
    prompts: int
    tokens: float
    differences: tuple[Difference, ...]


def sum_sequences(
    found: Measured, *, prompt: tuple[str, ...], number: Array, source: Mapping[str, Any]
) -> SequenceSums:
    """Sum the metrics of the rows that count; `prompt` and `number` are those of the sequences.

    Sequences without such a row are left out, and so are the metrics of the paper's released code,
    whose means are over other counts.
    """
    counted, n = found.weight > 0, len(number)
    of, weight = found.sequence[counted], found.weight[counted]
    tokens = np.bincount(of, weight, n)
    sums = {
        name: np.bincount(of, weight * values[counted], n)
        for name, (values, _) in found.sums.items()
        if name not in METRICS_RELEASED
    }
    order = [i for i in np.argsort(number, kind="stable").tolist() if tokens[i] > 0]
    return SequenceSums(
        source=source,
        prompt=tuple(prompt[i] for i in order),
        number=number[order],
        tokens=tokens[order],
        sums={name: np.where(np.isfinite(x), x, np.nan)[order] for name, x in sums.items()},
    )


def sequence_lines(found: SequenceSums) -> Iterator[str]:
    """Yield one JSON object with a newline for each sequence."""
    for i, prompt in enumerate(found.prompt):
        sums = {name: float(values[i]) for name, values in found.sums.items()}
        line = {
            **found.source,
            "prompt": prompt,
            "sequence": int(found.number[i]),
            "tokens": float(found.tokens[i]),
            "sums": {name: None if math.isnan(value) else value for name, value in sums.items()},
        }
        yield json.dumps(line, allow_nan=False) + "\n"


def read_sequences(file: Path) -> SequenceSums:
    """Read the lines of `sequence_lines`.

    Raises ConfigError for a file that cannot be read or holds other lines, PromptError for a line
    that is no text or is too long.
    """
    source: dict[str, Any] = {}
    prompt: list[str] = []
    rows: list[tuple[int, float]] = []
    sums: list[dict[str, Any]] = []
    try:
        with file.open("rb") as stream:
            for number, text in read_lines(file, stream):
                line = _checked(file, number, text)
                own = {key: line[key] for key in (*SAME, *MODEL)}
                if own != (source or own) or (sums and line["sums"].keys() != sums[0].keys()):
                    raise _bad(file, number, "it is of another measurement than the first line")
                source = own
                prompt.append(line["prompt"])
                rows.append((line["sequence"], line["tokens"]))
                sums.append(line["sums"])
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read: {error.strerror or error}",
            hint="give the path of a file of `logitcask probe metrics --per-sequence`",
        ) from error
    if not rows:
        raise ConfigError(f"{file} holds no sequence", hint=HINT)
    numbers = np.array([each for each, _ in rows], np.int64)
    if len(np.unique(numbers)) < len(numbers):
        raise ConfigError(f"{file} holds a sequence twice", hint=HINT)
    return SequenceSums(
        source=source,
        prompt=tuple(prompt),
        number=numbers,
        tokens=np.array([each for _, each in rows], np.float64),
        sums={name: np.array([each[name] for each in sums], np.float64) for name in sums[0]},
    )


def compare(a: SequenceSums, b: SequenceSums) -> Comparison:
    """Compare two models on the same sequences, by each metric that both files have.

    Raises IdentityError where rows, teacher or snapshot differ.
    """
    for key in SAME:
        if a.source[key] != b.source[key]:
            raise IdentityError(
                f"{key} = {a.source[key]!r:.80} in the first file, {b.source[key]!r:.80} in the "
                "second",
                hint="measure both models on the same rows and snapshot (--snapshot), by the same "
                "teacher",
            )
    place = {number: i for i, number in enumerate(b.number.tolist())}
    order = [place.get(number, -1) for number in a.number.tolist()]
    same = len(order) == len(place) and -1 not in order
    same = same and a.prompt == tuple(b.prompt[i] for i in order)
    if not same or a.tokens.tolist() != b.tokens[order].tolist():
        raise IdentityError("the two files hold other sequences", hint=HINT)
    if not a.sums.keys() & b.sums.keys():
        raise IdentityError("the two files have no metric in common", hint=HINT)
    cluster = np.unique(np.array(a.prompt), return_inverse=True)[1]
    return Comparison(
        a={key: a.source[key] for key in MODEL},
        b={key: b.source[key] for key in MODEL},
        sequences=len(a.number),
        prompts=int(cluster.max()) + 1,
        tokens=float(a.tokens.sum()),
        differences=tuple(
            _difference(name, values, b.sums[name][order], a.tokens, cluster)
            for name, values in a.sums.items()
            if name in b.sums
        ),
    )


def ratio_and_error(sums: Array, tokens: Array, cluster: Array) -> tuple[float, float]:
    """Return (sum of `sums` / sum of `tokens`, its standard error over clusters), each [N].

    The error is NaN with one cluster.
    """
    mean = float(sums.sum() / tokens.sum())
    residual = np.bincount(cluster, sums - mean * tokens)[np.unique(cluster)]
    scale = len(residual) / (len(residual) - 1) if len(residual) > 1 else math.nan
    return mean, math.sqrt(scale * float((residual**2).sum())) / float(tokens.sum())


def _difference(name: str, a: Array, b: Array, tokens: Array, cluster: Array) -> Difference:
    first, second = (float(each.sum() / tokens.sum()) for each in (a, b))
    difference, error = ratio_and_error(b - a, tokens, cluster)
    return Difference(
        metric=name,
        a=_known(first),
        b=_known(second),
        ratio=_known(second / first) if first else None,
        difference=_known(difference),
        se=_known(error),
        z=_known(difference / error) if error else None,
    )


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _checked(file: Path, number: int, text: str) -> dict[str, Any]:
    """Return the object of a line whose keys and values have the right types."""
    try:
        line = parse_json(text)
    except ValueError as error:
        raise _bad(file, number, str(error)) from error
    if not isinstance(line, dict):
        raise _bad(file, number, "it is no JSON object")
    kinds: dict[str, Any] = {"prompt": str, "sequence": int, "tokens": (int, float), "sums": dict}
    for key in (*SAME, *MODEL, *kinds):
        if key not in line:
            raise _bad(file, number, f"it has no key {key!r}")
    for key, kind in kinds.items():
        if not isinstance(line[key], kind) or isinstance(line[key], bool):
            raise _bad(file, number, f"{key} = {line[key]!r:.80}")
    if not 0 <= line["sequence"] < 1 << 62 or not 0 < line["tokens"] < 1 << 62:
        raise _bad(file, number, "its sequence or its tokens are out of range")
    for name, value in line["sums"].items():
        if value is not None and type(value) not in (int, float):
            raise _bad(file, number, f"sums[{name!r:.80}] = {value!r:.80} is no number")
        if type(value) is int and abs(value) > 1 << 62:
            raise _bad(file, number, f"sums[{name!r:.80}] is out of range")
    return line


def _bad(file: Path, number: int, cause: str) -> ConfigError:
    return ConfigError(f"{file}, line {number}: {cause}", hint=HINT)
