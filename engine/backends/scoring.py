"""Scoring: from the logits of rows to what a store keeps of them, in float32 and never as [T, V].

Each chunk of rows gives log-prob of the sampled token, entropy, the kept list, log-probs at the
student's stored ids, and the exact log mass of everything else, all from the same logits.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcask.engine.errors import ConfigError, IdentityError, ModelError, UnitError
from logitcask.engine.models.fingerprint import MIN_PROB
from logitcask.engine.types import Array, IdLists, Rollouts, ScoreParams, Scores
from logitcask.kernels.row_stats import row_stats
from logitcask.kernels.topk_select import topk_select

CHUNK_LOGITS = 1 << 26
"""Logits held at once: 256 MiB in float32."""


def budget_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of like length, shortest first; count x longest <= batch_tokens, or one.

    A function of the lengths alone, so that a unit done again is batched the same.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def take_ranges(starts: Array, counts: Array) -> Array:
    """Indices of the ragged rows [start, start + count), one after another: [sum of counts]."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


@dataclass(frozen=True, slots=True)
class RowScores:
    """What R rows of logits say; tensors on the logits' device."""

    lp: Tensor
    entropy: Tensor
    log_tail: Tensor
    cnt: Tensor
    """[R] kept entries."""
    ids: Tensor
    """[R, k] best first; kept are the first cnt of a row."""
    entry_lp: Tensor
    at: Tensor
    """[A] log-probs at (at_row, at_ids)."""
    mult: Tensor
    """[R, k] how often each was drawn, 0 beyond cnt; 1 where ids are the best ones."""


def score_rows(
    logits: Tensor,
    token: Tensor,
    at_row: Tensor,
    at_ids: Tensor,
    request: ScoreParams,
    uniforms: Tensor | None = None,
) -> RowScores:
    """logits [R, n_vocab] float32, overwritten; token [R]; at_row, at_ids [A]: where it is asked;
    uniforms [R, draws] float64 in [0, 1), where ids are drawn.
    """
    log_sum_exp, entropy = row_stats(logits)
    lp = logits.gather(1, token[:, None])[:, 0] - log_sum_exp
    at = logits[at_row, at_ids] - log_sum_exp[at_row]
    if request.entry_kind == "sampled":
        assert uniforms is not None, "who draws brings the numbers"
        cnt, ids, mult = _drawn(logits, uniforms)
    else:
        cnt, ids, mult = _best(logits, log_sum_exp, request)
    values = logits.gather(1, ids)
    entry_lp = values - log_sum_exp[:, None]
    kept = torch.arange(ids.shape[1], device=logits.device) < cnt[:, None]
    logits.scatter_(1, ids, values.masked_fill(kept | (mult == 0), -torch.inf))
    logits[at_row, at_ids] = -torch.inf
    log_tail = logits.logsumexp(1) - log_sum_exp
    return RowScores(lp, entropy, log_tail, cnt, ids, entry_lp, at, mult)


def _best(
    logits: Tensor, log_sum_exp: Tensor, request: ScoreParams
) -> tuple[Tensor, Tensor, Tensor]:
    """(cnt, ids, mult) of the best ids up to the mass top_p, between k_min and k_max."""
    k = min(request.k_max, logits.shape[1])
    values, ids = topk_select(logits, k)
    cnt = torch.full_like(log_sum_exp, k, dtype=torch.int64)
    if request.entry_kind == "topp" and request.top_p < 1.0:
        mass = (values - log_sum_exp[:, None]).double().exp().cumsum(1)
        cnt = ((mass < request.top_p).sum(1) + 1).clamp(min(request.k_min, k), k)
    return cnt, ids, torch.ones_like(ids)


