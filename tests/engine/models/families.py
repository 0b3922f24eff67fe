"""Tiny random models of families whose forward pass has a peculiarity."""

from typing import Any

import torch
import transformers
from torch import nn

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 40,
    "factor": 4.0,
}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 16,
}
MAMBA: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "initializer_range": 0.3,
    "eos_token_id": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Llama", SIZES),
    "sliding window": ("Mistral", {**SIZES, "sliding_window": 80}),
    "LongRoPE": (
        "Phi3",
        {
            **SIZES,
            "max_position_embeddings": 160,
            "original_max_position_embeddings": 40,
            "rope_parameters": LONGROPE,
        },
    ),
    "eager attention": ("Gemma2", {**SIZES, "head_dim": 16, "sliding_window": 80}),
    "sinks": (
        "GptOss",
        {
            **SIZES,
            "head_dim": 16,
            "num_local_experts": 4,
            "sliding_window": 80,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "linear attention": ("Qwen3_5Text", {**SIZES, **LINEAR}),
    "convolutions": ("Lfm2", {**SIZES, "layer_types": ["conv", "full_attention"]}),
    "state space": ("Mamba", MAMBA),
    "bias of the head": ("Phi", {**SIZES, "num_key_value_heads": 2}),
    "nested": (
        "Llama4Text",
        {**SIZES, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64},
    ),
    "no positions": (
        "Mpt",
        {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 99, "initializer_range": 0.3},
    ),
    "experts": (
        "Qwen3Moe",
        {
            **SIZES,
            "head_dim": 16,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "dropout": (
        "GPT2",
        {
            "vocab_size": 99,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 256,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": 1,
        },
    ),
    "states of its own": ("Rwkv", {k: v for k, v in MAMBA.items() if k != "state_size"}),
    "other rounding of steps": (
        "NemotronH",
        {
            **SIZES,
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "head_dim": 16,
        },
    ),
}


def make_family(name: str) -> Any:
    """Make the model of a family with random weights, in evaluation mode."""
    kind, settings = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**settings)
    build: Any = transformers.AutoModelForCausalLM.from_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(config)
        head = model.get_output_embeddings()
        if head.bias is not None:
            nn.init.normal_(head.bias)
    return model.eval()
