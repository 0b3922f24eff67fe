"""Models of the miniature: supervised training on texts, sampling, and accuracy.

Shapes: B rows of a batch, L tokens of a padded row.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paper_task import Problem
from torch import Tensor

from logitcask.engine.demo.models import PAD, STOP, make_tokenizer, save

TOKENIZER = make_tokenizer()
WARMUP = 30
Text = tuple[str, str]
"""(prompt, response) without stop token."""


def load(folder: Path) -> Any:
    """Load a model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def store(model: Any, folder: Path) -> None:
    """Save an ordinary model folder."""
    save(model, TOKENIZER, folder)


def train(model: Any, texts: Iterator[Text], steps: int, lr: float, batch: int = 64) -> float:
    """Train on the responses, stop token included; return the mean loss of the last tenth, nats.

    AdamW; the rate rises in WARMUP steps, then goes to 0 in a straight line.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP, 1.05 - step / steps)
        loss = _loss(model, [next(texts) for _ in range(batch)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return math.fsum(last) / len(last)


def _loss(model: Any, texts: list[Text]) -> Tensor:
    """Return the mean negative log-likelihood of the responses, in nats."""
    prompts = TOKENIZER([prompt for prompt, _ in texts])["input_ids"]
    responses = TOKENIZER([response for _, response in texts])["input_ids"]
    rows = [torch.tensor([*p, *r, STOP]) for p, r in zip(prompts, responses, strict=True)]
    tokens_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    at_BL = torch.arange(tokens_BL.shape[1] - 1)[None]
    first = torch.tensor([len(p) - 1 for p in prompts])[:, None]
    last = torch.tensor([len(row) - 1 for row in rows])[:, None]
    target_BL = (at_BL >= first) & (at_BL < last)
    # Rows are padded at their ends, which causal attention never reads: no mask is needed.
    hidden = model.model(input_ids=tokens_BL, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][target_BL])
    return F.cross_entropy(logits, tokens_BL[:, 1:][target_BL])


@torch.no_grad()
def sample(model: Any, starts: list[str], new_tokens: int, seed: int) -> list[str]:
    """Sample one continuation of each text at temperature 1, up to the stop token.

    All texts have one length. A continuation without a stop token ends in `<pad>`.
    """
    tokens = torch.tensor(TOKENIZER(starts)["input_ids"])
    draw = torch.Generator().manual_seed(seed)
    done = torch.zeros(len(starts), dtype=torch.bool)
    written: list[Tensor] = []
    cache = None
    while len(written) < new_tokens and not done.all():
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        p = output.logits[:, -1].softmax(-1)
        chosen = torch.multinomial(p, 1, generator=draw)[:, 0].masked_fill(done, PAD)
        done |= chosen == STOP
        written.append(chosen)
        tokens = chosen[:, None]
    texts: list[str] = TOKENIZER.batch_decode(
        torch.stack(written, 1).tolist(), skip_special_tokens=True
    )
    return [text if end else f"{text}<pad>" for text, end in zip(texts, done, strict=True)]


def right_share(model: Any, problems: list[Problem], new_tokens: int, seed: int = 0) -> float:
    """Return the share of problems that a sample at temperature 1 solves."""
    texts = sample(model, [p.prompt for p in problems], new_tokens, seed)
    return sum(p.solved_by(t) for p, t in zip(problems, texts, strict=True)) / len(problems)
