"""Tiny model folders for tests: a Qwen3 of some ten thousand parameters and a character tokenizer.

Everything is made in code from a seed, needs no network and takes well under half a second.
"""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, EOS, UNKNOWN = 0, 1, 2
CHARACTERS = "\n" + "".join(chr(c) for c in range(32, 127))
N_VOCAB = 3 + len(CHARACTERS)
"""99: three special tokens, the newline and printable ASCII."""

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer(
    *, chat_template: bool = True, characters: str = CHARACTERS
) -> PreTrainedTokenizerFast:
    """Make a tokenizer of characters: id 0 <pad>, 1 <eos>, 2 <unk>, then `characters` in order."""
    tokens = ["<pad>", "<eos>", "<unk>", *characters]
    words = Tokenizer(WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat_template else None
    return tokenizer


def make_model(
    *,
    vocab_size: int = N_VOCAB,
    hidden: int = 32,
    layers: int = 2,
    seed: int = 0,
    spread: float = 0.3,
    tie: bool = True,
    context: int = 256,
    eos: int | list[int] | None = EOS,
) -> Qwen3ForCausalLM:
    """Make a float32 Qwen3 with random weights of standard deviation `spread`.

    The larger the spread, the further its distributions are from uniform.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=vocab_size,
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=hidden // 2,
                max_position_embeddings=context,
                initializer_range=spread,
                tie_word_embeddings=tie,
                bos_token_id=None,
                eos_token_id=eos,
                pad_token_id=PAD,
            )
        )
    return model.eval()


def save_folder(
    path: Path,
    model: Qwen3ForCausalLM | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Write a complete model folder: weights, config, tokenizer."""
    (make_model() if model is None else model).save_pretrained(path)
    (make_tokenizer() if tokenizer is None else tokenizer).save_pretrained(path)
    return path
