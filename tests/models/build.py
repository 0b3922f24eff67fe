"""Tiny models with random weights from the table of families.

Weights are large enough that positions, windows and experts matter: distributions are far from
uniform.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.engine.tiny import EOS, PAD, make_tokenizer
from tests.models.families import CONTEXT, FAMILIES, WINDOW

SPREAD = 0.2
"""Standard deviation of the matrices; of biases half of it. A family may have another `spread`."""

_SAME = {
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks "
    "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_topk moe_k "
    "num_experts_per_token linear_num_key_heads n_groups index_n_heads depth": 2,
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads "
    "encoder_attention_heads swa_num_attention_heads num_experts num_local_experts moe_num_experts "
    "n_routed_experts linear_num_value_heads linear_num_heads patch_size": 4,
    "mamba_n_heads mamba_num_heads mamba_dt_rank time_step_rank rotary_dim image_size o_lora_rank "
    "hidden_size_per_layer_input laurel_rank router_hidden_size": 8,
    "head_dim kv_channels swa_head_dim kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim "
    "linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim index_topk "
    "mamba_d_state mamba_d_head mamba_head_dim state_size ssm_state_size": 16,
    "sliding_window sliding_window_size attention_window_size attention_chunk_size "
    "window_size local_attention mamba_chunk_size chunk_size block_size": WINDOW,
    "q_lora_rank": 24,
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size qk_head_dim": 32,
    "hidden_size d_model n_embd embedding_dim embedding_size lru_width intermediate_size ffn_dim "
    "encoder_ffn_dim decoder_ffn_dim dff n_inner ffn_hidden_size intermediate_size_mlp "
    "dense_intermediate_size out_hidden_size word_embed_proj_dim": 64,
    "vocab_size vocab_size_per_layer_input": 128,
    "max_position_embeddings n_positions n_ctx max_seq_len context_length "
    "model_max_length": CONTEXT,
    "n_group topk_group num_expert_group first_k_dense_replace n_shared_experts": 1,
}
SIZES = {
    **{name: size for names, size in _SAME.items() for name in names.split()},
    **{"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None},
}
"""Field of a configuration -> its value in every family."""


def tiny_config(kind: Any, **changes: Any) -> Any:
    """Return a small configuration of a class, its parts too."""
    names = {field.name for field in fields(kind)}
    values = {name: size for name, size in SIZES.items() if name in names} | changes
    for part in kind.sub_configs:
        if (default := getattr(kind(), part)) is not None:
            values[part] = tiny_config(type(default), **changes.get(part, {}))
    return kind(**values)


def make_family(name: str, seed: int = 0) -> Any:
    """Return the tiny model of a family in eval mode, float32."""
    changes = dict(FAMILIES[name])
    spread = changes.pop("spread", SPREAD)
    config = tiny_config(CONFIG_MAPPING[changes.pop("model_type", name.split()[0])], **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            widen(parameter, spread)
    return model.eval()


@torch.no_grad()
def widen(parameter: Tensor, spread: float) -> None:
    """Enlarge a matrix of small numbers, and fill a vector of zeros.

    Others (norms, decay rates, convolutions) have values that their class has chosen.
    """
    if parameter.dim() < 2 and not parameter.any():
        nn.init.normal_(parameter, std=spread / 2)
    elif parameter.dim() >= 2 and parameter.std() < spread / 2:
        nn.init.normal_(parameter, std=spread)


def save_family(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the folder of a family's model: weights, config, tokenizer."""
    make_family(name, seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
