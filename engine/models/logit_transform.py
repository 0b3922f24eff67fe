"""Scale and soft cap of logits, read from the configuration of a transformers model."""

from typing import Any

from logitcask.kernels.logit_transform import LogitTransform

TIMES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Fields that multiply logits (Cohere and others)."""
OVER = ("logits_scaling",)
"""Fields that divide logits (Granite)."""
SOFTCAP = "final_logit_softcapping"
"""Field of the soft cap (Gemma)."""


def logit_transform_of(config: Any) -> LogitTransform:
    """Return the transform from the head's output to logits that a configuration names.

    `check_trainable` and the backends check on a few tokens that the model applies it.
    """
    text = config.get_text_config()
    scale = 1.0
    for field in (*TIMES, *OVER):
        value = getattr(text, field, None)
        if value is not None:
            scale = scale / value if field in OVER else scale * value
    return LogitTransform(scale=scale, softcap=getattr(text, SOFTCAP, None))


def named_extras(config: Any) -> list[str]:
    """Return `field = value` of each field that changes the logits."""
    text = config.get_text_config()
    values = {field: getattr(text, field, None) for field in (*TIMES, *OVER, SOFTCAP)}
    return [
        f"{field} = {value}"
        for field, value in values.items()
        if value is not None and (field == SOFTCAP or value != 1.0)
    ]
