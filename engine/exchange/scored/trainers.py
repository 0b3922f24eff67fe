"""Stored scores as the data sets of other trainers: DistillKit, axolotl and TRL.

Each row is a sequence: the ids of prompt and response, and the teacher's k best ids at every token.
One segment is read at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from logitcask.engine.errors import ConfigError, IncompleteError, StoreError
from logitcask.engine.events import EventHandler
from logitcask.engine.exchange.parquet import (
    SUFFIX,
    ExportReport,
    file_name,
    need,
    report_of,
    write_files,
)
from logitcask.engine.exchange.positions import Selection, select
from logitcask.engine.exchange.scored import distillkit
from logitcask.engine.models.digests import replace_text
from logitcask.engine.store import Snapshot, Store
from logitcask.engine.store.format.layouts import ranked
from logitcask.engine.store.format.ragged import matrix, starts
from logitcask.engine.types import Array, CachedScores, Progress, Rollouts, no_progress

IGNORED = -100
"""Label of a token without loss, as in transformers."""
SEQUENCES = 64  # of a table
_MASKED = -1e9
"""Log-prob of a masked entry, as axolotl's collator pads."""
_LEAST = -1e4
"""Log-prob of an id without mass: with -inf the losses of these trainers are NaN."""
_LOST = (
    "the entropy, the mass outside of the k ids as a number of its own, and all values of the "
    "student: log-probs of the draws, top-k, versions, rewards"
)
LOST = {
    "axolotl": (
        f"not in the files: {_LOST}; the teacher's log-probs are divided by their sum over the k "
        "ids, as axolotl's own preparation does",
    ),
    "distillkit": (
        f"not in the files: {_LOST}",
        "positions of prompts and of other turns have no score: their values are fillers, which "
        "labels = -100 masks, so keep that column",
        "DistillKit masks its KL by labels[i] and its cross entropy by labels[i + 1]: the labels "
        "are those of the KL, so cross_entropy counts the last id of a prompt and not the last of "
        "a response",
    ),
    "trl": (f"not in the files: {_LOST}",),
}
"""Format -> lines about values that its files do not hold."""
Trainer = Literal["axolotl", "distillkit", "trl"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Sequences one after the other: T tokens, of which R are scored."""

    lengths: Array
    """[N] tokens of each sequence."""
    ids: Array
    """[T] int64."""
    at: Array
    """[R] index of each scored token that counts."""
    top: Array
    """[R, k] int64, the teacher's best ids for it, best first."""
    top_lp: Array
    """[R, k] float32, their log-probs."""
    lp: Array
    """[R] float32, log-prob of the token."""


def export_trainer(
    store: Store,
    target: Path,
    kind: Trainer,
    *,
    k: int | None = None,
    snapshot: Snapshot | None = None,
    rollouts: str | None = None,
    teacher: str | None = None,
    force: bool = False,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> ExportReport:
    """Write the sequences and the teacher's top-k as the data set of a trainer.

    k: ids of each position; None = as many as every position has, `--teacher-topk-min` of the
    scores. Lines about values that the format does not hold go to `on_event` before a file is
    written. Raises ConfigError for a k that some position lacks, for drawn ids and for a target in
    use, IncompleteError without scores, StoreError where the target cannot be written.
    """
    arrow = need("pyarrow")
    snapshot = store.head() if snapshot is None else snapshot
    selection = select(snapshot, rollouts=rollouts, teacher=teacher)
    k = _checked_k(selection, k)
    config = distillkit.exact(k, _vocabulary(selection)) if kind == "distillkit" else None
    names = [file_name(selection, i, kind, k) for i in range(len(selection.segments))]
    columns = _COLUMNS[kind]
    schema = arrow.schema([(name, _type(arrow, of)) for name, of in columns.items()])
    for line in LOST[kind]:
        on_event(line)
    if config is not None:
        _write_config(target, config)
    make = _MAKERS[kind] if config is None else partial(_distillkit, config=config)

    def tables(index: int) -> Iterator[Any]:
        for table in _tables(store, selection, index, k):
            made = make(table)
            arrays = [
                _array(arrow, field.type, made[field.name], table.lengths) for field in schema
            ]
            yield arrow.Table.from_arrays(arrays, schema=schema)

    written = write_files(target, names, schema, tables, force=force, progress=progress)
    return report_of(selection, snapshot, written)


def _checked_k(selection: Selection, k: int | None) -> int:
    requests = []
    for segment, scores in selection.segments:
        if not scores:
            raise IncompleteError(
                f"rollouts {segment.seg_id} have no scores, and this format is of a teacher's",
                hint="run `logitcask score` first, or --format parquet",
            )
        requests.append(scores[0].provenance["request"])
    if any(each.get("selection", "top-p") == "sampled" for each in requests):
        raise ConfigError(
            f"teacher {selection.teacher!r} has scores at drawn ids, and this format is of top ids",
            hint="score with --selection top-k or top-p under another name",
        )
    least = min((int(each["teacher_topk_min"]) for each in requests), default=0)
    if not 1 <= (k or least) <= least:
        raise ConfigError(
            f"k = {k or least}, and every position has {least} of the teacher's best ids",
            hint=f"give --k {least} or less, or score again with a larger --teacher-topk-min"
            if least
            else "score with --teacher-topk-min of 1 or more",
        )
    return k or least


def _vocabulary(selection: Selection) -> int:
    """Return the ids of the vocabulary: of the student, else of the teacher."""
    for segment, scores in selection.segments:
        for provenance, role in (
            (segment.provenance, "student"),
            (scores[0].provenance, "teacher"),
        ):
            if type(size := provenance.get(role, {}).get("n_vocab")) is int:
                return int(size)
    cause = "neither rollouts nor scores record the size of the vocabulary, which DistillKit needs"
    raise StoreError(cause, hint="export with --format trl or axolotl")


def _write_config(target: Path, config: distillkit.Compression) -> None:
    """Write the configuration, which belongs to the files, before them."""
    if target.suffix == SUFFIX:
        raise ConfigError(
            f"{target} is one file, and {distillkit.CONFIG} belongs next to it",
            hint=f"give a folder: {target.with_suffix('')}",
        )
    text = yaml.safe_dump(config.model_dump(mode="json"))
    file = target / distillkit.CONFIG
    if file.exists() and file.read_text() != text:
        raise ConfigError(
            f"{file} is of another export", hint="give another folder: it holds other files"
        )
    try:
        target.mkdir(parents=True, exist_ok=True)
        replace_text(file, text)
    except OSError as error:
        raise StoreError(
            f"cannot write {file}: {error.strerror or error}", hint="give another folder"
        ) from error


def _tables(store: Store, selection: Selection, index: int, k: int) -> Iterator[Table]:
    """Read a segment and its scores, and yield its sequences in tables."""
    segment, score_segments = selection.segments[index]
    data = store.read_rollouts(segment)
    scores = store.read_scores(score_segments, base=data)
    ids, lp, counts = _best(scores, data, k)
    for first in range(0, len(data.seq_prompt), SEQUENCES):
        part = slice(first, first + SEQUENCES)
        if (table := _table(data, scores, ids, lp, counts, part)) is not None:
            yield table


def _best(scores: CachedScores, data: Rollouts, k: int) -> tuple[Array, Array, Array]:
    """Return the k best ids and log-probs, [P, k] each, and [P] bool: scored, and counts."""
    cnt, ids, lp = ranked(scores)
    counts = data.loss_mask != 0
    if scores.scored is not None:
        counts &= scores.scored
    if (scores.kept[counts] < k).any():
        raise StoreError(
            f"a position has {int(scores.kept[counts].min())} of the teacher's best ids, fewer "
            "than its scores record",
            hint="run `logitcask store verify --deep`",
        )
    wide, _ = matrix(ids.astype(np.int64), cnt, 0)
    wide_lp, _ = matrix(lp, cnt, -np.inf)
    if wide.shape[1] < k:  # no position is scored
        wide, wide_lp = np.zeros((len(cnt), k), np.int64), np.zeros((len(cnt), k), np.float32)
    return wide[:, :k], np.maximum(wide_lp[:, :k], _LEAST), counts


def _table(
    data: Rollouts, scores: CachedScores, ids: Array, lp: Array, counts: Array, part: slice
) -> Table | None:
    """Return the sequences of a part that have a token to train on; None where none has."""
    pieces, at, row, lengths = list[Array](), list[Array](), list[Array](), list[int]()
    for number in range(len(data.seq_prompt))[part]:
        low, high = data.seq_off[number : number + 2].tolist()
        rows = low + np.flatnonzero(counts[low:high])
        if not len(rows):
            continue
        prompt = data.prompts[data.seq_prompt[number]].token_ids
        pieces += [np.asarray(prompt, np.int64), data.tokens[low:high].astype(np.int64)]
        row.append(rows)
        at.append(sum(lengths) + len(prompt) + rows - low)
        lengths.append(len(prompt) + high - low)
    if not lengths:
        return None
    rows = np.concatenate(row)
    return Table(
        lengths=np.array(lengths, np.int64),
        ids=np.concatenate(pieces),
        at=np.concatenate(at),
        top=ids[rows],
        top_lp=lp[rows],
        lp=scores.lp[rows],
    )


def _axolotl(table: Table) -> dict[str, Array]:
    """Return axolotl's columns of prepared data: row i of the targets predicts token i + 1.

    axolotl.integrations.kd shifts the labels of its cross entropy, and no targets (0.19).
    """
    count, k = len(table.ids), table.top.shape[1]
    labels = np.full(count, IGNORED, np.int64)
    labels[table.at] = table.ids[table.at]
    ids = np.tile(np.arange(k), (count, 1))
    lp, mask = np.full((count, k), _MASKED, np.float32), np.zeros((count, k), np.int64)
    values = table.top_lp.astype(np.float64)
    total = np.logaddexp.reduce(values, axis=1, keepdims=True)
    before = table.at - 1
    ids[before], lp[before], mask[before] = table.top, values - total, 1
    return {
        "input_ids": table.ids,
        "attention_mask": np.ones(count, np.int64),
        "labels": labels,
        "target_token_ids": ids,
        "target_logprobs": lp,
        "target_mask": mask,
    }


def _distillkit(table: Table, config: distillkit.Compression) -> dict[str, Array]:
    """Return DistillKit's columns: row i of the bytes predicts token i + 1."""
    count, k, before = len(table.ids), table.top.shape[1], table.at - 1
    labels = np.full(count, IGNORED, np.int64)
    labels[before] = table.ids[before]
    ids = np.tile(np.arange(k), (count, 1))
    lp = np.full((count, k), -np.log(config.d), np.float32)
    ids[before], lp[before] = table.top, table.top_lp
    logprobs, packed = distillkit.encode(ids, lp, config)
    return {
        "input_ids": table.ids,
        "labels": labels,
        distillkit.LOGPROBS: logprobs,
        distillkit.IDS: packed,
    }


def _trl(table: Table) -> dict[str, Array]:
    """Return the columns of TRL's RolloutSample: entry i of the top-k is about token i.

    The token itself is an entry too; -1 and -inf pad.
    """
    count, k = len(table.ids), table.top.shape[1]
    mask = np.zeros(count, np.int64)
    mask[table.at] = 1
    ids = np.full((count, k + 1), -1, np.int64)
    lp = np.full((count, k + 1), -np.inf, np.float32)
    ids[table.at, :k], lp[table.at, :k] = table.top, table.top_lp
    alone = (table.top != table.ids[table.at][:, None]).all(1)
    ids[table.at[alone], k] = table.ids[table.at[alone]]
    lp[table.at[alone], k] = table.lp[alone]
    return {
        "input_ids": table.ids,
        "completion_mask": mask,
        "teacher_topk_ids": ids,
        "teacher_topk_logprobs": lp,
    }


_MAKERS: dict[str, Callable[[Table], dict[str, Array]]] = {"axolotl": _axolotl, "trl": _trl}
_COLUMNS = {
    "axolotl": {
        **dict.fromkeys(("input_ids", "attention_mask", "labels"), "list<int64>"),
        "target_token_ids": "list<list<int64>>",
        "target_logprobs": "list<list<float32>>",
        "target_mask": "list<list<int64>>",
    },
    "distillkit": {
        "input_ids": "list<uint64>",
        "labels": "list<int64>",
        **dict.fromkeys((distillkit.LOGPROBS, distillkit.IDS), "list<list<uint8>>"),
    },
    "trl": {
        "input_ids": "list<int64>",
        "completion_mask": "list<int64>",
        "teacher_topk_ids": "list<list<int64>>",
        "teacher_topk_logprobs": "list<list<float32>>",
    },
}
"""Format -> column -> type of a sequence's value."""


def _type(arrow: Any, name: str) -> Any:
    if name.startswith("list<"):
        return arrow.list_(_type(arrow, name[5:-1]))
    return getattr(arrow, name)()


def _array(arrow: Any, kind: Any, values: Array, lengths: Array) -> Any:
    """Return [T] or [T, n] values as one list, or list of lists, for each sequence."""
    if values.ndim == 1:
        inner = arrow.array(values, kind.value_type)
    else:
        count, width = values.shape
        flat = arrow.array(values.reshape(-1), kind.value_type.value_type)
        ends = arrow.array((np.arange(count + 1) * width).astype(np.int32))
        inner = arrow.ListArray.from_arrays(ends, flat, type=kind.value_type)
    offsets = arrow.array(starts(lengths).astype(np.int32))
    return arrow.ListArray.from_arrays(offsets, inner, type=kind)
