"""The architectures that transformers has and people sample, score or train, as tiny models.

A family is its changes to the class's configuration; `tests/models/build.py` has the sizes that
most configurations share.
"""

from typing import Any

from tests.engine.tiny import EOS

WINDOW = 16
"""Tokens of a sliding window, a chunk, and a page of a scan: shorter than the sequences."""
ORIGINAL, CONTEXT = 64, 256
"""Positions before a rope is stretched, where it is, and after."""

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
UNTIED = {"tie_word_embeddings": False}
"""For models that scale the embedding, and so repeat a token for ever."""
DECODER = {"is_decoder": True}
LATENT = {"num_key_value_heads": 4}
"""Multi-head latent attention has as many heads of keys as of queries."""


INDEXER = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16},
    **{"indexer_budget": WINDOW, "indexer_compress_ratio": 4, "hc_lowrank": 8},
}
NGRAMS = {
    **{"ple_layer_ids": [1], "ple_embed_dim": 64, "heads_per_ngram": 2},
    **{"ngram_vocab_size_base": 200, "split_ngram_parts": 2},
}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """Return the change that stretches a rope from ORIGINAL positions to CONTEXT."""
    stretch = {"factor": CONTEXT / ORIGINAL, "original_max_position_embeddings": ORIGINAL}
    return {"rope_parameters": ROPE | {"rope_type": kind} | stretch | more}


def long_rope(**more: Any) -> dict[str, Any]:
    """Return the change to a rope of other factors beyond ORIGINAL positions."""
    factors = {
        "short_factor": [1.0 + 0.05 * i for i in range(8)],
        "long_factor": [1.5 + 0.5 * i for i in range(8)],
    }
    stretched = rope("longrope", **factors, partial_rotary_factor=1.0, **more)
    return {"original_max_position_embeddings": ORIGINAL, "sliding_window": None, **stretched}


