"""Each family of models is sampled, scored and trained right, or refused: a dozen, all in soak."""

import os
import re

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.models.families import FAMILIES, LEFT_OUT
from tests.models.matrix import line, written

DOZEN = [
    *("llama yarn", "phi3 longrope", "gpt2", "phi", "gemma2", "gpt_oss", "qwen3_moe", "llama4"),
    *("qwen3_next", "mamba2", "doge moe", "bart"),
]
"""A rope that is stretched, one by length, dropout, a bias of the head, soft caps without sdpa,
sinks, experts, a nested configuration, a hybrid, a state space, tokens that mix, no encoder."""


def without_numbers(text: str) -> str:
    """Return the text without the digits of measured differences, which vary with the machine."""
    return re.sub(r"\d[\d.]*(e[+-]?\d+)?", "#", text)


@pytest.mark.parametrize("family", FAMILIES if os.environ.get("LOGITCASK_SOAK") else DOZEN)
def test_a_family_is_right_or_refused_as_the_readme_says(family: str) -> None:
    found = line(family)
    assert " wrong " not in found
    assert " traceback " not in found
    assert without_numbers(found) == without_numbers(written()[family])


def test_every_causal_model_of_transformers_is_in_the_table() -> None:
    types = {changes.get("model_type", name.split()[0]) for name, changes in FAMILIES.items()}
    assert types | {*LEFT_OUT} == {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert list(written()) == list(FAMILIES)
