"""Rollouts <-> the arrays of a rollout segment: prompts once, sequences and positions flat."""

import json
from dataclasses import dataclass

import numpy as np

import logitcask.engine.store.codecs as codecs
import logitcask.engine.store.layout as layout
import logitcask.engine.store.ragged as ragged
from logitcask.engine.errors import StoreError
from logitcask.engine.identity import canonical
from logitcask.engine.types import Array, Prompt, Rollouts, Scores

_FAULT = "this is a fault of the sampler: correct it and roll the unit out again"


def check(rollouts: Rollouts) -> None:
    """Refuses rollouts whose arrays do not fit together. Raises StoreError."""
    sequences, positions = len(rollouts.seq_prompt), len(rollouts.tokens)
    lengths = {
        "seq_prompt": sequences,
        "seq_off": sequences + 1,
        "tokens": positions,
        "loss_mask": positions,
        "b_lp": positions,
        "finish": sequences,
        "version_start": sequences,
        "version_end": sequences,
    }
    for name, length in lengths.items():
        shape = getattr(rollouts, name).shape
        if shape != (length,):
            raise StoreError(f"rollouts.{name} has shape {shape}, not ({length},)", remedy=_FAULT)
    off = rollouts.seq_off
    if off[0] != 0 or off[-1] != positions or (np.diff(off) < 0).any():
        raise StoreError(
            f"rollouts.seq_off does not divide {positions} positions into sequences", remedy=_FAULT
        )
    if sequences and int(rollouts.seq_prompt.max()) >= len(rollouts.prompts):
        highest, prompts = int(rollouts.seq_prompt.max()), len(rollouts.prompts)
        raise StoreError(f"a sequence belongs to prompt {highest} of {prompts}", remedy=_FAULT)
    layout.check_ids(rollouts.tokens, "rollouts.tokens", _FAULT)
    if np.isnan(rollouts.b_lp).any():
        raise StoreError("rollouts.b_lp holds NaN", remedy=_FAULT)
    if rollouts.student is not None:
        if rollouts.student.at_lp is not None or rollouts.student.mult is not None:
            raise StoreError(
                "the student's own scores are of given or of drawn ids: a rollout segment has no "
                "place for those",
                remedy="score the student with at_student = False and its best ids",
            )
        layout.check(rollouts.student, positions, None)


def encode(rollouts: Rollouts, profile: codecs.Profile) -> dict[str, Array]:
    """Arrays of a rollout segment; `check` has passed. Raises StoreError: prompts beyond JSON."""
    prompts = rollouts.prompts
    told = [{"id": p.id, "answer": p.answer, "extra": dict(p.extra)} for p in prompts]
    try:
        text = canonical(told)
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"the extra keys of a prompt are not JSON ({error})",
            remedy="use strings, finite numbers, lists and objects in the prompts file",
        ) from error
    ids = [np.asarray(p.token_ids, np.uint32) for p in prompts]
    lengths = np.asarray([len(x) for x in ids], np.int64)
    arrays = {
        "prompt_off": ragged.starts(lengths),
        "prompt_tokens": np.concatenate([np.zeros(0, np.uint32), *ids]),
        "prompt_json": np.frombuffer(text, np.uint8),
        "seq_prompt": rollouts.seq_prompt.astype(np.uint32),
        "seq_off": rollouts.seq_off.astype(np.int64),
        "tokens": rollouts.tokens.astype(np.uint32),
        "loss_mask": rollouts.loss_mask.astype(np.uint16),
        "b_lp": rollouts.b_lp.astype(np.float32),
        "finish": rollouts.finish.astype(np.uint16),
        "version_start": rollouts.version_start.astype(np.int64),
        "version_end": rollouts.version_end.astype(np.int64),
    }
    student = rollouts.student
    if student is None:
        return arrays
    return arrays | {
        "s_lp": student.lp.astype(np.float32),
        "s_ent": student.entropy.astype(np.float32),
        "s_tail": student.log_tail.astype(np.float32),
        "s_cnt": student.cnt.astype(np.uint16),
        "s_ids": student.ids.astype(np.uint32),
        "s_topk_lp": codecs.to_entry(student.entry_lp, profile),
    }


EXTENT = ("prompt_json", "prompt_off", "seq_prompt", "seq_off")


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """How long everything in a rollout segment is, without what it holds."""

    prompt_ids: tuple[str, ...]
    """[M]"""
    prompt: Array
    """[M] tokens of each prompt."""
    seq_prompt: Array
    """[N] index into both."""
    response: Array
    """[N] response tokens."""


def extent(arrays: dict[str, Array]) -> Extent:
    """From the arrays EXTENT. Raises ValueError where they contradict each other."""
    told = json.loads(arrays["prompt_json"].tobytes())
    prompt, response = np.diff(arrays["prompt_off"]), np.diff(arrays["seq_off"])
    seq_prompt = arrays["seq_prompt"].astype(np.int64)
    if len(told) != len(prompt) or (len(seq_prompt) and seq_prompt.max() >= len(told)):
        raise ValueError("prompts and sequences do not fit together")
    if (prompt < 0).any() or (response < 0).any():
        raise ValueError("offsets that descend")
    return Extent(
        prompt_ids=tuple(each["id"] for each in told),
        prompt=prompt,
        seq_prompt=seq_prompt,
        response=response,
    )


def decode(arrays: dict[str, Array], profile: codecs.Profile) -> Rollouts:
    """The inverse of `encode`, entry log-probs widened to float32.

    Raises ValueError where the arrays contradict each other (the caller names the segment).
    """
    told = json.loads(arrays["prompt_json"].tobytes())
    off = arrays["prompt_off"]
    if len(told) != len(off) - 1:
        raise ValueError(f"{len(told)} prompts are described, {len(off) - 1} have tokens")
    prompts = tuple(
        Prompt(
            id=each["id"],
            token_ids=tuple(arrays["prompt_tokens"][off[i] : off[i + 1]].tolist()),
            answer=each["answer"],
            extra=each["extra"],
        )
        for i, each in enumerate(told)
    )
    student = None
    if "s_lp" in arrays:
        if int(arrays["s_cnt"].sum(dtype=np.int64)) != len(arrays["s_ids"]):
            raise ValueError("s_cnt does not add up to the number of entries")
        student = Scores(
            lp=arrays["s_lp"],
            entropy=arrays["s_ent"],
            log_tail=arrays["s_tail"],
            cnt=arrays["s_cnt"],
            ids=arrays["s_ids"],
            entry_lp=codecs.from_entry(arrays["s_topk_lp"], profile),
        )
    rollouts = Rollouts(
        prompts=prompts,
        seq_prompt=arrays["seq_prompt"],
        seq_off=arrays["seq_off"],
        tokens=arrays["tokens"],
        loss_mask=arrays["loss_mask"],
        b_lp=arrays["b_lp"],
        finish=arrays["finish"],
        version_start=arrays["version_start"],
        version_end=arrays["version_end"],
        student=student,
    )
    try:
        check(rollouts)
    except StoreError as error:
        raise ValueError(error.cause) from error
    return rollouts