FAMILIES: dict[str, dict[str, Any]] = {
    # Dense, with full attention.
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cohere": {"logit_scale": 0.5},
    "diffllama": LATENT,
    "doge": {"sliding_window": None},
    "ernie4_5": {},
    "gemma": {},
    "glm": {},
    "glm4": {},
    "gpt_neox": {},
    "granite": {"logits_scaling": 0.5, "attention_multiplier": 0.2, "residual_multiplier": 0.7},
    "helium": {},
    "hrm_text": {"spread": 0.15},
    "hunyuan_v1_dense": {},
    "hyperclovax": {},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "llama": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "persimmon": {},
    "phi": {},
    "phi3": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
    "youtu": LATENT,
    "minicpm3": LATENT | {"dim_model_base": 32},
    # Learned positions, ALiBi, rotary of the first years.
    "biogpt": {},
    "bloom": {},
    "codegen": {},
    "ctrl": {},
    "falcon": {"multi_query": False, "new_decoder_architecture": True},
    "falcon alibi": {"alibi": True},
    "gpt-sw3": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox_japanese": {},
    "gptj": {},
    "mpt": {},
    "openai-gpt": {},
    "opt": {},
    "xglm": {},
    # Ropes that depend on the length.
    "llama linear": {"model_type": "llama", **rope("linear")},
    "llama dynamic": {"model_type": "llama", **rope("dynamic")},
    "llama yarn": {"model_type": "llama", **rope("yarn")},
    "llama llama3": {
        "model_type": "llama",
        **rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0),
    },
    "phi3 longrope": {"model_type": "phi3", **long_rope()},
    "phimoe longrope": {"model_type": "phimoe", **long_rope(short_mscale=1.1, long_mscale=1.3)},
    "minicpm3 longrope": {"model_type": "minicpm3", "dim_model_base": 32, **long_rope(), **LATENT},
    # Sliding windows.
    "cohere2": SLIDING | {"logit_scale": 0.5},
    "cwm": SLIDING | {"bos_token_id": EOS},
    "cohere_compass_text": SLIDING
    | {"logit_scale": 0.5, "rope_parameters": dict.fromkeys(SLIDING["layer_types"], ROPE)},
    "exaone4": SLIDING,
    "gemma2": SLIDING | {"final_logit_softcapping": 4.0},
    "gemma3_text": SLIDING | UNTIED,
    "gemma3n_text": SLIDING | {"num_kv_shared_layers": 0},
    "gemma4_text": SLIDING | UNTIED | {"num_experts": None},
    "gemma4_unified_text": SLIDING | UNTIED,
    "granite_swa": SLIDING | {"attention_multiplier": 0.25},
    "lfm3": {"layer_types": ["conv", "sliding_attention"]},
    "ministral": SLIDING,
    "ministral3": {},
    "mistral": {},
    "modernbert-decoder": {"bos_token_id": EOS, "cls_token_id": EOS, "sep_token_id": EOS},
    "olmo3": SLIDING,
    "qwen2 sliding": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
    "starcoder2 sliding": {"model_type": "starcoder2"},
    "vaultgemma": SLIDING,
    # Mixtures of experts.
    "afmoe": SLIDING,
    "aria_text": {},
    "axk1": LATENT,
    "axk2": LATENT,
    "beam": {},
    "cohere2_moe": SLIDING | {"logit_scale": 0.5},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            **{"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}
        },
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "deepseek_v4": {"num_key_value_heads": 1},
    "doge moe": {"is_moe": True, "num_experts": 16, "sliding_window": None},
    "dots1": {},
    "dots3_note_text": LATENT | {"per_layer_config": {}},
    "ernie4_5_moe": {},
    "exaone_moe": SLIDING,
    "flex_olmo": {},
    "flint": {},
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_oss": SLIDING,
    "granitemoe": {"attention_multiplier": 0.25},
    "granitemoe_swa": SLIDING | {"attention_multiplier": 0.25},
    "granitemoeshared": {"attention_multiplier": 0.25},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": LATENT,
    "inkling2_text": {"local_layer_ids": [0]},
    "inkling_text": {"local_layer_ids": [0]},
    "jetmoe": {},
    "kolibri1": {},
    "laguna": {},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"]},
    "longcat_flash": LATENT | {"zero_expert_num": 2},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "mixtral": {"sliding_window": None},
    "olmoe": {},
    "phimoe": {"sliding_window": None},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "solar_open": {},
    # State spaces, linear attention and hybrids.
    "bailing_hybrid": LATENT | LINEAR,
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "falcon_mamba": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": LATENT | LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba": {},
    "mamba2": {"num_heads": 8},
    "minimax": LINEAR,
    "nemotron_h": {},
    "olmo_hybrid": LINEAR,
    "qwen3_5_text": LINEAR | {"spread": 0.15},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp_text": LINEAR | INDEXER,
    "qwen4_exp_text ngrams": LINEAR | INDEXER | NGRAMS,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv": {},
    "xlstm": {},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": 2 * ["mamba"] + 2 * ["hybrid"],
        **UNTIED | {"spread": 0.15},
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "spread": 0.12,
    },
    "zaya": {"num_experts_per_tok": 1},
    # Text of a model that also sees: its configuration is nested.
    "fuyu": {},
    "gemma3": UNTIED | {"text_config": SLIDING | UNTIED},
    "gemma4": UNTIED | {"text_config": SLIDING | UNTIED | {"num_experts": None}},
    "gemma4_unified": UNTIED | {"text_config": SLIDING | UNTIED},
    "git": DECODER,
    "got_ocr2": {},
    "llama4": {"text_config": {"layer_types": ["chunked_attention", "full_attention"]}},
    "moss_transcribe_diarize": {},
    "phi4_multimodal": {},
    "qwen3_5": {"text_config": LINEAR, "spread": 0.15},
    "qwen3_5_moe": {"text_config": LINEAR},
    "qwen4_exp": {"text_config": LINEAR | INDEXER},
    # No causal language model by itself: a decoder without its encoder, or attention both ways.
    "bart": {},
    "bert": {},
    "bert decoder": {"model_type": "bert", **DECODER},
    "bert-generation": DECODER,
    "big_bird": DECODER | {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blenderbot": {},
    "blenderbot-small": {},
    "camembert": DECODER,
    "cpmant": {
        **{"dim_head": 16, "dim_ff": 64},
        **{"position_bias_num_buckets": 32, "position_bias_max_distance": 64},
    },
    "data2vec-text": DECODER,
    "electra": {},
    "electra decoder": {"model_type": "electra", **DECODER},
    "ernie": DECODER,
    "marian": {},
    "mbart": {},
    "megatron-bert": DECODER,
    "moshi": {},
    "mvp": {},
    "pegasus": {},
    "plbart": {},
    "prophetnet": DECODER
    | {"num_decoder_layers": 2, "num_encoder_layers": 2, "add_cross_attention": False}
    | {"num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4},
    "reformer": DECODER
    | {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "num_buckets": 4}
    | {"local_attn_chunk_length": WINDOW, "lsh_attn_chunk_length": WINDOW},
    "rembert": DECODER,
    "roberta": DECODER,
    "roberta-prelayernorm": DECODER,
    "roc_bert": DECODER | {"pronunciation_vocab_size": 128, "shape_vocab_size": 128},
    "roformer": DECODER,
    "trocr": {},
    "whisper": {},
    "xlm": {"causal": True, "emb_dim": 64, "pad_index": 127},
    "xlm-roberta": DECODER,
    "xlm-roberta-xl": DECODER,
    "xlnet": {},
    "xmod": DECODER | {"default_language": "en_XX"},
}
LEFT_OUT = {
    **dict.fromkeys(("blt",), "bytes in patches: more than a tiny configuration"),
    **dict.fromkeys(("gemma3n",), "its vision tower needs other packages; see gemma3n_text"),
    **dict.fromkeys(("dots3_note",), "see dots3_note_text"),
    **dict.fromkeys(("emu3", "mllama"), "saved text models cannot be loaded by AutoModel"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts for another model"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "predicts several codebooks at once"),
}
"""Other model types of AutoModelForCausalLM, and the reason."""
