"""Formats of rollouts that other programs write: one reader for each, from lines to sequences.

To add a format, write a reader and name it in FORMATS. A program that keeps its rollouts pickled
has no reader here: README.md shows how to convert them where that program is installed.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from logitcask.engine.exchange.imported import (
    Imported,
    ids_in,
    logprobs_in,
    mask_in,
    number_in,
    own_fields,
    sequence,
)
from logitcask.engine.exchange.token_entries import read_entries
from logitcask.engine.exchange.traces import read_episode
from logitcask.engine.prompts.lines import Line, kind

Reader = Callable[[Iterator[Line]], Iterator[Imported | None]]
"""Yields the sequences of all lines; None for one in which no id counts."""

NEUTRAL = frozenset(
    {"prompt_ids", "response_ids", "turns", "loss_mask", "logprobs", "version", "reward"}
)


def neutral(line: Line) -> Imported | None:
    """Read our own form: prompt_ids and response_ids, or turns of ids."""
    keys = line.keys
    if ("turns" in keys) == ("response_ids" in keys):
        line.refuse(
            'fields "response_ids" and "turns": exactly one is needed',
            'write {"prompt_ids": [...], "response_ids": [...]}',
        )
    if "turns" in keys:
        for name in ("loss_mask", "logprobs", "prompt_ids"):
            if name in keys:
                line.refuse(f'field "{name}": each turn has its own', "write it into the turns")
        ids, mask, logprobs = _turns(line, keys["turns"])
    else:
        prompt = ids_in(line, "prompt_ids", keys.get("prompt_ids"))
        response = ids_in(line, "response_ids", keys["response_ids"])
        counts = [1] * len(response)
        if keys.get("loss_mask") is not None:
            counts = mask_in(line, "loss_mask", keys["loss_mask"], len(response))
        ids, mask = prompt + response, [0] * len(prompt) + counts
        logprobs = None
        if keys.get("logprobs") is not None:
            own = logprobs_in(line, "logprobs", keys["logprobs"], len(response))
            logprobs = [*([None] * len(prompt)), *own]
    fields = own_fields(line, NEUTRAL) | _scalars(line, keys)
    return sequence(line, ids=ids, mask=mask, logprobs=logprobs, **fields)


def _turns(line: Line, turns: Any) -> tuple[list[int], list[int], list[float | None] | None]:
    """Return ids, mask and log-probs of turns {"ids", "sampled", "logprobs"?}."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        line.refuse(
            'field "turns": no list of objects', 'write [{"ids": [...], "sampled": false}, ...]'
        )
    ids, mask, logprobs = list[int](), list[int](), list[float | None]()
    known = True
    for place, turn in enumerate(turns):
        at = f"turns[{place}]"
        own = ids_in(line, f"{at}.ids", turn.get("ids"))
        if type(sampled := turn.get("sampled")) is not bool:
            line.refuse(
                f'field "{at}.sampled": {sampled!r:.80} is {kind(sampled)}, not a boolean',
                "write true for turns of the student, false for all others",
            )
        ids += own
        mask += [int(sampled)] * len(own)
        if sampled and turn.get("logprobs") is not None:
            logprobs += logprobs_in(line, f"{at}.logprobs", turn["logprobs"], len(own))
        else:
            known = known and not sampled
            logprobs += [None] * len(own)
    return ids, mask, logprobs if known else None


