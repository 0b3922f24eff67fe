"""From the logits of rows to stored scores, in float32 and never as [T, V].

Each chunk of rows gives log-prob of the sampled token, entropy, the kept list, log-probs at extra
ids, and the exact log mass of all other ids, all from the same logits.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from logitcask.engine.errors import ConfigError, IdentityError, ModelError, UnitError
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
from logitcask.kernels.row_stats import row_stats
from logitcask.kernels.topk_select import topk_select

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


def take_ranges(starts: Array, counts: Array) -> Array:
    """Return the concatenated indices of the ranges [start, start + count): [sum of counts]."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


@dataclass(frozen=True, slots=True)
class RowScores:
    """Scores of R rows; tensors on the logits' device."""

    lp: Tensor
    entropy: Tensor
    log_tail: Tensor
    cnt: Tensor
    """[R] kept entries."""
    ids: Tensor
    """[R, k] best first; the first cnt of a row are kept."""
    entry_lp: Tensor
    at: Tensor
    """[A] log-probs at (extra_row, extra_ids)."""
    mult: Tensor
    """[R, k] number of draws of each id, 0 beyond cnt; 1 for a top-k or top-p list."""


def score_rows(
    logits: Tensor,
    token: Tensor,
    extra_row: Tensor,
    extra_ids: Tensor,
    request: ScoreParams,
    uniforms: Tensor | None = None,
) -> RowScores:
    """Score rows of logits [R, n_vocab] float32, which are overwritten.

    token: [R]; extra_row, extra_ids: [A] rows and their chosen ids; uniforms: [R, draws] float64
    in [0, 1), for drawn ids.
    """
    log_sum_exp, entropy = row_stats(logits)
    lp = logits.gather(1, token[:, None])[:, 0] - log_sum_exp
    at = logits[extra_row, extra_ids] - log_sum_exp[extra_row]
    if request.entry_kind == "sampled":
        assert uniforms is not None, "drawing needs uniform numbers"
        cnt, ids, mult = _drawn(logits, uniforms)
    else:
        cnt, ids, mult = _best(logits, log_sum_exp, request)
    values = logits.gather(1, ids)
    entry_lp = values - log_sum_exp[:, None]
    kept = torch.arange(ids.shape[1], device=logits.device) < cnt[:, None]
    logits.scatter_(1, ids, values.masked_fill(kept | (mult == 0), -torch.inf))
    logits[extra_row, extra_ids] = -torch.inf
    log_tail = logits.logsumexp(1) - log_sum_exp
    return RowScores(lp, entropy, log_tail, cnt, ids, entry_lp, at, mult)


