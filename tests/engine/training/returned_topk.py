"""A teacher that tells its best ids alone, made from full laws: what vLLM or a server answers."""

from typing import Any

import numpy as np
import torch

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.returned import ResponseAssembler, ReturnedTopK
from logitcask.engine.types import Array, IdLists, Rollouts, ScoreParams, Scores


def answer_of(log_p: Array, tokens: Array, asked: IdLists | None, k: int) -> ReturnedTopK:
    """What an engine says of laws [R, V'] (V' ids of its head) when it is asked for its k best."""
    order = np.argsort(-log_p, 1, kind="stable")[:, :k]
    rows = np.arange(len(tokens))
    at = None
    if asked is not None:
        at = log_p[np.repeat(rows, asked.cnt), asked.ids.astype(np.int64)].astype(np.float32)
    return ReturnedTopK(
        lp=log_p[rows, tokens.astype(np.int64)].astype(np.float32),
        ids=order.astype(np.int64),
        top_lp=np.take_along_axis(log_p, order, 1).astype(np.float32),
        at=at,
    )


class Told:
    """`hf` seen through an AnswerSheet; `at_ids`: whether it answers at chosen ids."""

    def __init__(self, hf: HF, *, at_ids: bool = True) -> None:
        self.hf = hf
        own = {"top", "entropy", "tail", "bounds"}
        self.capabilities = frozenset(own | ({"at_ids"} if at_ids else set()))

    def describe(self) -> dict[str, str]:
        return self.hf.describe()

    def score(self, rollouts: Rollouts, request: ScoreParams, at: IdLists | None = None) -> Scores:
        if at is None and request.at_student and rollouts.student is not None:
            at = IdLists(cnt=rollouts.student.cnt, ids=rollouts.student.ids)
        assembler = ResponseAssembler(rollouts, request, at, n_vocab=self.hf.n_vocab)
        # In any order.
        for sequence in reversed(range(len(rollouts.seq_prompt))):
            rows = assembler.rows(sequence)
            log_p = laws(self.hf.model, rollouts, sequence)
            tokens = rollouts.tokens[rows]
            asked = assembler.extra_ids(sequence)
            assembler.write(sequence, answer_of(log_p, tokens, asked, request.k_max))
        return assembler.scores()


def laws(model: Any, rollouts: Rollouts, sequence: int) -> Array:
    """[R, V'] float64 of float32 log-probs over the whole head."""
    prompt = rollouts.prompts[int(rollouts.seq_prompt[sequence])].token_ids
    own = slice(int(rollouts.seq_off[sequence]), int(rollouts.seq_off[sequence + 1]))
    response = rollouts.tokens[own].tolist()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0]
    found: Array = logits[len(prompt) - 1 : -1].float().log_softmax(-1).double().numpy()
    return found
