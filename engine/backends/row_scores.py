"""Scores of rows from their logits, in float32 and never as [T, V].

Each chunk of rows gives log-prob of the sampled token, entropy, the kept list, log-probs at extra
ids, and the exact log mass of all other ids, all from the same logits.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from logitcask.engine.errors import ModelError
from logitcask.engine.types import Array, IdLists, Rollouts, ScoreParams, Scores
from logitcask.kernels.listed_stats import ListedStats, listed_stats


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
    drawn = request.entry_kind == "sampled"
    k = 1 if drawn else min(request.k_max, logits.shape[1])
    token_logit, at = logits.gather(1, token[:, None])[:, 0], logits[extra_row, extra_ids]
    listed = extra_row, extra_ids
    if drawn:
        assert uniforms is not None, "drawing needs uniform numbers"
        cnt, ids, mult = _drawn(logits, uniforms)
        values = logits.gather(1, ids)
        row, column = (mult > 0).nonzero().unbind(1)
        listed = torch.cat([extra_row, row]), torch.cat([extra_ids, ids[row, column]])
    found = listed_stats(logits, k, *listed)
    log_sum_exp = found.log_sum_exp
    if not drawn:
        values, ids, mult = found.values, found.top_ids, torch.ones_like(found.top_ids)
        cnt = _kept(values - log_sum_exp[:, None], request)
    # The top-k are not outside, so those that the row does not keep are added.
    kept = (
        torch.arange(k, device=logits.device) < (torch.zeros_like(cnt) if drawn else cnt)[:, None]
    )
    log_tail = found.log_outside if kept.all() else _log_tail(logits, found, kept, *listed)
    return RowScores(
        token_logit - log_sum_exp,
        found.entropy,
        log_tail - log_sum_exp,
        cnt,
        ids,
        values - log_sum_exp[:, None],
        at - log_sum_exp[extra_row],
        mult,
    )


def _log_tail(logits: Tensor, found: ListedStats, kept: Tensor, row: Tensor, ids: Tensor) -> Tensor:
    """Return [R] the log mass outside of the top-k that are kept [R, k] and of the listed ids."""
    logits.scatter_(1, found.top_ids, found.values)
    logits[row, ids] = -torch.inf
    dropped = logits.gather(1, found.top_ids).masked_fill_(kept, -torch.inf)
    return torch.logaddexp(found.log_outside, dropped.logsumexp(1))


def _kept(log_p: Tensor, request: ScoreParams) -> Tensor:
    """Return [R] the number of kept ids with log-probs [R, k], best first: up to the mass top_p,
    between k_min and k_max.
    """
    rows, k = log_p.shape
    if request.entry_kind == "topp" and request.top_p < 1.0:
        mass = log_p.double().exp().cumsum(1)
        return ((mass < request.top_p).sum(1) + 1).clamp(min(request.k_min, k), k)
    return torch.full((rows,), k, device=log_p.device)


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