def _drawn(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(cnt, ids, mult) of ids drawn with replacement from softmax(logits), best first.

    The inverse of the distribution function at each uniform number; a draw that comes again counts.
    """
    below = logits.double().softmax(1).cumsum(1)
    drawn = torch.searchsorted(below, uniforms * below[:, -1:], right=True)
    drawn = drawn.clamp(max=logits.shape[1] - 1).sort(1).values
    best_first = logits.gather(1, drawn).sort(stable=True, dim=1, descending=True).indices
    drawn = drawn.gather(1, best_first)
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = new.cumsum(1) - 1
    # Padding repeats an id that is there, so that whatever is done to it is done to no other.
    ids = drawn[:, :1].repeat(1, drawn.shape[1]).scatter_(1, place, drawn)
    mult = torch.zeros_like(drawn).scatter_add_(1, place, torch.ones_like(drawn))
    return new.sum(1), ids, mult


class Sheet:
    """The scores of P rows, filled in any order."""

    def __init__(self, rollouts: Rollouts, request: ScoreParams, at: IdLists | None) -> None:
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
        self.asked = at is not None
        self.at_cnt = np.zeros(rows, np.int64) if at is None else at.cnt.astype(np.int64)
        self.at_off = np.cumsum(self.at_cnt) - self.at_cnt
        self.at_ids = np.zeros(0, np.int64) if at is None else at.ids.astype(np.int64)
        self.at = np.empty(len(self.at_ids), np.float32)

    def write(self, rows: Array, logits: Tensor) -> None:
        """rows [R]: which rows the logits [R, n_vocab] are about; the logits are used up."""

        def there(array: Array) -> Tensor:
            return torch.from_numpy(array).to(logits.device)

        flat = take_ranges(self.at_off[rows], self.at_cnt[rows])
        at_row = np.repeat(np.arange(len(rows)), self.at_cnt[rows])
        found = score_rows(
            logits,
            there(self.tokens[rows]),
            there(at_row),
            there(self.at_ids[flat]),
            self.request,
            there(self.uniforms[rows]),
        )
        if not found.entropy.isfinite().all():
            raise ModelError(
                "the model's logits hold NaN or infinity",
                hint="Its weights are damaged, or its dtype is too narrow for it: try float32.",
            )
        k = found.ids.shape[1]
        self.lp[rows], self.entropy[rows] = found.lp.cpu(), found.entropy.cpu()
        self.log_tail[rows], self.cnt[rows] = found.log_tail.cpu(), found.cnt.cpu()
        self.ids[rows, :k], self.entry_lp[rows, :k] = found.ids.cpu(), found.entry_lp.cpu()
        self.at[flat] = found.at.cpu()
        if self.drawn:
            self.mult[rows] = found.mult.cpu()

    def scores(self) -> Scores:
        kept = np.arange(self.ids.shape[1]) < self.cnt[:, None]
        return Scores(
            lp=self.lp,
            entropy=self.entropy,
            log_tail=self.log_tail,
            cnt=self.cnt,
            ids=self.ids[kept],
            entry_lp=self.entry_lp[kept],
            at_lp=self.at if self.asked else None,
            mult=self.mult[kept] if self.drawn else None,
        )


def _uniforms(rollouts: Rollouts, request: ScoreParams) -> Array:
    """[P, draws] float64: a function of the seed and the sampled tokens, whatever the batches."""
    seed = hashlib.sha256(b"%d/" % request.seed + rollouts.tokens.astype("<u4").tobytes()).digest()
    rng = np.random.default_rng(list(seed))
    return rng.random((rollouts.positions, request.draws))


def response_rows(rollouts: Rollouts, batch: Sequence[int]) -> tuple[Tensor, Tensor, Array, Array]:
    """A right-padded batch of sequences and where its rows are.

    -> ids [B, L], mask [B, L], hidden [R] (index into B * L hidden states), rows [R] (into P).
    The last response token is not fed: no row reads the hidden state after it.
    """
    fed: list[Array] = []
    hidden: list[Array] = []
    rows: list[Array] = []
    for i in batch:
        prompt = rollouts.prompts[int(rollouts.seq_prompt[i])].token_ids
        start, end = int(rollouts.seq_off[i]), int(rollouts.seq_off[i + 1])
        fed.append(np.concatenate([prompt, rollouts.tokens[start : end - 1]]).astype(np.int64))
        hidden.append(np.arange(len(prompt) - 1, len(fed[-1])))
        rows.append(np.arange(start, end))
    length = max(map(len, fed))
    ids, mask = np.zeros((2, len(batch), length), np.int64)
    for b, tokens in enumerate(fed):
        ids[b, : len(tokens)], mask[b, : len(tokens)] = tokens, 1
        hidden[b] += b * length
    return (
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        np.concatenate(hidden),
        np.concatenate(rows),
    )


def asked_ids(
    rollouts: Rollouts, request: ScoreParams, at: IdLists | None, *, n_vocab: int, context: int
) -> IdLists | None:
    """Where a scorer of n_vocab ids and `context` tokens is asked: at, or the student's list.

    Raises IdentityError for ids that it does not have, ModelError for sequences beyond its context,
    ConfigError if the student's ids are asked for and not there.
    """
    if request.at_student and at is None:
        student = rollouts.student
        if student is None:
            raise ConfigError(
                "at_student=True, and these rollouts hold no ids of the student",
                hint="Let the student score its rollouts first, or set at_student=False.",
            )
        at = IdLists(cnt=student.cnt, ids=student.ids)
    of_prompts = [np.array(p.token_ids) for p in rollouts.prompts]
    seen = [rollouts.tokens, *of_prompts, *([] if at is None else [at.ids])]
    highest = max((int(ids.max()) for ids in seen if len(ids)), default=0)
    if highest >= n_vocab:
        raise IdentityError(
            f"the rollouts hold the id {highest}, and the scorer has {n_vocab} ids",
            hint="Score with a teacher that has the student's tokenizer.",
        )
    of = rollouts.seq_prompt.astype(np.int64)
    total = np.array([len(p) for p in of_prompts])[of] + rollouts.lengths()
    if len(total) and total.max() > context:
        raise ModelError(
            f"a rollout has {total.max()} tokens, the scorer's context: {context}",
            hint="Score with a model of longer context (--max-model-len of a server), or "
            "roll out shorter responses.",
        )
    return at


def of_shared(logits: Tensor, n_vocab: int) -> Tensor:
    """[R, n_vocab] of [R, n_vocab or more] logits, whose other ids not both tokenizers have.

    Raises UnitError for a row that gives those more than LIKELY: what is left of it is not what the
    model thinks.
    """
    if logits.shape[1] == n_vocab:
        return logits
    known, strange = logits[:, :n_vocab], logits[:, n_vocab:]
    share = torch.sigmoid(strange.logsumexp(1) - known.logsumexp(1))
    if len(share) and float(share.max()) > MIN_PROB:
        row = int(share.argmax())
        raise UnitError(
            f"a row gives ids that only one of student and teacher knows, from {n_vocab} on, the "
            f"probability {float(share[row]):.3g}, most to {n_vocab + int(strange[row].argmax())}",
            hint="Take a teacher with the student's tokenizer, or sample where such ids are no "
            "answer (another chat template, say); there is no override.",
        )
    return known


def score_rollouts(
    net: Any, rollouts: Rollouts, request: ScoreParams, at: IdLists | None, *, batch_tokens: int
) -> Scores:
    """net: as of sampling.Network."""
    sheet = Sheet(rollouts, request, at)
    for rows, logits in row_logits(net, rollouts, batch_tokens=batch_tokens):
        sheet.write(rows, logits)
    return sheet.scores()


@torch.no_grad()
def row_logits(
    net: Any, rollouts: Rollouts, *, batch_tokens: int
) -> Iterator[tuple[Array, Tensor]]:
    """(rows [R], their logits [R, n_vocab] float32) until all rows have come once; one forward pass
    a batch, response rows only. The order depends on lengths and batch_tokens, not on the net.
    """
    lengths = rollouts.lengths()
    prompts = [len(rollouts.prompts[int(p)].token_ids) for p in rollouts.seq_prompt]
    answered = [i for i in range(len(lengths)) if lengths[i] > 0]
    fed = [prompts[i] + int(lengths[i]) - 1 for i in answered]
    for batch in budget_batches(fed, batch_tokens):
        ids, mask, places, rows = response_rows(rollouts, [answered[i] for i in batch])
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        hidden = net.hidden(ids.to(net.device), mask.to(net.device), positions.to(net.device), None)
        hidden = hidden.flatten(0, 1)[torch.from_numpy(places).to(net.device)]  # [R, D]
        for part in chunks(len(rows), max(1, CHUNK_LOGITS // net.n_vocab)):
            yield rows[part], net.logits(hidden[part])


def chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
