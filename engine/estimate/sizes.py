"""Sizes of models without their weights: the parameters that a token uses, bytes of its cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from logitcask.engine.errors import ModelError
from logitcask.engine.models.identity import local_folder, read_config

BF16 = 2
"""Bytes of a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """The part of a model that its costs depend on."""

    parameters: float
    """Parameters of the matrices that a token is multiplied with, the head too."""
    kv_bytes: float
    """Bytes of the keys and values of one token, in bfloat16."""

    @property
    def weight_bytes(self) -> float:
        return BF16 * self.parameters


def size_of(config: Mapping[str, Any], name: str) -> ModelSize:
    """Return the size of a dense decoder with gated MLPs from the keys of its config.json.

    Norms and biases are left out, under 0.1 % together. Raises ModelError for another architecture,
    such as one with experts, and for one whose keys have other names.
    """
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    values = [config.get(key) for key in (*keys, "vocab_size")]
    others = [key for key in config if "expert" in key or key == "text_config"]
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(set(map(str, kinds))) > 1:
        others.append("several layer_types")
    if others or not all(isinstance(value, int) and value > 0 for value in values):
        cause = f"has {others[0]}" if others else f"lacks one of {', '.join(keys)}, vocab_size"
        raise ModelError(
            f"the size of {name} is not known: its config.json {cause}",
            hint="give --student-parameters and --student-kv-bytes, or --teacher-parameters",
        )
    hidden, layers, heads, ffn, vocabulary = (int(value) for value in values if value)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * hidden * ffn
    return ModelSize(
        parameters=layers * layer + vocabulary * hidden,
        kv_bytes=2 * BF16 * layers * kv_heads * head_dim,
    )


def _config(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, head_dim: int = 128
) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "head_dim": head_dim,
        "vocab_size": 151_936,
    }


_QWEN3_1_7B = _config(2048, 28, 16, 8, 6144)
_QWEN3_4B = _config(2560, 36, 32, 8, 9728)
_R1_1_5B = _config(1536, 28, 12, 2, 8960)
_R1_7B = _config(3584, 28, 28, 4, 18944)

KNOWN: Mapping[str, Mapping[str, int]] = {
    "Qwen/Qwen3-0.6B": _config(1024, 28, 16, 8, 3072),
    **dict.fromkeys(
        ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B-Base", "lllyx/Qwen3-1.7B-SFT"), _QWEN3_1_7B
    ),
    **dict.fromkeys(
        (
            "Qwen/Qwen3-4B",
            "Qwen/Qwen3-4B-Base",
            "lllyx/Qwen3-4B-Base-GRPO",
            "Keven16/Qwen3-4B-Non-Thinking-RL-Math-Step500",
        ),
        _QWEN3_4B,
    ),
    "Qwen/Qwen3-8B": _config(4096, 36, 32, 8, 12288),
    "Qwen/Qwen3-14B": _config(5120, 40, 40, 8, 17408),
    **dict.fromkeys(
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "hbx/JustRL-DeepSeek-1.5B"), _R1_1_5B
    ),
    **dict.fromkeys(
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "Skywork/Skywork-OR1-Math-7B"), _R1_7B
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _config(5120, 48, 40, 8, 13824),
}
"""Hub id -> keys of its config.json, of the published models of these names."""


def find_size(
    model: str, what: str, *, parameters: float | None, kv_bytes: float | None = None
) -> ModelSize:
    """Return the size of a folder or hub id: as given, by its config.json, or of KNOWN.

    what: student or teacher, for messages; a teacher's cache is not looked at. Raises ModelError
    for a size that is not known: nothing is downloaded.
    """
    if parameters is not None and (kv_bytes is not None or what == "teacher"):
        return ModelSize(parameters=parameters, kv_bytes=kv_bytes or 0.0)
    folder = local_folder(model)
    config = read_config(folder) if folder is not None else KNOWN.get(model)
    if config is None:
        also = " and --student-kv-bytes" if what == "student" else ""
        raise ModelError(
            f"the size of the {what} {model} is not known, and nothing is downloaded for it",
            hint=f"give --{what}-parameters{also}, or a folder with its config.json",
        )
    found = size_of(config, model)
    return ModelSize(parameters=parameters or found.parameters, kv_bytes=kv_bytes or found.kv_bytes)
