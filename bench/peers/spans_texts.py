"""Spans of texts by other projects against ours: boundaries that are none, and bytes that are lost.

Run: python bench/peers/spans_texts.py --checkout FOLDER --tokenizers FOLDER [--packages FOLDER]

--checkout holds clones of RL (NeMo-RL), SimCT- (KDFlow with SimCT) and rllm, --tokenizers folders
qwen3, llama3 and gemma3, as those of bench_alignment.py. Each text is encoded by two tokenizers, so
that both spell the same bytes. A segment of a peer is right where its tokens spell the same bytes
on both sides. Ours are all right and the finest (bench_alignment.py checks that), so they are what
a peer's are compared with. Counted too: ids that TRL and SimCT match by their strings, and the
entries of NeMo-RL's map of bytes. A row is appended to bench/results/peer_spans.jsonl.
"""

import importlib.util
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import bench_alignment  # noqa: E402
import results  # noqa: E402
from results import Row  # noqa: E402
from run import version  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from logitcask.engine.alignment.encode import ByteEncoder  # noqa: E402
from logitcask.engine.alignment.spans import align  # noqa: E402
from logitcask.engine.alignment.token_bytes import BYTE_OF_CHAR  # noqa: E402
from logitcask.engine.errors import UnitError  # noqa: E402

PAIRS = (("qwen3", "llama3"), ("llama3", "gemma3"), ("qwen3", "gemma3"))
"""(student, teacher), folders of tokenizers."""
KINDS = {0: "code", 1: "mixed"}
"""Number of a text modulo four -> kind, of those that are UTF-8."""


Span = tuple[int, int, int, int]
"""Tokens [a0, a1) of the student and [b0, b1) of the teacher."""


class Side(NamedTuple):
    tokenizer: Any
    encoder: ByteEncoder


class Text(NamedTuple):
    kind: str
    text: bytes
    student: list[int]
    teacher: list[int]
    spans: set[Span]


Segments = Callable[[Text, Side, Side], Iterable[Span]]
"""(text, student, teacher) -> (a0, a1, b0, b1) of each segment."""


def sides(folder: Path) -> dict[str, Side]:
    """Return the tokenizers of all pairs."""
    found = {}
    for name in sorted({name for pair in PAIRS for name in pair}):
        tokenizer = AutoTokenizer.from_pretrained(folder / name, local_files_only=True)
        found[name] = Side(tokenizer, ByteEncoder(tokenizer))
    return found


def texts(count: int, student: Side, teacher: Side) -> list[Text]:
    """Return texts of both kinds that both tokenizers spell, `count` of a kind at most."""
    made = list(bench_alignment.texts(4 * count))
    found = []
    for number, text in enumerate(made):
        if (kind := KINDS.get(number % 4)) is None:
            continue
        try:
            ours, theirs = student.encoder.encode(text), teacher.encoder.encode(text)
        except UnitError:
            continue
        rows = align(student.encoder.table, ours.ids, teacher.encoder.table, theirs.ids).rows
        spans = {tuple(row) for row in rows.tolist()}
        found.append(Text(kind, text, ours.ids.tolist(), theirs.ids.tolist(), spans))
    return found


def compare(made: list[Text], student: Side, teacher: Side, segments: Segments) -> list[Row]:
    """Return a row for each kind: the share of our spans that a peer has, segments of other bytes,
    and the share of the bytes in right segments.
    """
    rows = []
    for kind in KINDS.values():
        counts = Counter[str]()
        for each in made:
            if each.kind != kind:
                continue
            found = list(segments(each, student, teacher))
            right = [s for s in found if _same_bytes(each, s, student, teacher)]
            counts["texts"] += 1
            counts["spans"] += len(each.spans)
            counts["found"] += len(each.spans & set(right))
            counts["wrong"] += len(found) - len(right)
            counts["bytes"] += len(each.text)
            counts["covered"] += sum(_length(each, s, student) for s in right)
        rows.append(
            {
                "texts": f"{kind}, {counts['texts']}",
                "spans_found": counts["found"] / counts["spans"],
                "segments_of_other_bytes": counts["wrong"],
                "bytes_in_right_segments": counts["covered"] / counts["bytes"],
            }
        )
    return rows


def _same_bytes(each: Text, segment: Span, student: Side, teacher: Side) -> bool:
    a0, a1, b0, b1 = segment
    ours = student.encoder.table.spell(each.student[a0:a1])
    return ours == teacher.encoder.table.spell(each.teacher[b0:b1]) != b""


def _length(each: Text, segment: Span, student: Side) -> int:
    return len(student.encoder.table.spell(each.student[segment[0] : segment[1]]))


def matched_by_string(student: Side, teacher: Side, change: Callable[[str], str] = str) -> Row:
    """Return the pairs of ids with equal (changed) strings: those of equal bytes among all that are
    equal, and those of different bytes. TRL takes the strings as they are; SimCT replaces Ġ by ▁.
    """
    ours = {change(token): index for token, index in student.tokenizer.get_vocab().items()}
    theirs = {change(token): index for token, index in teacher.tokenizer.get_vocab().items()}
    a, b = student.encoder.table.pieces, teacher.encoder.table.pieces
    both = [(ours[token], theirs[token]) for token in ours.keys() & theirs.keys()]
    equal = len({piece for piece in a if piece} & {piece for piece in b if piece})
    wrong = [(i, j) for i, j in both if a[i] and b[j] and a[i] != b[j]]
    shown = [f"{teacher.tokenizer.convert_ids_to_tokens(j)!r}" for _, j in sorted(wrong)[:3]]
    return {
        "matched": len(both),
        "equal_bytes": equal,
        "of_equal_bytes": sum(bool(a[i]) and a[i] == b[j] for i, j in both),
        "of_other_bytes": len(wrong),
        "examples": shown,
    }


