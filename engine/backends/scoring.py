"""Passes of a network over rollouts, to score their rows: one forward pass a batch."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from logitcask.engine.backends.row_scores import ScoreBuilder
from logitcask.engine.errors import ModelError, UnitError
from logitcask.engine.models.fingerprint import MIN_PROB
from logitcask.engine.models.forward import cuts, right_padded
from logitcask.engine.types import (
    Array,
    IdLists,
    Progress,
    Rollouts,
    ScoreParams,
    Scores,
    no_progress,
)

CHUNK_LOGITS = 1 << 26
"""Logits in memory at once: 256 MiB in float32."""


def budget_batches(
    lengths: Sequence[int], batch_tokens: int, groups: Sequence[int] | None = None
) -> list[list[int]]:
    """Return batches of indices of similar length, shortest first; count x longest <= batch_tokens,
    or one sequence.

    groups: a number of each index; the indices of a batch have the same. A function of the lengths
    and these numbers, so that a repeated unit has the same batches.
    """
    of = [0] * len(lengths) if groups is None else groups
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (of[i], lengths[i], i)):
        fits = batches and (len(batches[-1]) + 1) * lengths[i] <= batch_tokens
        if fits and of[batches[-1][-1]] == of[i]:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


class Piece(NamedTuple):
    """Input of one pass over a sequence, and the hidden states that are read from it."""

    sequence: int
    first: int
    """Index of the first state that a response row reads."""
    end: int
    length: int
    """Input tokens."""


def pieces_of(rollouts: Rollouts, switch: int) -> list[Piece]:
    """Return the passes over the sequences of N rollouts that have a response row.

    Sequences beyond `switch` need two, see models.forward.
    """
    found = []
    for i, count in enumerate(rollouts.lengths().tolist()):
        prompt = len(rollouts.prompts[int(rollouts.seq_prompt[i])].token_ids)
        # The last response token is no input: no row reads the hidden state after it.
        total = prompt + count - 1 if count else 0
        found += [
            Piece(i, max(start, prompt - 1), end, length)
            for start, end, length in cuts(total, switch)
            if end >= prompt
        ]
    return found


def response_rows(
    rollouts: Rollouts, batch: Sequence[Piece]
) -> tuple[Tensor, Tensor, Array, Array]:
    """Build a right-padded batch of pieces, with the indices of their response rows.

    -> ids [B, L], mask [B, L], hidden [R] (index into B * L hidden states), rows [R] (into P).
    """
    inputs: list[Tensor] = []
    hidden: list[Array] = []
    rows: list[Array] = []
    longest = max(piece.length for piece in batch)
    for b, piece in enumerate(batch):
        prompt = rollouts.prompts[int(rollouts.seq_prompt[piece.sequence])].token_ids
        start = int(rollouts.seq_off[piece.sequence])
        response = rollouts.tokens[start : start + piece.length - min(piece.length, len(prompt))]
        tokens = np.concatenate([prompt, response])[: piece.length].astype(np.int64)
        inputs.append(torch.from_numpy(tokens))
        read = np.arange(piece.first, piece.end)
        hidden.append(read + b * longest)
        rows.append(read - (len(prompt) - 1) + start)
    ids, mask = right_padded(inputs)
    return ids, mask, np.concatenate(hidden), np.concatenate(rows)


def restrict_to_shared(logits: Tensor, n_vocab: int) -> Tensor:
    """Return logits [R, n_vocab] of [R, n_vocab or more], without ids that one tokenizer lacks.

    Raises UnitError for a row with a mass above MIN_PROB at the other ids: the other logits would
    not give the model's distribution.
    """
    if logits.shape[1] == n_vocab:
        return logits
    shared, others = logits[:, :n_vocab], logits[:, n_vocab:]
    share = torch.sigmoid(others.logsumexp(1) - shared.logsumexp(1))
    if len(share) and float(share.max()) > MIN_PROB:
        row = int(share.argmax())
        raise UnitError(
            f"a row gives ids that only one of student and teacher has, from {n_vocab} on, the "
            f"probability {float(share[row]):.3g}, most to {n_vocab + int(others[row].argmax())}",
            hint="take a teacher with the student's tokenizer, or use prompts where such ids are "
            "unlikely (for example another chat template); there is no override",
        )
    return shared


def score_rollouts(
    net: Any,
    rollouts: Rollouts,
    request: ScoreParams,
    extra_ids: IdLists | None,
    *,
    batch_tokens: int,
    rows: Array | None = None,
    progress: Progress = no_progress,
) -> Scores:
    """Score the rollouts with a network (sampling.Network), at the marked rows [P] or all."""
    builder, done = ScoreBuilder(rollouts, request, extra_ids), 0
    total = rollouts.positions if rows is None else int(rows.sum())
    for part, logits in row_logits(net, rollouts, batch_tokens=batch_tokens, only=rows):
        builder.write(part, logits)
        done += len(part)
        progress("score", done, total)
    return builder.scores()


@torch.no_grad()
def row_logits(
    net: Any, rollouts: Rollouts, *, batch_tokens: int, only: Array | None = None
) -> Iterator[tuple[Array, Tensor]]:
    """Yield (rows [R], their logits [R, n_vocab] float32), each row once; one forward pass a batch,
    response rows only, or those that `only` [P] bool marks. The order depends on lengths and
    batch_tokens, and on where the network's rope switches.
    """
    pieces = pieces_of(rollouts, net.switch)
    lengths = [piece.length for piece in pieces]
    sides = [int(length > net.switch) for length in lengths]
    for batch in budget_batches(lengths, batch_tokens, sides):
        ids, mask, places, rows = response_rows(rollouts, [pieces[i] for i in batch])
        if only is not None:
            places, rows = places[only[rows]], rows[only[rows]]
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        hidden = net.hidden(ids.to(net.device), mask.to(net.device), positions.to(net.device), None)
        hidden = hidden.flatten(0, 1)[torch.from_numpy(places).to(net.device)]  # [R, D]
        for part in chunks(len(rows), max(1, CHUNK_LOGITS // net.n_vocab)):
            yield rows[part], net.logits(hidden[part])


def paired_logits(
    first: Any, second: Any, rollouts: Rollouts, *, only: Array | None = None
) -> Iterator[tuple[Array, Tensor, Tensor]]:
    """Yield (rows [R], logits [R, n_vocab] of both models on them), each as `row_logits`.

    Raises ModelError for models whose ropes switch at different lengths, on longer sequences.
    """
    tokens = min(first.batch_tokens, second.batch_tokens)
    both = (row_logits(each, rollouts, batch_tokens=tokens, only=only) for each in (first, second))
    for (rows, logits), (others, other_logits) in zip(*both, strict=True):
        if not np.array_equal(rows, others):
            raise ModelError(
                "the models read long sequences in different parts, so their rows do not match",
                hint="take responses within the original context of both models",
            )
        yield rows, logits, other_logits


def chunks(count: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover range(count)."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
