"""What known models do to logits after the head's product, by the names in their configuration."""

from typing import Any

from logitcask.kernels.logit_transform import LogitTransform

TIMES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Logits are multiplied by these fields: Cohere's and others'."""
OVER = ("logits_scaling",)
"""Logits are divided by these: Granite's."""
SOFTCAP = "final_logit_softcapping"
"""Gemma's."""


def logit_transform_of(config: Any) -> LogitTransform:
    """From the head's product to logits, as a transformers configuration names it. Whether the
    model does so is for a probe to show: see `prove` of a student and of a backend.
    """
    text = config.get_text_config()
    scale = 1.0
    for field in (*TIMES, *OVER):
        value = getattr(text, field, None)
        if value is not None:
            scale = scale / value if field in OVER else scale * value
    return LogitTransform(scale=scale, softcap=getattr(text, SOFTCAP, None))


def named_extras(config: Any) -> list[str]:
    """`field = value` of everything that makes head_map more than nothing."""
    text = config.get_text_config()
    values = {field: getattr(text, field, None) for field in (*TIMES, *OVER, SOFTCAP)}
    neutral = {SOFTCAP: None}
    return [
        f"{field} = {value}"
        for field, value in values.items()
        if value not in (None, neutral.get(field, 1.0))
    ]
