"""Texts with a teacher's log-probs -> sequences: DistillKit's Parquet and axolotl's rows."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.engine.backends.returned import ROUNDING
from logitcask.engine.errors import PromptError
from logitcask.engine.exchange.chat import TextReader
from logitcask.engine.exchange.imported import Imported
from logitcask.engine.exchange.parquet import need
from logitcask.engine.exchange.scored import distillkit
from logitcask.engine.exchange.scored.rows import ROUNDED, Refuse, teacher_rows
from logitcask.engine.models.identity import digest
from logitcask.engine.prompts.lines import Line, kind, refuse
from logitcask.engine.store.format.schema import MAX_K
from logitcask.engine.types import Array

AXOLOTL, DISTILLKIT = "axolotl", "distillkit"
_TOKENS = 1 << 22
"""Tokens of a row at most."""
_ROWS = 8
"""Rows that are decoded at once."""
_RAW = ("token_ids", "top_values")
"""Columns of the form without compression."""
_TOKEN = re.compile(r"token_id:(\d{1,10})")
_PREPARED = (
    "the prepared form holds log-probs that were divided by their sum, so the mass of all other "
    "ids is unknown"
)


def read_distillkit(file: Path) -> Iterator[Imported | None]:
    """Yield the sequences of a Parquet file of DistillKit; None for one without a row that counts.

    Row i of the file's log-probs predicts token i + 1, and counts where labels[i] is an id, as in
    DistillKit's KL. All tokens before the first that counts are the prompt. Packed sequences are
    separated by attention_mask. Raises PromptError.
    """
    pyarrow, parquet = need("pyarrow"), need("pyarrow.parquet")
    number = 0
    try:
        with file.open("rb") as stream, parquet.ParquetFile(stream, pre_buffer=False) as whole:
            names = set(whole.schema_arrow.names)
            config = _config_of(file, names)
            plain = ("input_ids", "labels", "attention_mask")
            bytes_of = _RAW if config is None else (distillkit.IDS, distillkit.LOGPROBS)
            columns = [name for name in (*plain, *bytes_of) if name in names]
            for batch in whole.iter_batches(batch_size=_ROWS, columns=columns):
                for at in range(batch.num_rows):
                    row = {name: batch.column(name)[at].values for name in columns}
                    yield from _sequences(row, config, partial(refuse, file, number, unit="row"))
                    number += 1
    except PromptError:
        raise
    except (pyarrow.ArrowException, OSError, AttributeError) as error:
        raise PromptError(
            f"{file}, row {number}: cannot be read: {str(error).partition(chr(10))[0]:.200}",
            hint="give the Parquet files as DistillKit wrote them, columns as lists",
        ) from error


def _config_of(file: Path, names: set[str]) -> distillkit.Compression | None:
    """Return the configuration that the columns need; None for the form without compression."""
    if {distillkit.IDS, distillkit.LOGPROBS, "input_ids"} <= names:
        return distillkit.read_config(file.parent)
    if {*_RAW, "input_ids"} <= names:
        return None
    if names & set(distillkit.LEGACY):
        raise PromptError(f"{file}: {distillkit.LEGACY_CAUSE}", hint=distillkit.LEGACY_HINT)
    raise PromptError(
        f"{file} has the columns {', '.join(sorted(names))[:200] or 'none'}",
        hint=f"DistillKit writes input_ids, {distillkit.LOGPROBS} and {distillkit.IDS}",
    )


def _sequences(
    row: dict[str, Any], config: distillkit.Compression | None, stop: Refuse
) -> Iterator[Imported | None]:
    """Yield the sequences of one row of the file, of which there are several where it is packed."""
    tokens = _whole(row["input_ids"], "input_ids", stop)
    if not 1 <= len(tokens) <= _TOKENS or tokens.min() < 0 or tokens.max() >= 2**32:
        stop(
            f'field "input_ids": {len(tokens)} values, which are no list of token ids',
            "give the file as DistillKit wrote it",
        )
    fields = {
        name: _whole(row[name], name, stop) if name in row else np.ones(len(tokens), np.int64)
        for name in ("labels", "attention_mask")
    }
    for name, values in fields.items():
        if len(values) != len(tokens):
            stop(f'field "{name}": {len(values)} values for {len(tokens)} tokens', "correct it")
    ids, lp = _logprobs(row, config, stop)
    if len(ids) not in (len(tokens), len(tokens) - 1):
        stop(
            f"log-probs of {len(ids)} tokens, and {len(tokens)} input_ids",
            "one row belongs to each token, and the last may lack one",
        )
    rounding = ROUNDING if config is None or config.is_exact else ROUNDED
    packs = fields["attention_mask"]
    ends = [*np.flatnonzero(np.diff(packs)) + 1, len(packs)]
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        on = np.flatnonzero(fields["labels"][begin : end - 1] >= 0) + begin + 1
        if packs[begin] == 0:  # padding
            continue
        if not len(on):
            yield None
            continue
        first, last = int(on[0]), int(on[-1]) + 1
        mask = np.isin(np.arange(first, last), on).astype(int)
        response = tokens[first:last]
        rows = slice(first - 1, last - 1)
        yield Imported(
            id="text-" + digest(tokens[begin:last].tolist()).removeprefix("sha256:")[:16],
            prompt=tuple(tokens[begin:first].tolist()),
            response=tuple(response.tolist()),
            mask=tuple(mask.tolist()),
            teacher=teacher_rows(response, ids[rows], lp[rows], stop, rounding=rounding),
        )


def _logprobs(
    row: dict[str, Any], config: distillkit.Compression | None, stop: Refuse
) -> tuple[Array, Array]:
    """Return (ids [R, K] int64, log-probs [R, K] float64) of one row of the file."""
    if config is None:
        ids = _wide(row[_RAW[0]], _RAW[0], stop)
        lp = _wide(row[_RAW[1]], _RAW[1], stop)
        if ids.dtype.kind not in "iu" or lp.dtype.kind != "f" or ids.shape != lp.shape:
            stop(f"{_RAW[0]} of {ids.shape}, {_RAW[1]} of {lp.shape}", "write ids and numbers")
        return ids.astype(np.int64), lp.astype(np.float64)
    widths = {distillkit.IDS: config.id_bytes, distillkit.LOGPROBS: config.logprob_bytes}
    found = {}
    for name, width in widths.items():
        found[name] = values = _wide(row[name], name, stop)
        if values.shape[1] != width or values.dtype.kind not in "iu":
            stop(
                f'field "{name}": {values.shape[1]} bytes of a token, and {width} by '
                f"{distillkit.CONFIG}",
                "put the configuration of the capture next to the files",
            )
        if len(values) and not 0 <= values.min() <= values.max() <= 255:
            stop(f'field "{name}": values that are no bytes', "give the file as it was written")
    bytes_of = [found[name].astype(np.uint8) for name in (distillkit.LOGPROBS, distillkit.IDS)]
    if len(bytes_of[0]) != len(bytes_of[1]):
        stop(f"ids of {len(bytes_of[1])} tokens, log-probs of {len(bytes_of[0])}", "correct it")
    return distillkit.decode(bytes_of[0], bytes_of[1], config)


def _whole(values: Any, name: str, stop: Refuse) -> Array:
    """Return a list of integers."""
    types = need("pyarrow.types")
    if values is None or not types.is_integer(values.type) or values.null_count:
        stop(f'field "{name}": no list of integers', "give the file as DistillKit wrote it")
    found: Array = values.to_numpy(zero_copy_only=False)
    return np.minimum(found, 2**63 - 1).astype(np.int64) if found.dtype == np.uint64 else found


def _wide(values: Any, name: str, stop: Refuse) -> Array:
    """Return a list of lists of one length as [R, n]."""
    types = need("pyarrow.types")
    if values is None or not types.is_nested(values.type) or values.null_count:
        stop(f'field "{name}": no list of lists', "give the file as DistillKit wrote it")
    lengths = values.value_lengths().to_numpy(zero_copy_only=False)
    if len(lengths) and lengths.min() != lengths.max():
        stop(
            f'field "{name}": lists of {lengths.min()} to {lengths.max()} values',
            "every token has as many bytes: the file is damaged",
        )
    flat = values.flatten()
    if flat.null_count or not (types.is_integer(flat.type) or types.is_floating(flat.type)):
        stop(f'field "{name}": lists of {flat.type}', "give the file as DistillKit wrote it")
    found: Array = flat.to_numpy(zero_copy_only=False)
    return found.reshape(len(lengths), int(lengths[0]) if len(lengths) else 0)


def read_axolotl(line: Line, reader: TextReader) -> Imported | None:
    """Read a row for axolotl's chat_template with KD: messages, and log-probs of the last turn.

    Each entry is {"token": "token_id:123", "logprob": -0.5}, or a number with its id in
    target_token_ids. reader: of the last turn. Raises PromptError where the log-probs are not those
    of the turn's tokens: every token must be among its own ids, which servers return.
    """
    if "target_logprobs" in line.keys:
        line.refuse(_PREPARED, "give the data set before axolotl prepared it")
    if not isinstance(rows := line.keys.pop("logprobs", None), list):
        line.refuse(
            f'field "logprobs": {kind(rows)}, not a list', "rename the column of logprobs_field"
        )
    ids = line.keys.pop("target_token_ids", None)
    found = reader.read(line)
    if found is None:
        return None
    if len(rows) != len(found.response):
        line.refuse(
            f"log-probs of {len(rows)} tokens, and the last turn has {len(found.response)} by the "
            "student's tokenizer and chat template",
            "give the student whose tokenizer the teacher has, and rows of the last turn alone",
        )
    entries = [_entries(line, at, row, ids) for at, row in enumerate(rows)]
    width, least = max(map(len, entries)), min(map(len, entries))
    if not least or width > MAX_K:
        line.refuse(
            f'field "logprobs": a row of {width if least else 0} entries', f"give 1 to {MAX_K}"
        )
    wide = np.zeros((len(entries), width), np.int64)
    lp = np.full((len(entries), width), -np.inf)
    for at, row in enumerate(entries):
        wide[at, : len(row)], lp[at, : len(row)] = zip(*row, strict=True)
    rows_of = teacher_rows(np.array(found.response), wide, lp, line.refuse, most=least)
    if np.isnan(rows_of.lp).any():
        at = int(np.flatnonzero(np.isnan(rows_of.lp))[0])
        line.refuse(
            f"token {at} of the last turn is {found.response[at]}, which is not among its ids: the "
            "log-probs are of other tokens, or shifted",
            "give rows as the server returned them, each with the token itself",
        )
    return Imported(
        **{name: getattr(found, name) for name in ("id", "prompt", "response", "mask")},
        answer=found.answer,
        extra=found.extra,
        teacher=rows_of,
    )


def _entries(line: Line, at: int, row: Any, ids: Any) -> list[tuple[int, float]]:
    """Return the (id, log-prob) of one token."""
    field = f"logprobs[{at}]"
    if not isinstance(row, list):
        line.refuse(f'field "{field}": {kind(row)}, not a list', "write one list for each token")
    if ids is not None:
        named = ids[at] if isinstance(ids, list) and at < len(ids) else None
        if not isinstance(named, list) or len(named) != len(row):
            line.refuse(f'field "target_token_ids[{at}]": not {len(row)} ids', "write one for each")
        pairs = list(zip(named, row, strict=True))
    else:
        pairs = [_pair(line, field, each) for each in row]
    for token, lp in pairs:
        if type(token) is not int or not 0 <= token < 2**32 or type(lp) not in (int, float):
            line.refuse(
                f'field "{field}": id {token!r:.40} with log-prob {lp!r:.40}',
                'write {"token": "token_id:123", "logprob": -0.5}',
            )
    return pairs


def _pair(line: Line, field: str, entry: Any) -> tuple[Any, Any]:
    token = entry.get("token") if isinstance(entry, dict) else None
    match = _TOKEN.fullmatch(token) if isinstance(token, str) else None
    if match is None:
        line.refuse(
            f'field "{field}": {entry!r:.80} names no id',
            'write {"token": "token_id:123", "logprob": -0.5}: serve vLLM with '
            "--return-tokens-as-token-ids",
        )
    return int(match[1]), entry.get("logprob")