def _best(
    logits: Tensor, log_sum_exp: Tensor, request: ScoreParams
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (cnt, ids, mult) of the best ids up to the mass top_p, between k_min and k_max."""
    k = min(request.k_max, logits.shape[1])
    values, ids = topk_select(logits, k)
    cnt = torch.full_like(log_sum_exp, k, dtype=torch.int64)
    if request.entry_kind == "topp" and request.top_p < 1.0:
        mass = (values - log_sum_exp[:, None]).double().exp().cumsum(1)
        cnt = ((mass < request.top_p).sum(1) + 1).clamp(min(request.k_min, k), k)
    return cnt, ids, torch.ones_like(ids)


def _drawn(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw ids with replacement from softmax(logits) by the inverse CDF; return (cnt, ids, mult),
    best first, with the number of draws of each distinct id in mult.
    """
    below = logits.double().softmax(1).cumsum(1)
    drawn = torch.searchsorted(below, uniforms * below[:, -1:], right=True)
    drawn = drawn.clamp(max=logits.shape[1] - 1).sort(1).values
    best_first = logits.gather(1, drawn).sort(stable=True, dim=1, descending=True).indices
    drawn = drawn.gather(1, best_first)
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = new.cumsum(1) - 1
    # Padding repeats an id of the row, so that scatter never touches another id.
    ids = drawn[:, :1].repeat(1, drawn.shape[1]).scatter_(1, place, drawn)
    mult = torch.zeros_like(drawn).scatter_add_(1, place, torch.ones_like(drawn))
    return new.sum(1), ids, mult


class ScoreBuilder:
    """The scores of P rows, written in any order."""

    def __init__(self, rollouts: Rollouts, request: ScoreParams, extra_ids: IdLists | None) -> None:
        rows = rollouts.positions
        self.request = request
        self.tokens = rollouts.tokens.astype(np.int64)
        self.lp, self.entropy, self.log_tail = (np.empty(rows, np.float32) for _ in range(3))
        self.cnt = np.zeros(rows, np.uint16)
        self.drawn = request.entry_kind == "sampled"
        width = request.draws if self.drawn else request.k_max
        self.ids = np.zeros((rows, width), np.uint32)
        self.entry_lp = np.zeros((rows, width), np.float32)
        self.mult = np.zeros((rows, width if self.drawn else 0), np.uint16)
        self.uniforms = _uniforms(rollouts, request)
        self.has_extra = extra_ids is not None
        extra = extra_ids or IdLists(cnt=np.zeros(rows, np.int64), ids=np.zeros(0, np.int64))
        self.extra_cnt, self.extra_ids = extra.cnt.astype(np.int64), extra.ids.astype(np.int64)
        self.extra_off = np.cumsum(self.extra_cnt) - self.extra_cnt
        self.extra_lp = np.empty(len(self.extra_ids), np.float32)

    def write(self, rows: Array, logits: Tensor) -> None:
        """Write the scores of the rows [R]; their logits [R, n_vocab] are overwritten."""

        def to_device(array: Array) -> Tensor:
            return torch.from_numpy(array).to(logits.device)

        flat = take_ranges(self.extra_off[rows], self.extra_cnt[rows])
        extra_row = np.repeat(np.arange(len(rows)), self.extra_cnt[rows])
        found = score_rows(
            logits,
            to_device(self.tokens[rows]),
            to_device(extra_row),
            to_device(self.extra_ids[flat]),
            self.request,
            to_device(self.uniforms[rows]),
        )
        if not found.entropy.isfinite().all():
            raise ModelError(
                "the model's logits hold NaN or infinity",
                hint="try float32, or load the weights again: they may be damaged",
            )
        k = found.ids.shape[1]
        self.lp[rows], self.entropy[rows] = found.lp.cpu(), found.entropy.cpu()
        self.log_tail[rows], self.cnt[rows] = found.log_tail.cpu(), found.cnt.cpu()
        self.ids[rows, :k], self.entry_lp[rows, :k] = found.ids.cpu(), found.entry_lp.cpu()
        self.extra_lp[flat] = found.at.cpu()
        if self.drawn:
            self.mult[rows] = found.mult.cpu()

    def scores(self) -> Scores:
        """Return the scores of all rows."""
        kept = np.arange(self.ids.shape[1]) < self.cnt[:, None]
        return Scores(
            lp=self.lp,
            entropy=self.entropy,
            log_tail=self.log_tail,
            cnt=self.cnt,
            ids=self.ids[kept],
            entry_lp=self.entry_lp[kept],
            at_lp=self.extra_lp if self.has_extra else None,
            mult=self.mult[kept] if self.drawn else None,
        )


def _uniforms(rollouts: Rollouts, request: ScoreParams) -> Array:
    """Return [P, draws] float64 by the seed and the sampled tokens, independent of batches."""
    seed = hashlib.sha256(b"%d/" % request.seed + rollouts.tokens.astype("<u4").tobytes()).digest()
    rng = np.random.default_rng(list(seed))
    return rng.random((rollouts.positions, request.draws))


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


def resolve_extra_ids(
    rollouts: Rollouts,
    request: ScoreParams,
    extra_ids: IdLists | None,
    *,
    n_vocab: int,
    context: int,
) -> IdLists | None:
    """Return extra_ids, or the ids of the student's list if the request has at_student.

    Raises IdentityError for ids outside the scorer's n_vocab, ModelError for sequences beyond its
    context, ConfigError if the request has at_student and the rollouts hold no ids of the student.
    """
    if request.at_student and extra_ids is None:
        student = rollouts.student
        if student is None:
            raise ConfigError(
                "at_student=True, and these rollouts hold no ids of the student",
                hint="let the student score its rollouts first, or set at_student=False",
            )
        extra_ids = IdLists(cnt=student.cnt, ids=student.ids)
    of_prompts = [np.array(p.token_ids) for p in rollouts.prompts]
    seen = [rollouts.tokens, *of_prompts, *([] if extra_ids is None else [extra_ids.ids])]
    highest = max((int(ids.max()) for ids in seen if len(ids)), default=0)
    if highest >= n_vocab:
        raise IdentityError(
            f"the rollouts hold the id {highest}, and the scorer has {n_vocab} ids",
            hint="score with a teacher that has the student's tokenizer",
        )
    of = rollouts.seq_prompt.astype(np.int64)
    total = np.array([len(p) for p in of_prompts])[of] + rollouts.lengths()
    if len(total) and total.max() > context:
        raise ModelError(
            f"a rollout has {total.max()} tokens, the scorer's context: {context}",
            hint="score with a model of longer context (--max-model-len of a server), or "
            "roll out shorter responses",
        )
    return extra_ids


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
    batch_tokens, not on the network.
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


def chunks(count: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover range(count)."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
