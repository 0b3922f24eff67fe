"""What known models do to logits after the head's product, by the names in their configuration."""

from typing import Any

NEUTRAL = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "output_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
}
"""Field -> the value that leaves logits as they are; a soft cap has none but its absence."""


def named_extras(config: Any) -> list[str]:
    """`field = value` of everything a transformers configuration does beyond a product."""
    text = config.get_text_config()
    return [
        f"{field} = {getattr(text, field)}"
        for field, neutral in NEUTRAL.items()
        if getattr(text, field, None) not in (None, neutral)
    ]