def byte_map(aligner: Any) -> Row:
    """Return the entries of NeMo-RL's VISUAL_BYTE_MAP that are not those of GPT-2's map of bytes,
    and the entries outside printable ASCII that it lacks.
    """
    theirs: dict[str, int] = aligner.VISUAL_BYTE_MAP
    return {
        "entries": len(theirs),
        "wrong": sum(BYTE_OF_CHAR.get(char) != byte for char, byte in theirs.items()),
        "characters_for_others": sum(char not in BYTE_OF_CHAR for char in theirs),
        "canonical": {each: aligner.canonical_token(each) for each in ("ĉ", "_a", "Ġ,")},
    }


def simct_segments(module: Any) -> Segments:
    """Return the alignment of KDFlow's span_ctkd (SimCT)."""

    def segments(each: Text, student: Side, teacher: Side) -> Iterable[Span]:
        loss = module.SpanCrossTokenizerKD.__new__(module.SpanCrossTokenizerKD)
        loss.student_tokenizer, loss.teacher_tokenizer = student.tokenizer, teacher.tokenizer
        loss._debug_count = 99
        found, _, _ = loss._align_sequences_with_spans(each.teacher, each.student)
        return [(s0, s1, t0, t1) for t0, t1, s0, s1 in found]

    return segments


def nemo_segments(module: Any, flagged: Counter[str]) -> Segments:
    """Return NeMo-RL's alignment; `flagged` counts student tokens by the flag of their pair."""

    def segments(each: Text, student: Side, teacher: Side) -> Iterable[Span]:
        aligner = module.TokenAligner(student.tokenizer, teacher.tokenizer, "")
        pairs = aligner._align_single(
            student.tokenizer.convert_ids_to_tokens(each.student),
            teacher.tokenizer.convert_ids_to_tokens(each.teacher),
        )
        found = []
        flagged["tokens"] += len(each.student)
        for pair in pairs:
            if -1 in (pair.s_start, pair.t_start):
                continue
            segment = (pair.s_start, pair.s_end, pair.t_start, pair.t_end)
            right = _same_bytes(each, segment, student, teacher)
            flagged[f"said {'right' if pair.is_correct else 'wrong'}, is {right}"] += 1
            if right and pair.is_correct:
                flagged["tokens in right pairs"] += pair.s_end - pair.s_start
            found.append(segment)
        return found

    return segments


def rllm_zeroed(module: Any, made: list[Text], student: Side, teacher: Side) -> Row:
    """Return the share of texts for which rllm returns the student's own log-probs: advantage 0."""
    counts = Counter[str]()
    for each in made:
        own = [-7.0] * len(each.student)
        found = module.align_teacher_logprobs(
            each.student, student.tokenizer, each.teacher, teacher.tokenizer,
            [-1.0] * len(each.teacher), own, "", each.text.decode(errors="replace"),
        )  # fmt: skip
        counts[each.kind] += 1
        counts[f"zeroed {each.kind}"] += found == own
    return {kind: counts[f"zeroed {kind}"] / counts[kind] for kind in KINDS.values()}


def module_at(place: Path) -> ModuleType:
    """Import one file of a checkout, without the package around it."""
    spec = importlib.util.spec_from_file_location(place.stem, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[place.stem] = module  # where its dataclasses look
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Compare the pairs, and append a row."""
    parser = results.option_parser(__doc__ or "", "peer_spans")
    parser.add_argument("--checkout", type=Path, required=True, help="Folder of clones.")
    parser.add_argument("--tokenizers", type=Path, required=True, help="Folder of tokenizers.")
    parser.add_argument("--packages", type=Path, help="Put it on the path. [default: none]")
    parser.add_argument("--texts", type=int, default=200, help="Texts of a kind.")
    options = parser.parse_args()
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    sys.path.insert(0, str(options.checkout / "SimCT-"))
    sys.path += [str(options.packages)] if options.packages else []
    from kdflow.algorithms import span_ctkd

    nemo = module_at(options.checkout / "RL/nemo_rl/algorithms/x_token/token_aligner.py")
    rllm = module_at(options.checkout / "rllm/rllm/trainer/distill/alignment.py")
    known, pairs = sides(options.tokenizers), []
    for names in PAIRS:
        student, teacher = (known[name] for name in names)
        made, flagged = texts(options.texts, student, teacher), Counter[str]()
        pairs.append(
            {
                "student": names[0],
                "teacher": names[1],
                "SimCT": compare(made, student, teacher, simct_segments(span_ctkd)),
                "NeMo-RL": compare(made, student, teacher, nemo_segments(nemo, flagged)),
                "NeMo-RL flags": dict(flagged),
                "rllm, texts without a loss": rllm_zeroed(rllm, made, student, teacher),
                "TRL, ids by string": matched_by_string(student, teacher),
                "SimCT, ids by string": matched_by_string(
                    student, teacher, lambda token: token.replace("Ġ", "▁")
                ),
            }
        )
        print(pairs[-1], flush=True)
    row = {
        "bench": "peer_spans",
        "peers": {name: version(options.checkout / name) for name in ("RL", "SimCT-", "rllm")},
        "byte_map": byte_map(nemo),
        "pairs": pairs,
        **results.environment("transformers", "trl"),
    }
    results.append(options.out, row)


if __name__ == "__main__":
    main()
