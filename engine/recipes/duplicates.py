"""Near duplicates of texts: cosine similarity to the nearest text of a reference set.

embedding   a model of sentence-transformers and an exact index of faiss (extra `dedup`), as in
            the released scripts/infer/dedup_deepmath.py of arXiv 2604.13016: vectors of length
            1, the largest inner product
ngram       counts of hashed n-grams of characters: without a model. It finds texts that share
            their spelling; two wordings of one task are far from each other, and two short
            tasks of one form are near
"""

import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.types import Array

NGRAM = 5
"""Characters of an n-gram."""
SLOTS = 2048
"""Hashed n-grams are counted in so many slots, 8 kB a text."""
BLOCK = 512
"""Texts of one product."""

Nearest = Callable[[Sequence[str]], Array]
"""Texts -> [n] float32, cosine similarity of each to the nearest text of the reference."""


def nearest(reference: Sequence[str], embedding_model: str) -> tuple[Nearest, str]:
    """Return the search in a reference, and its method in words.

    embedding_model: of sentence-transformers; "" = hashed n-grams. Raises ConfigError where its
    packages are missing, ModelError for a model that they do not load.
    """
    if embedding_model:
        return by_embeddings(reference, embedding_model), f"embedding: {embedding_model}"
    return by_ngrams(reference), f"ngram: hashed {NGRAM}-grams of characters, no embedding"


def by_ngrams(reference: Sequence[str]) -> Nearest:
    """Return the search by n-grams of characters."""
    blocks = [
        np.stack([ngram_vector(text) for text in reference[at : at + BLOCK]])
        for at in range(0, len(reference), BLOCK)
    ]

    def search(texts: Sequence[str]) -> Array:
        found = np.stack([ngram_vector(text) for text in texts])
        best: Array = np.full(len(texts), -1.0, np.float32)
        for block in blocks:
            best = np.maximum(best, (found @ block.T).max(1))
        return best

    return search


def ngram_vector(text: str) -> Array:
    """Return [SLOTS] float32 of length 1: square roots of the counts of n-grams, by hash.

    Case and blanks do not count. A text shorter than an n-gram is one.
    """
    plain = re.sub(r"\s+", " ", text.casefold()).strip()
    data = plain.encode("utf-32-le", "surrogatepass")
    ends = range(0, max(1, len(plain) - NGRAM + 1))
    slots = [_slot(data[4 * at : 4 * (at + NGRAM)]) for at in ends]
    counts = np.sqrt(np.bincount(slots, minlength=SLOTS)).astype(np.float32)
    vector: Array = counts / np.linalg.norm(counts)
    return vector


def _slot(gram: bytes) -> int:
    # Not Python's own hash, which is another one in each process.
    return int.from_bytes(hashlib.blake2b(gram, digest_size=4).digest()) % SLOTS


def by_embeddings(reference: Sequence[str], name: str) -> Nearest:
    """Return the search by embeddings; raises as `nearest`."""
    try:
        import faiss  # pyright: ignore[reportMissingImports]
        from sentence_transformers import (  # pyright: ignore[reportMissingImports]
            SentenceTransformer,
        )
    except ImportError as error:
        raise ConfigError(
            f"embedding_model = {name}: {error}",
            hint='pip install "logitcask[dedup]", or leave --embedding-model out, which compares '
            "n-grams of characters",
        ) from error
    try:
        model = SentenceTransformer(name, trust_remote_code=False)
    # Its loaders raise anything from OSError to bare Exception.
    except Exception as error:
        raise ModelError(
            f"embedding_model = {name}: it cannot be loaded: {type(error).__name__}: {error}",
            hint="give a folder or hub id of a model of sentence-transformers",
        ) from error

    def vectors(texts: Sequence[str]) -> Array:
        found: Array = model.encode(
            list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        return np.ascontiguousarray(found, np.float32)

    first = vectors(reference[:BLOCK])
    index = faiss.IndexFlatIP(first.shape[1])
    index.add(first)
    for at in range(BLOCK, len(reference), BLOCK):
        index.add(vectors(reference[at : at + BLOCK]))

    def search(texts: Sequence[str]) -> Array:
        best: Array = index.search(vectors(texts), 1)[0][:, 0]
        return best

    return search
