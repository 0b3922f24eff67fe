"""Tokenizer and tiny models of the demo, and their accuracy on its task.

Both models are ordinary Qwen3 folders: the stages treat them as any other.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from logitcask.engine.demo.task import Problem
from logitcask.engine.models.load import quiet

CHARACTERS = [chr(code) for code in range(32, 127)]
PAD, STOP = 0, 1
SPECIAL = {"<pad>": PAD, "<stop>": STOP}
CONTEXT = 128


@dataclass(frozen=True, slots=True)
class Size:
    """Dimensions of a Qwen3."""

    hidden: int
    layers: int
    intermediate: int
    heads: int


def make_tokenizer() -> Any:
    """Return a tokenizer of printable ASCII characters, with 97 tokens.

    The task needs 17 of them; with the others, a top-16 is a sparse view, as of a real vocabulary.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = SPECIAL | {c: i for i, c in enumerate(CHARACTERS, start=len(SPECIAL))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.decoder = decoders.Fuse()
    factory: Any = PreTrainedTokenizerFast
    return factory(
        tokenizer_object=characters,
        pad_token="<pad>",
        eos_token="<stop>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(size: Size, seed: int) -> Any:
    """Return a Qwen3 with random weights, a pure function of the seed."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=STOP,
        bos_token_id=None,
        # Three times the default: at these widths learning starts in half the steps.
        initializer_range=0.06,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save an ordinary model folder: safetensors, config and tokenizer."""
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, problems: list[Problem], max_new_tokens: int) -> float:
    """Return the share of problems solved by greedy decoding; their prompts have equal length."""
    tokens = torch.tensor(tokenizer([p.prompt for p in problems])["input_ids"])
    finished = torch.zeros(len(problems), dtype=torch.bool)
    written: list[torch.Tensor] = []
    cache = None
    training = model.training
    model.eval()
    while len(written) < max_new_tokens and not finished.all():
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        chosen = output.logits[:, -1].argmax(-1).masked_fill(finished, PAD)
        finished |= chosen == STOP
        written.append(chosen)
        tokens = chosen[:, None]
    model.train(training)
    texts = tokenizer.batch_decode(torch.stack(written, 1).tolist(), skip_special_tokens=True)
    solved = [
        bool(done) and problem.solved_by(text)
        for problem, text, done in zip(problems, texts, finished, strict=True)
    ]
    return sum(solved) / len(solved)
