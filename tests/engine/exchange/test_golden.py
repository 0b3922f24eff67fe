"""Files that the producers' own code wrote: golden/README.md has their versions and commands."""

from pathlib import Path

import pytest

from logitcask.engine.exchange.files import Files, files_in
from logitcask.engine.exchange.imported import Imported
from tests.engine.exchange.test_hostile import GOLDEN
from tests.engine.tiny import EOS, make_tokenizer

CALL, CHECK, ANSWER = [11, 12, 2], [13, 2], [14, 15, 2]
CALL_LP, CHECK_LP, ANSWER_LP = [-0.1235, -1.5, -0.25], [-0.75, -0.5], [-2.0, -0.125, -0.0625]
TOOL, TOOL2 = [8, 9, 4], [10, 4]
"""Output of a tool and the beginning of the next turn."""


def read(format: str, *names: str) -> tuple[list[Imported], int]:
    files = Files([GOLDEN / name for name in names], format, make_tokenizer(), [EOS])
    return list(files()), files.left_out


def check(found: Imported, prompt: list[int], *parts: tuple[list[int], list[float] | None]) -> None:
    """Compare a sequence with (ids, log-probs) of its turns; None: the turn does not count."""
    ids = [each for turn, _ in parts for each in turn]
    mask = [int(lps is not None) for turn, lps in parts for _ in turn]
    logprobs = [lp for turn, lps in parts for lp in lps or [float("nan")] * len(turn)]
    assert (list(found.prompt), list(found.response), list(found.mask)) == (prompt, ids, mask)
    # Records of verifiers are rounded to four places.
    assert found.logprobs == pytest.approx(logprobs, abs=5e-5, nan_ok=True)


def test_the_paths_of_traces_of_prime_rl() -> None:
    found, left_out = read("prime-rl", "prime-rl-traces.jsonl")
    assert left_out == 2, "a trace that failed, and one of an agent that is not trained"
    turns = [(CALL, CALL_LP), (TOOL, None), (CHECK, CHECK_LP), (TOOL2, None), (ANSWER, ANSWER_LP)]
    first, whole, again = found
    check(first, [5, 6, 7, 4], *turns)
    check(whole, [5, 6, 8, 4], *turns)
    # The path of another history: the call that both have counts once.
    check(again, [5, 6, 8, 4, *CALL, 9, 8, 4], ([16, 2], [-1.0, -3.0]))
    assert [each.reward for each in found] == [0.5, 0.0, 0.0]
    assert [each.version for each in found] == [2, 2, 2]


def test_the_token_exports_of_prime_rl() -> None:
    found, _ = read("prime-rl", "prime-rl-rank_0.jsonl")
    check(found[0], [5, 6, 7, 4], (CALL, CALL_LP), (TOOL, None), (CHECK, CHECK_LP))
    check(found[1], [5, 6, 8, 4], ([14, 2], [-2.0, -0.125]))


def test_the_batches_of_nemo_rl() -> None:
    found, _ = read("nemo-rl", "nemo-rl-train_data_step3.jsonl")
    check(found[0], [5, 6, 7, 4], (CALL, CALL_LP), (TOOL, None), (CHECK, CHECK_LP))
    check(found[1], [5, 6, 8, 4], ([14, 2], [-2.0, -0.125]))
    assert [each.reward for each in found] == [1.0, 0.0]


def test_the_calls_of_nemo_gym() -> None:
    found, _ = read("nemo-gym", "nemo-gym-delta.tokens.jsonl", "nemo-gym-tools.tokens.jsonl")
    delta, whole, rewritten = found
    check(delta, [5, 6, 8, 4], (CALL, CALL_LP), (TOOL, None), (CHECK, CHECK_LP))
    turns = [(CALL, CALL_LP), (TOOL, None), (CHECK, CHECK_LP), (TOOL2, None), (ANSWER, ANSWER_LP)]
    check(whole, [5, 6, 7, 4], *turns)
    check(rewritten, [5, 6, 7, 4, 11, 17, 2, 9, 4], ([16, 2], [-1.0, -3.0]))


def test_the_batches_of_vllm() -> None:
    (one, two, other), _ = read("vllm", "vllm-batch.jsonl")
    check(one, [5, 6, 7, 4], (CALL, CALL_LP))
    check(two, [5, 6, 7, 4], ([14, 2], [-2.0, -0.125]))
    check(other, [5, 6, 8, 4], (CHECK, CHECK_LP))
    assert [each.id for each in (one, two, other)] == ["p1", "p1", "p2"]


def test_a_folder_of_both_is_read_by_content(tmp_path: Path) -> None:
    for name in ("prime-rl-traces.jsonl", "prime-rl-rank_0.jsonl"):
        (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    files = Files([tmp_path], "prime-rl", make_tokenizer(), [EOS])
    assert len(files_in(tmp_path)) == 2
    assert len(list(files())) == 5
