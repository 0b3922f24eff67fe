"""A teacher with full logits that returns top-k log-probs only, like vLLM or a server."""

from typing import Any

import numpy as np
import torch

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.returned import ResponseAssembler, ReturnedTopK
from logitcask.engine.types import Array, IdLists, Rollouts, ScoreParams, Scores


def returned_topk(log_p: Array, tokens: Array, extra: IdLists | None, k: int) -> ReturnedTopK:
    """Return the response of an engine with log-probs [R, V'] (V' ids of its head) for top k."""
    order = np.argsort(-log_p, 1, kind="stable")[:, :k]
    rows = np.arange(len(tokens))
    at = None
    if extra is not None:
        at = log_p[np.repeat(rows, extra.cnt), extra.ids.astype(np.int64)].astype(np.float32)
    return ReturnedTopK(
        lp=log_p[rows, tokens.astype(np.int64)].astype(np.float32),
        ids=order.astype(np.int64),
        top_lp=np.take_along_axis(log_p, order, 1).astype(np.float32),
        at=at,
    )


class TopKTeacher:
    """`hf` behind a ResponseAssembler; with `at_ids` it also scores requested ids."""

    def __init__(self, hf: HF, *, at_ids: bool = True) -> None:
        self.hf = hf
        always = {"top", "entropy", "tail", "bounds"}
        self.capabilities = frozenset(always | ({"at_ids"} if at_ids else set()))

    def describe(self) -> dict[str, str]:
        return self.hf.describe()

    def score(
        self, rollouts: Rollouts, request: ScoreParams, at: IdLists | None = None, **_: Any
    ) -> Scores:
        if at is None and request.at_student and rollouts.student is not None:
            at = IdLists(cnt=rollouts.student.cnt, ids=rollouts.student.ids)
        assembler = ResponseAssembler(rollouts, request, at, n_vocab=self.hf.n_vocab)
        # Any order is allowed.
        for sequence in reversed(range(len(rollouts.seq_prompt))):
            rows = assembler.rows(sequence)
            log_p = distributions(self.hf.model, rollouts, sequence)
            tokens = rollouts.tokens[rows]
            extra = assembler.extra_ids(sequence)
            assembler.write(sequence, returned_topk(log_p, tokens, extra, request.k_max))
        return assembler.scores()


def distributions(model: Any, rollouts: Rollouts, sequence: int) -> Array:
    """Return float32 log-probs [R, V'] over the whole head, as float64."""
    prompt = rollouts.prompts[int(rollouts.seq_prompt[sequence])].token_ids
    span = slice(int(rollouts.seq_off[sequence]), int(rollouts.seq_off[sequence + 1]))
    response = rollouts.tokens[span].tolist()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0]
    found: Array = logits[len(prompt) - 1 : -1].float().log_softmax(-1).double().numpy()
    return found
