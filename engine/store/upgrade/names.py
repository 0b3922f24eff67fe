"""Names of format 1 and of format 2: layouts, arrays, keys of a provenance."""

from collections.abc import Mapping
from typing import Any

import logitcask.engine.store.format.schema as schema
from logitcask.engine.store.format.provenance import ORIGINAL_ID

_LAYOUTS = {"once": schema.DEDUP, "whole": schema.FULL, "wider": schema.EXTENSION}
_ARRAYS = {
    "prompt_offsets": "prompt_off",
    "prompt_index": "seq_prompt",
    "response_offsets": "seq_off",
    "response_tokens": "tokens",
    "behavior_logprobs": "b_lp",
    "finish_reason": "finish",
    "policy_version_start": "version_start",
    "policy_version_end": "version_end",
    "student_logprobs": "s_lp",
    "student_entropy": "s_ent",
    "student_tail": "s_tail",
    "student_topk_counts": "s_cnt",
    "student_topk_ids": "s_ids",
    "student_topk_logprobs": "s_topk_lp",
    "mc_counts": "mc_cnt",
    "mc_multiplicities": "mc_mult",
    "mc_logprobs": "mc_lp",
    "teacher_logprobs": "t_lp",
    "entropy": "ent",
    "entropy_upper": "ent_hi",
    "topk_counts": "cnt",
    "topk_ids": "ids",
    "topk_logprobs": "lp",
    "n_kept": "kept",
    "multiplicities": "mult",
    "at_student_logprobs": "t_at_s",
    "at_student_rank_fix": "t_rank_fix",
}
"""Array of format 2 -> its name in format 1, where they differ."""
_MODEL = {"root": "base_weights"}
_PROVENANCE: Mapping[str, Mapping[str, str]] = {
    "": {"role": "teacher_kind", "behaviour": "fingerprint"},
    "set": {"student_k": "student_topk"},
    "student": _MODEL,
    "teacher": _MODEL,
    "request": {
        "entry_kind": "selection",
        "top_p": "teacher_top_p",
        "k_min": "teacher_topk_min",
        "k_max": "teacher_topk_max",
    },
}
"""Object in a provenance ('' = itself) -> key of format 1 -> key of format 2."""
_SELECTIONS = {"topp": "top-p", "topk": "top-k"}


def layout_of(layout: Any) -> str:
    """Return the layout of format 2. Raises TypeError where it is no text."""
    first, plus, behind = str.partition(layout, "+")
    # A name of format 2 is none of format 1.
    return _LAYOUTS.get(first, "" if first in _LAYOUTS.values() else first) + plus + behind


def file_of(name: str) -> str:
    """Return the file of format 1 that holds the bytes of a file of format 2."""
    array, slash, rest = name.partition("/")
    return _ARRAYS.get(array, array) + slash + rest


def provenance_of(provenance: Mapping[str, Any], seg_id: str) -> dict[str, Any]:
    """Return a provenance with the keys of format 2, and with the seg_id of format 1."""
    found = _renamed(provenance, _PROVENANCE[""])
    for key, names in _PROVENANCE.items():
        if isinstance(found.get(key), dict):
            found[key] = _renamed(found[key], names)
    request = found.get("request")
    if isinstance(request, dict) and isinstance(kind := request.get("selection"), str):
        request["selection"] = _SELECTIONS.get(kind, kind)
    return found | {ORIGINAL_ID: seg_id}


def _renamed(content: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in content.items()}
