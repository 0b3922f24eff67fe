"""Distance of a student from its teacher on held-out chats, by plain transformers in float32.

Of a text of each held-out chat, sampled at temperature 1 by the teacher or by the student before
its training: the KL divergence in both directions over the whole vocabulary, the share of positions
with the same first id, the share of common ids of both top-16, and the student's negative
log-likelihood. Values are sums of a text. A mean is a ratio of sums over the texts, and its
standard error is over texts, because positions of one text are not independent.
"""

import json
from pathlib import Path
from typing import Any

import torch
from real_chats import is_right
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS, GRADED_TOKENS = 48, 16
"""Of a held-out text, and of a graded response."""
TOPK, BATCH = 16, 32
MEASURES = ("kl_pq", "kl_qp", "top1", "overlap", "nll")

Texts = list[tuple[list[int], list[int]]]
"""(prompt ids, response ids) of each chat."""


class Chats:
    """Chats of a file, rendered for models of one tokenizer."""

    def __init__(self, file: Path, model: Path) -> None:
        self.rows = [json.loads(line) for line in file.read_text().splitlines()]
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.prompts = [
            self.tokenizer.apply_chat_template(
                row["messages"], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            for row in self.rows
        ]

    @torch.no_grad()
    def texts(self, model: Any, new_tokens: int, *, sample: bool) -> Texts:
        """Return a response of the model to every chat, up to the end token."""
        torch.manual_seed(0)
        end = self.tokenizer.eos_token_id
        how = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
        found: Texts = []
        for at in range(0, len(self.prompts), BATCH):
            prompts = self.prompts[at : at + BATCH]
            width = max(map(len, prompts))
            ids = torch.tensor([[end] * (width - len(each)) + each for each in prompts])
            mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts])
            rows = model.generate(
                ids, attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=end, **how
            )
            for prompt, row in zip(prompts, rows[:, width:].tolist(), strict=True):
                found.append((prompt, row[: row.index(end) + 1] if end in row else row))
        return found

    def graded(self, model: Any) -> tuple[int, int]:
        """Return (right responses, chats), sampled greedily."""
        texts = self.texts(model, GRADED_TOKENS, sample=False)
        responses = [self.tokenizer.decode(ids, skip_special_tokens=True) for _, ids in texts]
        marks = [is_right(row["answer"], r) for row, r in zip(self.rows, responses, strict=True)]
        return sum(marks), len(marks)


def load(folder: Path) -> Any:
    """Load a model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def log_probs(model: Any, texts: Texts) -> list[Tensor]:
    """Return the log-probs [R, V] at the response tokens of each text."""
    return [
        model(torch.tensor([prompt + ids]), use_cache=False)
        .logits[0, len(prompt) - 1 : -1]
        .log_softmax(-1)
        for prompt, ids in texts
    ]


def distances(model: Any, texts: Texts, teacher: list[Tensor]) -> dict[str, list[float]]:
    """Return the sums of each of MEASURES over each text, and `tokens`."""
    found: dict[str, list[float]] = {name: [] for name in (*MEASURES, "tokens")}
    for log_p, log_q, (_, ids) in zip(log_probs(model, texts), teacher, texts, strict=True):
        top_p, top_q = log_p.topk(TOPK).indices, log_q.topk(TOPK).indices
        common = (top_p[:, :, None] == top_q[:, None]).any(-1).double().mean(-1)
        sampled = torch.tensor(ids)[:, None]
        found["kl_pq"].append(float((log_p.exp() * (log_p - log_q)).double().sum()))
        found["kl_qp"].append(float((log_q.exp() * (log_q - log_p)).double().sum()))
        found["top1"].append(float((top_p[:, 0] == top_q[:, 0]).double().sum()))
        found["overlap"].append(float(common.sum()))
        found["nll"].append(-float(log_p.gather(1, sampled).double().sum()))
        found["tokens"].append(float(len(ids)))
    return found


def mean(sums: dict[str, list[float]], name: str) -> tuple[float, float]:
    """Return a measure per token, and its standard error over texts."""
    return _ratio(torch.tensor(sums[name]).double(), torch.tensor(sums["tokens"]).double())


def paired(
    sums: dict[str, list[float]], before: dict[str, list[float]], name: str
) -> tuple[float, float]:
    """Return the difference of a measure from another model's on the same texts, and its error."""
    difference = torch.tensor(sums[name]).double() - torch.tensor(before[name]).double()
    return _ratio(difference, torch.tensor(sums["tokens"]).double())


def _ratio(values: Tensor, tokens: Tensor) -> tuple[float, float]:
    ratio = values.sum() / tokens.sum()
    error = ((values - ratio * tokens) ** 2).sum().sqrt() / tokens.sum()
    return float(ratio), float(error)
