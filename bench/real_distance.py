"""Distance of a student from its teacher on held-out chats, by plain transformers in float32.

Of a text of each held-out chat, sampled at temperature 1 by the teacher or by the student before
its training: the KL divergence in both directions over the whole vocabulary, the share of positions
with the same first id, the share of common ids of both top-16, and the student's negative
log-likelihood. Values are sums of a text; real_sums.py makes figures of them.
"""

import json
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from real_sums import MEASURES, TEXTS
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcask.engine.prompts.answers import contains_words

NEW_TOKENS, GRADED_TOKENS = 48, 16
"""Of a held-out text, and of a graded response."""
TOPK, BATCH = 16, 32
DIGITS = 5
"""Of the sums in a row."""

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

    def responses(self, model: Any) -> list[str]:
        """Return the text of a response to every chat, sampled greedily."""
        texts = self.texts(model, GRADED_TOKENS, sample=False)
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for _, ids in texts]


class Measurement:
    """The held-out texts with the teacher's log-probs, and the graded chats; made when needed."""

    def __init__(self, place: Path) -> None:
        self.place = place

    @cached_property
    def held_out(self) -> dict[str, tuple[Texts, list[Tensor]]]:
        """Return sampler -> its texts, always the same, and the teacher's log-probs there."""
        chats = Chats(self.place / "held_out.jsonl", self.place / "teacher")
        models = {name: load(self.place / name) for name in TEXTS}
        texts = {n: chats.texts(each, NEW_TOKENS, sample=True) for n, each in models.items()}
        return {n: (each, log_probs(models["teacher"], each)) for n, each in texts.items()}

    @cached_property
    def graded(self) -> Chats:
        """Return the chats with an answer."""
        return Chats(self.place / "graded.jsonl", self.place / "teacher")

    def of(self, folder: Path) -> dict[str, Any]:
        """Return the sums of each text, the marks of the graded responses, and the CPU seconds."""
        start = time.process_time()
        model = load(folder)
        responses = self.graded.responses(model)
        rows = zip(self.graded.rows, responses, strict=True)
        return {
            "sums": {name: distances(model, *each) for name, each in self.held_out.items()},
            "marks": [int(contains_words(response, row["answer"])) for row, response in rows],
            "responses": responses,
            "cpu_s": round(time.process_time() - start, 1),
        }


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
        sums = {
            "kl_pq": (log_p.exp() * (log_p - log_q)).double().sum(),
            "kl_qp": (log_q.exp() * (log_q - log_p)).double().sum(),
            "top1": (top_p[:, 0] == top_q[:, 0]).double().sum(),
            "overlap": common.sum(),
            "nll": -log_p.gather(1, sampled).double().sum(),
            "tokens": len(ids),
        }
        for name, value in sums.items():
            found[name].append(round(float(value), DIGITS))
    return found
