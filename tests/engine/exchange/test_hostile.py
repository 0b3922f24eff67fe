"""Twenty wrong lines of each format and more: each is refused by its number, before any work."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.errors import PromptError
from logitcask.engine.exchange import files
from logitcask.engine.exchange.files import Files
from logitcask.engine.exchange.imported import Imported
from tests.engine.tiny import EOS, make_tokenizer

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / name).read_text().splitlines()]


NEUTRAL = {"prompt_ids": [5, 6], "response_ids": [7, 8, 9], "loss_mask": [1, 0, 1]}
TURNS = {"turns": [{"ids": [5, 6], "sampled": False}, {"ids": [7], "sampled": True}]}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
GOOD: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "neutral": ("neutral", [TURNS, NEUTRAL]),
    "turns": ("neutral", [NEUTRAL, TURNS]),
    "nemo-gym": (
        "nemo-gym",
        [golden("nemo-gym-delta.tokens.jsonl")[0], golden("nemo-gym-tools.tokens.jsonl")[0]],
    ),
    "nemo-rl": ("nemo-rl", golden("nemo-rl-train_data_step3.jsonl")),
    "export": ("prime-rl", golden("prime-rl-rank_0.jsonl")),
    "traces": ("prime-rl", golden("prime-rl-traces.jsonl")),
    "vllm": ("vllm", golden("vllm-batch.jsonl")),
    "text": ("text", [{"prompt": "a", "completion": "b"}, CHAT]),
}
"""Name -> format, and two lines that are read. The second one is made wrong."""

GONE = object()
BODY = "response.body"
CHOICE = f"{BODY}.choices.0"
NODE = "traces.0.nodes.1"
ID = "is no token id"
WRONG: dict[str, list[tuple[str, Any, str]]] = {
    "neutral": [
        ("response_ids", GONE, "exactly one"),
        ("turns", [], "exactly one"),
        ("prompt_ids", GONE, "no list of token ids"),
        ("prompt_ids", [], "no list of token ids"),
        ("prompt_ids", "ab", "no list of token ids"),
        ("prompt_ids", {"0": 5}, "no list of token ids"),
        ("response_ids", [7, -1, 9], f"-1 {ID}"),
        ("response_ids", [7, True, 9], f"True {ID}"),
        ("response_ids", [7, 8.0, 9], f"8.0 {ID}"),
        ("response_ids", [7, "8", 9], f"'8' {ID}"),
        ("response_ids", [[7, 8, 9]], ID),
        ("response_ids", [7, None, 9], f"None {ID}"),
        ("loss_mask", [1, 1], "2 values, and there are 3 tokens"),
        ("loss_mask", [1, 2, 1], "2 is none of"),
        ("loss_mask", "101", "a string, and there are 3 tokens"),
        ("logprobs", [-1.0], "1 values"),
        ("logprobs", [-1.0, "x", -1.0], "a string, not a number"),
        ("logprobs", [0.5, 0, 0], "log-prob of 0.5"),
        ("reward", "good", "not a number"),
        ("version", -1, "no count"),
        ("version", 1.0, "no count"),
        ("id", 1.5, "not a string"),
        ("answer", [1], "not a string"),
    ],
    "turns": [
        ("turns", {}, "no list of objects"),
        ("turns", [[5], [6]], "no list of objects"),
        ("turns.0.ids", GONE, "no list of token ids"),
        ("turns.1.ids", [-1], f"-1 {ID}"),
        ("turns.1.sampled", 1, "not a boolean"),
        ("turns.1.sampled", GONE, "not a boolean"),
        ("turns.1.logprobs", [-1, -1], "2 values"),
        ("turns.1.logprobs", ["x"], "not a number"),
        ("turns.0.sampled", True, "no token comes before it"),
        ("loss_mask", [1], "each turn has its own"),
        ("prompt_ids", [1], "each turn has its own"),
    ],
    "nemo-gym": [
        ("rollout_id", GONE, "no entry of a token capture"),
        ("rollout_id", 7, "not a string"),
        ("rollout_id", "", "empty"),
        ("model_call_id", GONE, "no entry of a token capture"),
        ("model_call_id", None, "not a string"),
        ("schema_version", 2, "2, not 1"),
        ("prompt_token_ids", GONE, "no list of token ids"),
        ("prompt_token_ids", [], "no list of token ids"),
        ("prompt_token_ids", [5, -1], f"-1 {ID}"),
        ("prompt_token_ids", [5, "6"], f"'6' {ID}"),
        ("prompt_token_ids", [5, 6, 7, 3], "another digest"),
        ("prompt_token_ids", [5, 1 << 64], "another digest"),
        ("generation_token_ids", GONE, "no list of token ids"),
        ("generation_token_ids", [11, 12.0, 2], f"12.0 {ID}"),
        ("generation_token_ids", [11, 12], "3 values, and there are 2 tokens"),
        ("generation_token_ids", [11, 12, 3], "another digest"),
        ("generation_log_probs", GONE, "there are 3 tokens"),
        ("generation_log_probs", [-1], "1 values"),
        ("generation_log_probs", ["a", -1, -1], "not a number"),
        ("generation_log_probs", [1.0, -1, -1], "log-prob of 1"),
        ("prompt_is_delta", True, "only the ids after an earlier call"),
        ("digest", "0", "another digest"),
    ],
    "nemo-rl": [
        ("token_ids", GONE, "texts only"),
        ("token_ids", [], "a batch of 0"),
        ("token_ids", [[5], [6]], "a batch of 2"),
        ("token_ids", [[]], "no list of token ids"),
        ("token_ids", [5], "no list of token ids"),
        ("token_ids.0.1", -1, f"-1 {ID}"),
        ("token_ids.0.1", 6.5, f"6.5 {ID}"),
        ("token_ids.0.1", None, f"None {ID}"),
        ("input_lengths", GONE, "there are 12 tokens"),
        ("input_lengths", [13], "there are 12 tokens"),
        ("input_lengths", [0], "there are 12 tokens"),
        ("input_lengths", [6.0], "there are 12 tokens"),
        ("token_loss_mask", GONE, "there are 12 tokens"),
        ("token_loss_mask", [[0, 1]], "2 values"),
        ("token_loss_mask.0.1", 0.5, "0.5 is none of"),
        ("token_loss_mask.0.0", 1, "no token comes before it"),
        ("generation_logprobs", [[0]], "1 values"),
        ("generation_logprobs.0.4", 0.5, "log-prob of 0.5"),
        ("generation_logprobs.0.4", "x", "not a number"),
        ("rewards", [1, 2], "a batch of 2"),
        ("rewards", ["x"], "not a number"),
    ],
    "export": [
        ("schema_version", 2, "1 is read here"),
        ("schema_version", GONE, "1 is read here"),
        ("schema_version", "1", "1 is read here"),
        ("token_ids", GONE, "no list of token ids"),
        ("token_ids", [], "no list of token ids"),
        ("token_ids", [5, 6], "there are 2 tokens"),
        ("token_ids.1", -1, f"-1 {ID}"),
        ("token_ids.1", True, f"True {ID}"),
        ("token_ids.1", 6.0, f"6.0 {ID}"),
        ("token_ids.1", [6], ID),
        ("loss_mask", GONE, "there are 6 tokens"),
        ("loss_mask", None, "there are 6 tokens"),
        ("loss_mask", [True], "1 values"),
        ("loss_mask.1", 2, "2 is none of"),
        ("loss_mask.1", None, "None is none of"),
        ("loss_mask.0", True, "no token comes before it"),
        ("inference_logprobs", GONE, "there are 6 tokens"),
        ("inference_logprobs", [-1], "1 values"),
        ("inference_logprobs.4", "x", "not a number"),
        ("inference_logprobs.4", True, "not a number"),
        ("inference_logprobs.4", 0.5, "log-prob of 0.5"),
    ],
    "traces": [
        ("traces", None, "not a list of objects"),
        ("traces", [1], "not a list of objects"),
        ("id", 5, "not a string"),
        ("traces.0.nodes", GONE, "not a list of objects"),
        ("traces.0.nodes", {}, "not a list of objects"),
        (f"{NODE}.parent", 1, "no node before this one"),
        (f"{NODE}.parent", 3, "no node before this one"),
        (f"{NODE}.parent", -1, "no node before this one"),
        (f"{NODE}.parent", "0", "no node before this one"),
        (f"{NODE}.parent", True, "no node before this one"),
        (f"{NODE}.token_ids", GONE, "there are 0 tokens"),
        (f"{NODE}.token_ids", "4", "no list of token ids"),
        (f"{NODE}.token_ids.1", -1, f"-1 {ID}"),
        (f"{NODE}.token_ids.1", 11.0, f"11.0 {ID}"),
        (f"{NODE}.mask", GONE, "there are 4 tokens"),
        (f"{NODE}.mask.1", 3, "3 is none of"),
        (f"{NODE}.logprobs", [-1.0], "1 values, and there are 3 tokens"),
        (f"{NODE}.logprobs", "x", "there are 3 tokens"),
        (f"{NODE}.logprobs.1", "x", "not a number"),
        (f"{NODE}.logprobs.1", 0.5, "log-prob of 0.5"),
        (f"{NODE}.semantic_parents", [1], "not a list of objects"),
        ("traces.0.rewards", [1], "no object of"),
        ("traces.0.rewards.correct.score", "x", "not a number"),
        ("traces.0.rewards.correct.weight", None, "not a number"),
        ("run.work.policy", {"start": -1, "end": -1}, "no count"),
    ],
    "vllm": [
        ("response", None, "no choices"),
        ("response", "x", "no choices"),
        (BODY, None, "no choices"),
        (f"{BODY}.choices", GONE, "no choices"),
        (f"{BODY}.choices", [], "no choices"),
        (f"{BODY}.choices", {}, "no choices"),
        (CHOICE, "x", "no token_ids"),
        (f"{CHOICE}.token_ids", GONE, "no token_ids"),
        (f"{CHOICE}.token_ids", [], "no list of token ids"),
        (f"{CHOICE}.token_ids", [7], "there are 1 tokens"),
        (f"{CHOICE}.token_ids.0", -1, f"-1 {ID}"),
        (f"{CHOICE}.token_ids.0", "7", f"'7' {ID}"),
        (f"{CHOICE}.token_ids.0", 7.0, f"7.0 {ID}"),
        (f"{BODY}.prompt_token_ids", GONE, "no token_ids"),
        (f"{BODY}.prompt_token_ids", [], "no list of token ids"),
        (f"{BODY}.prompt_token_ids.0", None, f"None {ID}"),
        (f"{CHOICE}.logprobs.content", None, "tokens"),
        (f"{CHOICE}.logprobs.content", [], "0 values"),
        (f"{CHOICE}.logprobs.content.0.logprob", "x", "not a number"),
        (f"{CHOICE}.logprobs.content.0.logprob", 0.5, "log-prob of 0.5"),
        ("custom_id", 7, "not a string"),
        ("custom_id", " ", "empty"),
    ],
    "text": [
        ("messages", GONE, "neither"),
        ("messages", [], "not a list of turns"),
        ("messages", "a", "not a list of turns"),
        ("messages.0", "a", "is a string"),
        ("messages.0.role", GONE, "role"),
        ("messages.0.role", "alien", "is none of"),
        ("messages.0.role", 5, "role"),
        ("messages.0.content", GONE, "content"),
        ("messages.0.content", 5, "content"),
        ("messages.0", {"role": "assistant", "content": "a"}, "begins it"),
        ("id", 1.5, "not a string"),
        ("answer", {}, "not a string"),
        ("", {"prompt": [{"role": "user", "content": "a"}]}, "None is not a list of turns"),
        ("", {"conversations": [{"from": "alien", "value": "a"}]}, "is none of"),
    ],
}
"""Name -> (place, value, part of the message); place "": the whole line."""

BYTES: list[tuple[bytes, str]] = [
    (b'{"id": "a", ', "not valid JSON"),
    (b"[1]", "the line is a list"),
    (b"hello", "not valid JSON"),
    (b"{}", ""),
    (b'{"id": NaN}', "NaN"),
    (b'{"id": 1e999}', "64-bit"),
    (b'{"id": ' + b"9" * 301 + b"}", "digits"),
    (b'{"id": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deeply"),
    (b'{"id": "a", "id": "b"}', "occurs twice"),
    (b'{"id": "\\ud800"}', "surrogate"),
    (b'{"id": "\xe9"}', "not UTF-8"),
    (b'{"id": "' + b"x" * 40_000 + b'"}', "longer than"),
]
"""Lines of no format, and part of the message."""


def changed(line: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    if not place:
        return value
    line = copy.deepcopy(line)
    *path, last = [int(each) if each.isdecimal() else each for each in place.split(".")]
    inner: Any = line
    for each in path:
        inner = inner[each]
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    return line


def lines(*given: Mapping[str, Any]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in given)


def read(tmp_path: Path, name: str, text: bytes) -> list[Imported]:
    (tmp_path / "a.jsonl").write_bytes(text)
    return list(Files([tmp_path / "a.jsonl"], GOOD[name][0], make_tokenizer(), [EOS])())


@pytest.mark.parametrize("name", GOOD)
def test_wrong_lines_are_refused_by_their_number(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 20_000)
    first, second = GOOD[name][1][:2]
    assert len(read(tmp_path, name, lines(first, second))) >= 2, "the lines as they were"
    cases = [(lines(changed(second, *each[:2])), each[2]) for each in WRONG[name]] + BYTES
    assert len(cases) >= 20
    for line, cause in cases:
        with pytest.raises(PromptError, match=", line 2: ") as caught:
            read(tmp_path, name, lines(first) + line + b"\n")
        assert cause in caught.value.cause, line
        assert caught.value.hint, line


def test_the_same_lines_twice_are_refused(tmp_path: Path) -> None:
    episode, _ = GOOD["traces"][1]
    with pytest.raises(PromptError, match="line 2.*comes twice"):
        read(tmp_path, "traces", lines(episode, episode))
    call, other = GOOD["nemo-gym"][1]
    with pytest.raises(PromptError, match="line 3.*calls further up"):
        read(tmp_path, "nemo-gym", lines(call, other, call))
    wrong = {key: value for key, value in call.items() if key != "digest"}
    with pytest.raises(PromptError, match="line 2.*with other ids"):
        read(tmp_path, "nemo-gym", lines(call, wrong | {"prompt_token_ids": [5]}))
