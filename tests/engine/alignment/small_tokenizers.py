"""Small tokenizers of each kind, trained here."""

import json
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

CORPUS = [
    *("def f(x):\n    return x + 12\n", "the student reads the teacher's text", "12 + 30 = 42"),
    *("é e\u0301 ü 漢字 🙂 👩\u200d👩\u200d👧", "  two  spaces\tand\r\nlines", "ΩΩ가나 <0x41>"),
] * 4
SPECIAL = ["<unk>", "</s>"]
SIZE = 420


@cache
def tokenizer_of(kind: str) -> Any:
    """Return a fast tokenizer of a kind of MAKERS, with </s> as a control token."""
    tokenizer = MAKERS[kind]()
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    )
    fast.add_tokens([AddedToken("<think>", normalized=False)])
    return fast


def byte_level(*, nfc: bool = False) -> Tokenizer:
    """Train one as of Llama 3; with NFC as of Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece(*, prefixed: bool = False) -> Tokenizer:
    """Train one as of Gemma; with a space before the text as of Llama 2."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    replaced: list[Any] = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(replaced)
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    )
    if prefixed:
        replaced.insert(0, normalizers.Prepend("▁"))
        tokenizer.normalizer = normalizers.Sequence(replaced)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] * prefixed)])
    # The trainer has no tokens for bytes: they go behind the others.
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    state["model"] |= {"byte_fallback": True, "fuse_unk": True}
    return Tokenizer.from_str(json.dumps(state))


def unigram() -> Tokenizer:
    """Train one as of T5, with a space before the text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer: Any = trainers.UnigramTrainer(
        vocab_size=SIZE, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def wordpiece() -> Tokenizer:
    """Train one as of BERT: no token has a space, and all words have one before them."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer: Any = trainers.WordPieceTrainer(
        vocab_size=SIZE, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def characters() -> Tokenizer:
    """Train one as of the demo: one token a character of the corpus."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer: Any = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


MAKERS = {
    "byte-level": byte_level,
    "nfc": lambda: byte_level(nfc=True),
    "sentencepiece": sentencepiece,
    "prefixed": lambda: sentencepiece(prefixed=True),
    "unigram": unigram,
    "wordpiece": wordpiece,
    "characters": characters,
}