def _scalars(line: Line, keys: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (version := keys.get("version")) is not None:
        if type(version) is not int or not 0 <= version < 1 << 63:
            line.refuse(f'field "version": {version!r:.80} is no count', "write an integer")
        found["version"] = version
    if (reward := keys.get("reward")) is not None:
        found["reward"] = number_in(line, "reward", reward)
    return found


def nemo_rl(line: Line) -> Imported | None:
    """Read NeMo-RL's train_data_step*.jsonl of GRPO (log_batched_dict_as_jsonl).

    Each line is a batch of one sample, padded to the longest of its step.
    """
    keys = line.keys
    if "token_ids" not in keys:
        line.refuse(
            'field "token_ids" is missing: this NeMo-RL has logged texts only',
            "log with a version that writes token_ids and token_loss_mask (GRPO)",
        )
    one = {name: _only(line, name, value) for name, value in keys.items() if name != "idx"}
    length = one.get("input_lengths")
    ids = ids_in(line, "token_ids", one["token_ids"])
    if type(length) is not int or not 0 < length <= len(ids):
        line.refuse(
            f'field "input_lengths": {length!r:.80}, and there are {len(ids)} tokens',
            "give the file as NeMo-RL wrote it",
        )
    mask = mask_in(line, "token_loss_mask", one.get("token_loss_mask"), len(ids))[:length]
    if one.get("sample_loss_mask") == 0:
        mask = [0] * length
    logprobs = one.get("generation_logprobs")
    if logprobs is not None:
        logprobs = logprobs_in(line, "generation_logprobs", logprobs, len(ids))[:length]
    fields: dict[str, Any] = {}
    if (reward := one.get("rewards")) is not None:
        fields["reward"] = number_in(line, "rewards", reward)
    return sequence(line, ids=ids[:length], mask=mask, logprobs=logprobs, **fields)


def _only(line: Line, field: str, value: Any) -> Any:
    """Return the value of a batch of one."""
    if isinstance(value, list):
        if len(value) != 1:
            line.refuse(
                f'field "{field}": a batch of {len(value)}, not of one sample',
                "give the file as NeMo-RL wrote it",
            )
        return value[0]
    return value


def prime_rl(lines: Iterator[Line]) -> Iterator[Imported | None]:
    """Read prime-rl's rollouts/**/traces.jsonl and token_exports/**/rank_*.jsonl."""
    seen = set[str]()
    for line in lines:
        if "traces" in line.keys:
            yield from read_episode(line, seen)
        else:
            yield _token_export(line)


def _token_export(line: Line) -> Imported | None:
    keys = line.keys
    if keys.get("schema_version") != 1:
        line.refuse(
            f'field "schema_version": {keys.get("schema_version")!r:.80}, and 1 is read here',
            "export with a prime-rl of this version, or write the neutral form",
        )
    ids = ids_in(line, "token_ids", keys.get("token_ids"))
    mask = mask_in(line, "loss_mask", keys.get("loss_mask"), len(ids))
    logprobs = logprobs_in(line, "inference_logprobs", keys.get("inference_logprobs"), len(ids))
    return sequence(line, ids=ids, mask=mask, logprobs=logprobs)


def vllm_batch(lines: Iterator[Line]) -> Iterator[Imported | None]:
    """Read the output of `vllm run-batch` with return_token_ids."""
    for line in lines:
        body = line.keys.get("response")
        body = body.get("body") if isinstance(body, dict) else None
        choices = body.get("choices") if isinstance(body, dict) else None
        if not isinstance(body, dict) or not isinstance(choices, list) or not choices:
            line.refuse(
                f"the request has no choices; its error is {line.keys.get('error')!r:.200}",
                "remove the lines of failed requests, or send them again",
            )
        for choice in choices:
            yield _choice(line, body, choice if isinstance(choice, dict) else {})


def _choice(line: Line, body: Mapping[str, Any], choice: Mapping[str, Any]) -> Imported | None:
    """Return one response; a chat has the prompt's ids in the body, a completion in the choice."""
    prompt = choice.get("prompt_token_ids") or body.get("prompt_token_ids")
    if choice.get("token_ids") is None or prompt is None:
        line.refuse(
            "it has no token_ids: texts cannot be tokenized back to what was sampled",
            'request {"return_token_ids": true}',
        )
    prompt = ids_in(line, "prompt_token_ids", prompt)
    response = ids_in(line, "token_ids", choice["token_ids"])
    logprobs = None
    if isinstance(found := choice.get("logprobs"), dict):
        values = found.get("token_logprobs")
        if values is None and isinstance(found.get("content"), list):
            values = [e.get("logprob") if isinstance(e, dict) else None for e in found["content"]]
        own = logprobs_in(line, "logprobs", values, len(response))
        logprobs = [*([None] * len(prompt)), *own]
    mask = [0] * len(prompt) + [1] * len(response)
    name = line.keys.get("custom_id")
    fields = {"id": line.string("custom_id", name)} if name is not None else {}
    return sequence(line, ids=prompt + response, mask=mask, logprobs=logprobs, **fields)


def one_each(read: Callable[[Line], Imported | None]) -> Reader:
    """Return the reader of files with one sequence on each line."""
    return lambda lines: map(read, lines)


FORMATS: dict[str, Reader] = {
    "neutral": one_each(neutral),
    "nemo-gym": read_entries,
    "nemo-rl": one_each(nemo_rl),
    "prime-rl": prime_rl,
    "vllm": vllm_batch,
}
"""Name -> reader of files of ids. Texts are read by chat.py."""
