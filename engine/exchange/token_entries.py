"""Calls of NeMo Gym's token capture -> sequences: the calls of a conversation become one.

NeMo Gym writes one `TokenEntry` per line (nemo_gym/token_id_capture/records.py): the ids of the
prompt and of the generation of one call. Where the prompt of a call begins with all ids of an
earlier call of the same rollout, both are one sequence: the model saw the same ids before each
token. Where it does not, because a text was tokenized again or a history was cut, the call is a
sequence of its own, and nothing of its prompt counts.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from logitcask.engine.exchange.imported import Imported, ids_in, logprobs_in, sequence
from logitcask.engine.prompts.lines import Line

AS_WRITTEN = "give the file as NeMo Gym wrote it: ROLLOUT.tokens.jsonl"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class _Call:
    line: Line
    prompt: list[int]
    generation: list[int]
    logprobs: list[float | None]


@dataclass(slots=True)
class _Chain:
    """A sequence to which the next call may be added."""

    line: Line
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)

    def add(self, call: _Call) -> None:
        """Add what the prompt has more than the chain, which does not count, and the generation."""
        more = call.prompt[len(self.ids) :]
        self.ids += more + call.generation
        self.mask += [0] * len(more) + [1] * len(call.generation)
        self.logprobs += [None] * len(more) + call.logprobs


def read_entries(lines: Iterator[Line]) -> Iterator[Imported | None]:
    """Yield the sequences of each rollout, whose calls follow one another; raises PromptError.

    Yields None for a call that generated nothing.
    """
    seen = set[str]()
    for rollout, found in groupby(lines, key=lambda line: _name(line, "rollout_id")):
        group = list(found)
        if rollout in seen:
            group[0].refuse(
                f"the rollout {rollout!r:.80} has calls further up, and others between",
                "sort the lines by rollout_id",
            )
        seen.add(rollout)
        yield from _sequences(group)


def _sequences(lines: Sequence[Line]) -> Iterator[Imported | None]:
    calls = _calls(lines)
    chains = list[_Chain]()
    # A call has a longer prompt than those that it continues; the file may have another order.
    for call in sorted(calls, key=lambda each: len(each.prompt)):
        if not call.generation:
            yield None
            continue
        before = (c for c in chains if call.prompt[: len(c.ids)] == c.ids)
        chain = max(before, key=lambda c: len(c.ids), default=None)
        if chain is None:
            chains.append(chain := _Chain(call.line))
        chain.add(call)
    for each in chains:
        yield sequence(each.line, ids=each.ids, mask=each.mask, logprobs=each.logprobs)


def _calls(lines: Sequence[Line]) -> list[_Call]:
    """Return the calls of a rollout with whole prompts; one that was written twice comes once."""
    found = dict[str, _Call]()
    for line in lines:
        keys, name = line.keys, _name(line, "model_call_id")
        if keys.get("schema_version", SCHEMA) != SCHEMA:
            line.refuse(
                f'field "schema_version": {keys["schema_version"]!r:.80}, not {SCHEMA}',
                "write the neutral form",
            )
        prompt = ids_in(line, "prompt_token_ids", keys.get("prompt_token_ids"))
        drawn = keys.get("generation_token_ids")
        generation = [] if drawn == [] else ids_in(line, "generation_token_ids", drawn)
        logprobs = logprobs_in(
            line, "generation_log_probs", keys.get("generation_log_probs"), len(generation)
        )
        if keys.get("prompt_is_delta"):
            parent = found.get(str(keys.get("parent_call_id")))
            if parent is None:
                line.refuse(
                    "its prompt has only the ids after an earlier call, which does not come before",
                    "give all calls of the rollout",
                )
            prompt = parent.prompt + parent.generation + prompt
        if keys.get("digest") is not None and keys["digest"] != _digest(prompt + generation):
            line.refuse("its ids have another digest than the line says", AS_WRITTEN)
        call = _Call(line, prompt, generation, logprobs)
        twin = found.setdefault(name, call)
        if (twin.prompt, twin.generation) != (prompt, generation):
            line.refuse(f"the call {name!r:.80} comes twice, with other ids", AS_WRITTEN)
    return list(found.values())


def _digest(ids: Sequence[int]) -> str:
    """Return the digest of ids, as `compute_digest` of records.py, version 1."""
    try:
        packed = struct.pack(f">BQ{len(ids)}Q", 1, len(ids), *ids)
    except struct.error:  # an id of more than 64 bits, which the student will refuse
        return ""
    return hashlib.sha256(b"nemo-gym-tokens" + packed).hexdigest()


def _name(line: Line, field: str) -> str:
    if field not in line.keys:
        line.refuse(f'field "{field}" is missing: it is no entry of a token capture', AS_WRITTEN)
    return line.string(field, line.keys[field])
