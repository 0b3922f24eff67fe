"""Checks of rollouts and scores, before a commit and of segments from other stores."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import logitcask.engine.store.format.ragged as ragged
import logitcask.engine.store.format.schema as schema
from logitcask.engine.errors import StoreError
from logitcask.engine.store.format.layouts import RESCORE, ranked
from logitcask.engine.store.format.provenance import IMPORTED
from logitcask.engine.types import Array, CachedScores, Draws, IdLists, Prompt, Rollouts, Scores

RESAMPLE = "this is a bug of the sampler: correct it and sample the unit again"
_ROUNDING = 1e-2
"""Nats by which a log-prob may be above 0, or an entropy below."""


def check_rollouts(rollouts: Rollouts, provenance: Mapping[str, Any]) -> None:
    """Check shapes, ranges and values, and that drawn ids are of the student's vocabulary.

    Of imported rollouts the log-probs of the draws may be NaN at positions that do not count, and
    everywhere if the provenance calls them unknown. Raises StoreError.
    """
    sequences, positions = len(rollouts.seq_prompt), len(rollouts.tokens)
    per_sequence = ("seq_prompt", "finish", "version_start", "version_end")
    lengths = {
        **dict.fromkeys(per_sequence, sequences),
        **dict.fromkeys(("tokens", "loss_mask", "b_lp"), positions),
        "seq_off": sequences + 1,
    }
    for name, length in lengths.items():
        _check_shape(getattr(rollouts, name), length, f"rollouts.{name}", RESAMPLE)
    try:
        ragged.check_offsets(rollouts.seq_off, positions)
    except ValueError as error:
        raise StoreError(f"rollouts.seq_off: {error}", hint=RESAMPLE) from error
    for name, most in (
        ("seq_prompt", len(rollouts.prompts) - 1),
        ("loss_mask", 1),
        ("finish", 0xFFFF),
        ("version_start", 2**63 - 1),
        ("version_end", 2**63 - 1),
    ):
        check_range(getattr(rollouts, name), 0, most, f"rollouts.{name}", RESAMPLE)
    check_ids(rollouts.tokens, "rollouts.tokens", RESAMPLE)
    for prompt in rollouts.prompts:
        _check_prompt(prompt)
    if fault := log_prob_fault(_known_draws(rollouts, provenance)):
        raise StoreError(f"rollouts.b_lp holds {fault}", hint=RESAMPLE)
    if (reward := rollouts.reward) is not None:
        _check_shape(reward, sequences, "rollouts.reward", RESAMPLE)
        # NaN is in no interval.
        wrong = reward[~((reward >= 0) & (reward <= 1))]
        if len(wrong):
            raise StoreError(
                f"rollouts.reward holds {wrong[0]}, but a reward is a number in [0, 1]",
                hint="this is a bug of the grader: correct it and sample the unit again",
            )
    if rollouts.student is not None:
        if rollouts.student.at_lp is not None or rollouts.student.mult is not None:
            raise StoreError(
                "the student's own scores hold extra or drawn ids, but a rollout segment stores "
                "its top-k only",
                hint="score the student with at_student = False and selection top-k",
            )
        check_scores(rollouts.student, positions, None)
    if rollouts.draws is not None:
        if rollouts.student is None:
            raise StoreError(
                "rollouts hold ids that the student drew, but not the student's own scores",
                hint="score the student too, as `logitcask rollout` does",
            )
        _check_draws(rollouts.draws, positions, vocabulary(provenance))


def _known_draws(rollouts: Rollouts, provenance: Mapping[str, Any]) -> Array:
    """Return the log-probs of the draws that must be numbers, of any shape."""
    imported = dict(provenance).get(IMPORTED)
    if not isinstance(imported, Mapping):
        return rollouts.b_lp
    known: Array = rollouts.b_lp[(rollouts.loss_mask != 0) & (imported.get("behavior") is True)]
    return known


def _check_draws(draws: Draws, positions: int, n_vocab: int) -> None:
    lists = IdLists(cnt=draws.cnt, ids=draws.ids)
    check_lists(lists, positions, schema.MAX_K, "rollouts.draws.ids", RESAMPLE)
    for name in ("mult", "lp"):
        _check_shape(getattr(draws, name), len(draws.ids), f"rollouts.draws.{name}", RESAMPLE)
    check_range(draws.mult, 1, schema.MAX_K, "rollouts.draws.mult", RESAMPLE)
    check_range(draws.ids, 0, n_vocab - 1, "rollouts.draws.ids", RESAMPLE)
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(draws.mult, dtype=np.int64)])
    drawn = np.diff(total[ragged.starts(draws.cnt)])
    if positions and (drawn != drawn[0]).any():
        raise StoreError(
            f"rollouts.draws.mult adds up to {drawn.min()} on one row and to {drawn.max()} on "
            "another, but all rows have equally many draws",
            hint=RESAMPLE,
        )
    if fault := log_prob_fault(draws.lp):
        raise StoreError(f"rollouts.draws.lp holds {fault}", hint=RESAMPLE)


def vocabulary(provenance: Mapping[str, Any]) -> int:
    """Return the student's vocabulary size from the provenance of a rollout segment, else 2^32."""
    student = dict(provenance).get("student")
    found = student.get("n_vocab") if isinstance(student, Mapping) else None
    return found if type(found) is int else 2**32


def _check_prompt(prompt: Prompt) -> None:
    ids = prompt.token_ids
    if not all(type(each) is int and 0 <= each < 2**32 for each in ids):
        raise StoreError(f"prompt {prompt.id!r} holds other values than token ids", hint=RESAMPLE)
    texts = (prompt.id, "" if prompt.answer is None else prompt.answer)
    if not all(isinstance(each, str) for each in texts) or not isinstance(prompt.extra, Mapping):
        raise StoreError(
            f"prompt {prompt.id!r}: the id or the answer is not a string, or the extra keys are "
            "not an object",
            hint="correct the prompts file",
        )


