"""Text of token ids, one by one, and the bytes of those that are a part of a character."""

import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from logitcask.engine.alignment.span_scores import SpanScores
from logitcask.engine.alignment.token_bytes import BYTE_OF_CHAR
from logitcask.engine.errors import IdentityError, ModelError
from logitcask.engine.models.identity import resolve_model, tokenizer_digest
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.report.viewer.sources import Source

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte among the pieces of SentencePiece."""
_SPACE = "\u2581"
"""Its mark of a space, which decoding drops at the beginning of a text."""


class TokenTexts:
    """Texts of ids; without a tokenizer an id stands for its text."""

    def __init__(self, tokenizer: Any = None, *, digest: str = "", note: str = "") -> None:
        self._tokenizer = tokenizer
        self.digest = digest
        """Of the tokenizer; '' without one."""
        self.note = note
        """Why there is no text, or why it may not fit; '' = it is the rollouts' own."""

    def of(self, ids: Sequence[int]) -> list[tuple[str | None, str]]:
        """Return (text, bytes) of each id: bytes as hex digits, '' where the text is whole.

        Without a tokenizer, and for ids that it does not have, the text is None.
        """
        if self._tokenizer is None:
            return [(None, "")] * len(ids)
        alone = [[each] for each in ids]
        if isinstance(self._tokenizer, Tokenizer):
            pieces = [self._tokenizer.id_to_token(each) for each in ids]
            texts = self._tokenizer.decode_batch(alone, skip_special_tokens=False)
        else:
            pieces = self._tokenizer.convert_ids_to_tokens(list(ids))
            texts = self._tokenizer.batch_decode(alone, clean_up_tokenization_spaces=False)
        return [_shown(piece, text) for piece, text in zip(pieces, texts, strict=True)]


class PieceTexts(TokenTexts):
    """Texts of a teacher's ids from the bytes that its scores of spans have: no tokenizer."""

    def __init__(self, scores: SpanScores, digest: str) -> None:
        super().__init__(digest=f"bytes of {digest}")
        ends = np.cumsum(scores.piece_lengths, dtype=np.int64).tolist()
        data, starts = scores.piece_bytes.tobytes(), [0, *ends]
        self.pieces = {
            token: data[a:b]
            for token, a, b in zip(scores.piece_ids.tolist(), starts, ends, strict=False)
        }

    def of(self, ids: Sequence[int]) -> list[tuple[str | None, str]]:
        """Return (text, bytes) of each id as TokenTexts; a control token has no text."""
        return [_of_bytes(self.pieces.get(each, b"")) for each in ids]


def _of_bytes(piece: bytes) -> tuple[str | None, str]:
    try:
        return piece.decode() or None, ""
    except UnicodeDecodeError:
        return "", piece.hex(" ").upper()


def _shown(piece: str | None, text: str) -> tuple[str | None, str]:
    if piece is None:  # models may have more ids than their tokenizer
        return None, ""
    if "\ufffd" in text and (raw := _bytes_of(piece)) is not None:
        try:
            return raw.decode(), ""
        except UnicodeDecodeError:
            return "", raw.hex(" ").upper()
    if piece.startswith(_SPACE) and not text.startswith(" "):
        return f" {text}", ""
    return text or piece, ""


def _bytes_of(piece: str) -> bytes | None:
    """Return the bytes of a piece of byte-level BPE or of a byte of SentencePiece; else None."""
    if found := _BYTE.fullmatch(piece):
        return bytes.fromhex(found[1])
    known = [BYTE_OF_CHAR.get(each) for each in piece]
    return None if None in known else bytes(each for each in known if each is not None)


def token_texts(source: Source, rollouts: str, tokenizer: str = "") -> TokenTexts:
    """Return the texts of a source: by `tokenizer`, a folder or hub id, else the recorded student's
    or that of a folder of the source, if it has the recorded digest.

    Raises IdentityError or ModelError for a `tokenizer` that is not that of the rollouts, or that
    cannot be read. Without it a tokenizer that is not here is no error: the page shows ids.
    """
    of = source.snapshot.rollouts(rollouts)[0].provenance.get("student")
    of = of if isinstance(of, dict) else {}
    name, revision, digest = (str(of.get(key, "")) for key in ("name", "revision", "tokenizer"))
    if tokenizer:
        return _checked(resolve_model(tokenizer, weights=False), digest)
    causes = []
    for each in [name, *source.folders] if name else source.folders:
        try:
            own = revision if each == name else ""
            path = resolve_model(each, own, weights=False, download=False)
            return _checked(path, digest)
        except (IdentityError, ModelError) as error:
            causes.append(error.cause)
    why = causes[0] if causes else "the store does not record its student's tokenizer"
    return TokenTexts(note=f"ids stand for texts: {why}; give --tokenizer")


def _checked(path: Path, digest: str) -> TokenTexts:
    tokenizer, found = _load(str(path), os.stat(path).st_mtime_ns, digest)
    if digest and found != digest:
        raise IdentityError(
            f"the tokenizer of {path} is not that of these rollouts, {digest}",
            hint="give the student's, a folder or hub id, with --tokenizer",
        )
    note = "" if digest else f"text by {path}: the store does not record its student's tokenizer"
    return TokenTexts(tokenizer, digest=found, note=note)


@lru_cache(maxsize=4)
def _load(path: str, changed: int, digest: str) -> tuple[Any, str]:
    """Return (tokenizer, its digest); a live page asks again and again.

    transformers takes a second to import. The file alone will do where its digest is the recorded
    one: then there is nothing that other files of the folder add to it.
    """
    del changed  # a part of the key
    file = Path(path) / "tokenizer.json"
    if digest and file.is_file():
        try:
            found = Tokenizer.from_file(str(file))
        # tokenizers raises bare Exception; below, transformers reads the same file and says why.
        except Exception:
            found = None
        if found is not None and tokenizer_digest(found) == digest:
            return found, digest
    tokenizer = load_tokenizer(Path(path))
    return tokenizer, tokenizer_digest(tokenizer)
