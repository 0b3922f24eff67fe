"""Rollouts <-> the arrays of a rollout segment: each prompt once, sequences and positions flat."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.ragged as ragged
import logitcask.engine.store.format.schema as schema
from logitcask.engine.config.parse.strict_json import count_values
from logitcask.engine.errors import StoreError
from logitcask.engine.models.identity import canonical
from logitcask.engine.types import Array, Draws, Prompt, Rollouts, Scores

_FIELDS = {
    "prompt_index": "seq_prompt",
    "response_offsets": "seq_off",
    "response_tokens": "tokens",
    "loss_mask": "loss_mask",
    "behavior_logprobs": "b_lp",
    "finish_reason": "finish",
    "policy_version_start": "version_start",
    "policy_version_end": "version_end",
}
"""Array -> field of Rollouts."""
_DRAWS = {"mc_counts": "cnt", "mc_ids": "ids", "mc_multiplicities": "mult", "mc_logprobs": "lp"}
"""Array -> field of Draws."""


def encode(rollouts: Rollouts, profile: codecs.Profile) -> dict[str, Array]:
    """Return the arrays of a segment of checked rollouts.

    Raises StoreError where the prompts are not JSON, or too large.
    """
    prompts = rollouts.prompts
    fields = [{"id": p.id, "answer": p.answer, "extra": dict(p.extra)} for p in prompts]
    try:
        text = canonical(fields)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(
            f"the extra keys of a prompt are not JSON ({error})",
            hint="use strings, finite numbers, lists and objects in the prompts file",
        ) from error
    if count_values(text) > schema.MAX_JSON_VALUES:
        raise StoreError(
            f"the prompts of a unit have {count_values(text)} JSON values, at most "
            f"{schema.MAX_JSON_VALUES}",
            hint="lower --unit-prompts, or remove extra keys from the prompts file",
        )
    ids = [np.asarray(p.token_ids, np.uint32) for p in prompts]
    lengths = np.asarray([len(x) for x in ids], np.int64)
    arrays = {
        "prompt_offsets": ragged.starts(lengths),
        "prompt_tokens": np.concatenate([np.zeros(0, np.uint32), *ids]),
        "prompt_json": np.frombuffer(text, np.uint8),
        **{name: getattr(rollouts, field) for name, field in _FIELDS.items()},
    }
    if (reward := rollouts.reward) is not None:
        arrays["reward"] = reward
    if (student := rollouts.student) is not None:
        arrays |= {
            "student_logprobs": student.lp,
            "student_entropy": student.entropy,
            "student_tail": student.log_tail,
            "student_topk_counts": student.cnt,
            "student_topk_ids": student.ids,
            "student_topk_logprobs": codecs.to_entry(student.entry_lp, profile),
        }
        if (draws := rollouts.draws) is not None:
            arrays |= {name: getattr(draws, field) for name, field in _DRAWS.items()}
    dtypes = {name: spec.dtype for name, spec in schema.specs(layout_of(rollouts)).items()}
    dtypes["student_topk_logprobs"] = profile.stored
    return {name: array.astype(dtypes[name]) for name, array in arrays.items()}


def layout_of(rollouts: Rollouts) -> str:
    """Return the layout of a segment of these rollouts."""
    if rollouts.student is None:
        layout = schema.PLAIN
    else:
        layout = schema.STUDENT if rollouts.draws is None else schema.MC
    return layout + ("" if rollouts.reward is None else schema.REWARD)


EXTENT = ("prompt_json", "prompt_offsets", "prompt_index", "response_offsets")


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """The lengths of a rollout segment."""

    prompt_ids: tuple[str, ...]
    """[M]"""
    prompt_extra: tuple[Mapping[str, Any], ...]
    """[M] other keys of the prompts file."""
    prompt: Array
    """[M] tokens of each prompt."""
    seq_prompt: Array
    """[N] index into both."""
    response: Array
    """[N] response tokens."""


def extent(arrays: dict[str, Array], counts: Mapping[str, int]) -> Extent:
    """Return the lengths, from the arrays EXTENT and the counts of the record.

    Raises ValueError where they contradict each other.
    """
    fields = _prompt_fields(arrays, counts["T"])
    _check_sequences(arrays, len(fields), counts["P"])
    return Extent(
        prompt_ids=tuple(str(each["id"]) for each in fields),
        prompt_extra=tuple(each["extra"] for each in fields),
        prompt=np.diff(arrays["prompt_offsets"]),
        seq_prompt=arrays["prompt_index"].astype(np.int64),
        response=np.diff(arrays["response_offsets"]),
    )


def _prompt_fields(arrays: dict[str, Array], prompt_tokens: int) -> list[dict[str, Any]]:
    """Return the entries of prompt_json, one per prompt, and check the offsets of their tokens."""
    text = arrays["prompt_json"].tobytes()
    if (values := count_values(text)) > schema.MAX_JSON_VALUES:
        raise ValueError(f"prompt_json of {values} values, at most {schema.MAX_JSON_VALUES}")
    try:
        fields = json.loads(text)
    except RecursionError as error:
        raise ValueError("prompt_json is nested too deeply") from error
    off = arrays["prompt_offsets"]
    if not isinstance(fields, list) or len(fields) != len(off) - 1:
        raise ValueError(f"prompt_json does not describe {len(off) - 1} prompts")
    ragged.check_offsets(off, prompt_tokens)
    return fields


def _check_sequences(arrays: dict[str, Array], prompts: int, positions: int) -> None:
    ragged.check_offsets(arrays["response_offsets"], positions)
    if int(arrays["prompt_index"].max(initial=0)) >= max(prompts, 1):
        raise ValueError(f"a sequence of prompt {arrays['prompt_index'].max()}, of {prompts}")


PROMPTS = ("prompt_json", "prompt_offsets", "prompt_tokens")


def prompts_of(arrays: dict[str, Array]) -> tuple[Prompt, ...]:
    """Return the prompts of a rollout segment, from the arrays PROMPTS.

    Raises ValueError where they contradict each other.
    """
    fields, off = _prompt_fields(arrays, len(arrays["prompt_tokens"])), arrays["prompt_offsets"]
    return tuple(
        Prompt(
            id=each["id"],
            token_ids=tuple(arrays["prompt_tokens"][off[i] : off[i + 1]].tolist()),
            answer=each["answer"],
            extra=each["extra"],
        )
        for i, each in enumerate(fields)
    )


def decode(arrays: dict[str, Array], profile: codecs.Profile, segment: str = "") -> Rollouts:
    """Invert `encode`, with entry log-probs in float32; `segment` is the seg_id.

    Raises ValueError where the arrays contradict each other.
    """
    prompts = prompts_of(arrays)
    _check_sequences(arrays, len(prompts), len(arrays["response_tokens"]))
    student = None
    if "student_logprobs" in arrays:
        ids, counts = arrays["student_topk_ids"], arrays["student_topk_counts"]
        ragged.check_counts(counts, len(ids), schema.MAX_K)
        student = Scores(
            lp=arrays["student_logprobs"],
            entropy=arrays["student_entropy"],
            log_tail=arrays["student_tail"],
            cnt=counts,
            ids=ids,
            entry_lp=codecs.from_entry(arrays["student_topk_logprobs"], profile),
        )
    draws = None
    if "mc_counts" in arrays:
        ragged.check_counts(arrays["mc_counts"], len(arrays["mc_ids"]), schema.MAX_K)
        draws = Draws(**{field: arrays[name] for name, field in _DRAWS.items()})
    return Rollouts(
        prompts=prompts,
        **{field: arrays[name] for name, field in _FIELDS.items()},
        student=student,
        draws=draws,
        reward=arrays.get("reward"),
        segment=segment,
    )
