"""Bytes of each id of a tokenizer, from its own decoder.

Bytes are the only coordinate that two tokenizers share: characters are split by byte-level tokens,
and `decode([id])` loses the parts of a character. The table follows the steps of the decoder in
tokenizer.json, and each entry is compared with what the tokenizer itself decodes.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders

from logitcask.engine.errors import ModelError
from logitcask.engine.types import Array

CONTROL = -1
"""Length of a token without text: the end of a sequence, a role of a chat."""
HEX = re.compile(r"<0x([0-9A-Fa-f]{2})>")
HINT = "use a teacher and a student with tokenizers of these kinds: byte-level BPE, SentencePiece"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBytes:
    """The bytes of every id below `len(pieces)`."""

    pieces: tuple[bytes | None, ...]
    """Of id i; None for a control token, and for an id without a token."""
    lengths: Array
    """[V] int64 bytes; CONTROL where `pieces` has None."""
    single: Mapping[int, int]
    """Byte -> the lowest id that stands for it alone; some tokenizers lack a few."""
    lead: bytes
    """Begins the bytes of an encoded text and is not in it: the space before a first word."""
    digest: str
    """Of pieces and lead: two tokenizers of one digest spell every sequence of ids alike."""

    def spell(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of a sequence of ids; control tokens have none."""
        return b"".join(self.pieces[i] or b"" for i in ids)


def token_bytes(tokenizer: Any) -> TokenBytes:
    """Build the table of a transformers tokenizer. Seconds for 200,000 ids.

    Special added tokens are control tokens; other added tokens, such as <think>, are text. Raises
    ModelError for a tokenizer without a tokenizer.json, with a decoder of another kind, and where
    the table and the decoder disagree about an id.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json", hint=HINT
        )
    state = json.loads(backend.to_str())
    added = {each["id"]: each for each in state["added_tokens"]}
    steps = _steps(state["decoder"])
    spell, lead = _speller(steps)
    count = max([backend.get_vocab_size(with_added_tokens=True), *(i + 1 for i in added)])
    pieces: list[bytes | None] = [None] * count
    for index in range(count):
        token = backend.id_to_token(index)
        if token is None or added.get(index, {}).get("special"):
            continue
        pieces[index] = spell(token, index in added)
    _compare(state, pieces, len(lead))
    return _table(tuple(pieces), lead)


def _table(pieces: tuple[bytes | None, ...], lead: bytes) -> TokenBytes:
    lengths = np.array([CONTROL if p is None else len(p) for p in pieces], np.int64)
    single: dict[int, int] = {}
    for index, piece in enumerate(pieces):
        if piece is not None and len(piece) == 1:
            single.setdefault(piece[0], index)
    whole = hashlib.sha256(lengths.tobytes() + lead + b"\0" + b"".join(p or b"" for p in pieces))
    return TokenBytes(
        pieces=pieces,
        lengths=lengths,
        single=single,
        lead=lead,
        digest=f"sha256:{whole.hexdigest()}",
    )


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        raise ModelError("the tokenizer has no decoder, so its ids have no text", hint=HINT)
    if decoder["type"] == "Sequence":
        return [step for each in decoder["decoders"] for step in _steps(each)]
    return [decoder]


def _speller(steps: Sequence[Mapping[str, Any]]) -> tuple[Callable[[str, bool], bytes], bytes]:
    """Return (token, is added) -> bytes, and the lead."""
    kinds = {step["type"] for step in steps}
    unknown = kinds - {
        *("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece")
    }
    patterns = [step["pattern"] for step in steps if step["type"] == "Replace"]
    if unknown or any("String" not in each for each in patterns):
        raise ModelError(
            f"a decoder with {', '.join(sorted(unknown)) or 'a Replace by a regular expression'} "
            "gives an id no bytes of its own",
            hint=HINT,
        )
    lead = b""
    for step in steps:
        prepended = step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        stripped = step["type"] == "Strip" and step["content"] == " " and step["start"] == 1
        if prepended or stripped or step["type"] == "WordPiece":
            lead = b" "

    def spell(token: str, is_added: bool) -> bytes:
        if "ByteLevel" in kinds:
            # Added tokens are matched on the raw text and never go through the map of bytes.
            return token.encode() if is_added else _mapped(token)
        for step in steps:
            match step["type"]:
                case "ByteFallback" if not is_added and (found := HEX.fullmatch(token)):
                    return bytes([int(found[1], 16)])
                case "Replace":
                    token = token.replace(step["pattern"]["String"], step["content"])
                case "Metaspace":
                    token = token.replace(step["replacement"], " ")
                case "WordPiece":
                    inner = token.startswith(step["prefix"])
                    token = token.removeprefix(step["prefix"]) if inner else f" {token}"
        return token.encode()

    return spell, lead


def _byte_of_char() -> dict[str, int]:
    """Return GPT-2's map of printable characters to bytes (bytes_to_unicode, inverted)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()
"""Character of a byte-level token -> its byte."""


def _mapped(token: str) -> bytes:
    """Return the bytes of a byte-level token; one with a character outside the map is itself."""
    found = [BYTE_OF_CHAR.get(char) for char in token]
    return token.encode() if None in found else bytes(byte for byte in found if byte is not None)


def _compare(state: dict[str, Any], pieces: Sequence[bytes | None], lead: int) -> None:
    """Raise ModelError where the tokenizer decodes an id to other text than the table has.

    Each id is decoded behind a letter, which keeps its space from the start of the text. Bytes
    that are no whole characters are compared as what is left of them: U+FFFD.
    """
    tokenizer = Tokenizer.from_str(json.dumps(state))
    if state["decoder"]["type"] == "WordPiece":
        # Its cleanup takes spaces away that the ids have.
        tokenizer.decoder = decoders.WordPiece(state["decoder"]["prefix"], cleanup=False)
    letters = [i for i, p in enumerate(pieces) if p and p.strip().isalpha()]
    # One letter may be a token of ByteFallback, which the next one of these would join.
    anchor = next((i for i in letters if len(pieces[i] or b"") > 2), next(iter(letters), None))
    if anchor is None:
        raise ModelError("the tokenizer has no token of letters alone", hint=HINT)
    before = pieces[anchor] or b""
    texts = tokenizer.decode_batch(
        [[anchor, i] for i, p in enumerate(pieces) if p is not None], skip_special_tokens=False
    )
    begin = before[lead:] if lead and before.startswith(b" ") else before
    known = (index for index, piece in enumerate(pieces) if piece is not None)
    wrong = [
        (index, decoded)
        for index, decoded in zip(known, texts, strict=True)
        if not _same(begin + (pieces[index] or b""), decoded)
    ]
    if wrong:
        shown = ", ".join(f"{i}: {pieces[i]!r} or {text!r}" for i, text in wrong[:_SHOWN])
        raise ModelError(
            f"{len(wrong)} ids decode to other text than their tokens spell: {shown}", hint=HINT
        )


def _same(spelled: bytes, decoded: str) -> bool:
    try:
        return spelled.decode() == decoded
    except UnicodeDecodeError:
        # Decoders differ in how many U+FFFD stand for the bytes of a part.
        return _parts(spelled.decode(errors="replace")) == _parts(decoded)


def _parts(text: str) -> list[str]:
    return [part for part in text.split("\ufffd") if part]