def check_scores(scores: Scores, positions: int, at: IdLists | None) -> None:
    """Check shapes and values of scores of `positions` rows, at `at` too. Raises StoreError."""
    entries = int(scores.cnt.sum(dtype=np.int64)) if scores.cnt.ndim == 1 else -1
    lengths = {
        **dict.fromkeys(("lp", "entropy", "log_tail", "cnt"), positions),
        **dict.fromkeys(("ids", "entry_lp"), entries),
    }
    if scores.at_lp is not None:
        if at is None:
            raise StoreError(
                "scores at the student's ids, but the rollouts hold no list of the student",
                hint="score with at_student = False, or sample with a student's top-k",
            )
        lengths["at_lp"] = len(at.ids)
    if scores.mult is not None:
        lengths["mult"] = entries
    if scores.entropy_hi is not None:
        lengths["entropy_hi"] = positions
    for name, length in lengths.items():
        array = getattr(scores, name)
        _check_shape(array, length, f"scores.{name}", RESCORE)
        if name in _FAULTS and (fault := _FAULTS[name](array)):
            raise StoreError(f"scores.{name} holds {fault}", hint=RESCORE)
    if fault := _bounds_fault(scores.entropy, scores.entropy_hi):
        raise StoreError(f"scores.entropy_hi: {fault}", hint=RESCORE)
    if scores.entropy_hi is not None and scores.mult is not None:
        raise StoreError(
            "drawn ids with bounds of the entropy, although drawing needs the whole distribution",
            hint=RESCORE,
        )
    if scores.at_lp is not None and scores.mult is not None:
        raise StoreError(
            "drawn ids with log-probs at requested ids, which are not stored together",
            hint="score with at_student = False",
        )
    if positions and int(scores.cnt.max()) > schema.MAX_K:
        raise StoreError(
            f"a row of {int(scores.cnt.max())} entries, at most {schema.MAX_K} are stored",
            hint="lower k_max",
        )
    lists = IdLists(cnt=scores.cnt, ids=scores.ids)
    check_lists(lists, positions, schema.MAX_K, "scores.ids", RESCORE)
    if scores.mult is not None:
        check_range(scores.mult, 1, 0xFFFF, "scores.mult", RESCORE)


def check_cached(cached: CachedScores) -> None:
    """Check the values of decoded scores, which another store may not have checked.

    Raises ValueError.
    """
    for name in ("lp", "entropy", "log_tail", "s_lp", "entry_lp"):
        if fault := _FAULTS[name](getattr(cached, name)):
            raise ValueError(fault)
    if fault := _bounds_fault(cached.entropy, cached.entropy_hi):
        raise ValueError(fault)
    every = ranked(cached)
    if ragged.has_duplicates(every.ids, every.cnt):
        raise ValueError("a row names an id twice")


def check_lists(lists: IdLists, positions: int, most: int, name: str, hint: str) -> None:
    """Check lists of ids of `positions` rows, at most `most` each. Raises StoreError."""
    check_ids(lists.ids, name, hint)
    try:
        if lists.cnt.shape != (positions,) or lists.cnt.dtype.kind not in "iu":
            raise ValueError(f"counts of shape {lists.cnt.shape}, not ({positions},)")
        ragged.check_counts(lists.cnt, len(lists.ids), most)
    except ValueError as error:
        raise StoreError(f"{name}: {error}", hint=hint) from error
    if ragged.has_duplicates(lists.ids, lists.cnt):
        raise StoreError(f"{name}: a row names an id twice", hint=hint)


def check_ids(ids: Array, name: str, hint: str) -> None:
    """Check that ids fit uint32, as a cast would silently change them. Raises StoreError."""
    fits = len(ids) == 0 or 0 <= int(ids.min()) <= int(ids.max()) < 2**32
    if ids.dtype.kind not in "iu" or not fits:
        raise StoreError(f"{name} ({ids.dtype}) holds other values than token ids", hint=hint)


def check_range(values: Array, least: int, most: int, name: str, hint: str) -> None:
    """Check that integers lie in a range. Raises StoreError."""
    if values.dtype.kind not in "iu" or (
        len(values) and not least <= int(values.min()) <= int(values.max()) <= most
    ):
        raise StoreError(
            f"{name} ({values.dtype}) holds other than integers from {least} to {most}",
            hint=hint,
        )


def _check_shape(array: Array, length: int, name: str, hint: str) -> None:
    if array.shape != (length,):
        raise StoreError(f"{name} has shape {array.shape}, not ({length},)", hint=hint)


def log_prob_fault(values: Array) -> str:
    """Describe an invalid log-prob, '' if there is none; -inf is valid, NaN is not."""
    highest = float(values.max(initial=-np.inf))
    return "" if highest <= _ROUNDING else f"a log-prob of {highest}"


def entropy_fault(values: Array) -> str:
    lowest, highest = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    fits = -_ROUNDING <= lowest <= highest < np.inf
    return "" if fits else f"entropies from {lowest} to {highest}"


def _bounds_fault(least: Array, most: Array | None) -> str:
    if most is None:
        return ""
    # NaN fails every comparison.
    wrong = np.flatnonzero(~((least <= most) & (most < np.inf)))
    return f"an entropy between {least[wrong[0]]} and {most[wrong[0]]}" if len(wrong) else ""


_FAULTS = {
    "entropy": entropy_fault,
    **dict.fromkeys(("lp", "log_tail", "entry_lp", "at_lp", "s_lp"), log_prob_fault),
}
"""Name of an array -> function that describes its invalid values."""
