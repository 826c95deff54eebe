"""The families of tiny decoders: real transformers classes with real options, only small.

Every family has something that its neighbours lack: a window, alibi, sinks, experts, another norm, another
way to rotate. Options that matter at full size keep their meaning: windows and chunks are shorter than the
tests' prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

VOCAB: Final = 512
CONTEXT: Final = 256
WINDOW: Final = 8
CHUNK: Final = 16
SHORT_CONTEXT: Final = 64
"""Where phi3-long changes from its short to its long frequencies."""

_HIDDEN: Final = 128
_LAYERS: Final = 2
_HEADS: Final = 4
_HEAD: Final = 32


@dataclass(frozen=True)
class Family:
    """A configuration class of transformers and its options.

    Attributes:
        config: name of the class, such as "LlamaConfig".
        options: what differs from the class's defaults.
        options_of_model: keyword arguments to `from_config`.
        about: what this family adds to the others.
    """

    config: str
    options: dict[str, Any]
    about: str
    options_of_model: dict[str, Any] = field(default_factory=dict)


_SIZES: Final = {
    "vocab_size": VOCAB,
    "hidden_size": _HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_GEMMA: Final = {"head_dim": _HEAD, "sliding_window": WINDOW, "query_pre_attn_scalar": 32}
_LAYERS_GEMMA3: Final = ["sliding_attention", "full_attention", "sliding_attention"]
_LONG_ROPE: Final = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0 + 0.05 * i for i in range(_HEAD // 2)],
    "long_factor": [1.0 + 0.5 * i for i in range(_HEAD // 2)],
    "factor": CONTEXT / SHORT_CONTEXT,
    "original_max_position_embeddings": SHORT_CONTEXT,
}
_ROPE_LLAMA3: Final = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": SHORT_CONTEXT,
}
_ROPE_YARN: Final = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": SHORT_CONTEXT,
}
_MLA: Final = {
    "num_key_value_heads": _HEADS,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "first_k_dense_replace": _LAYERS,
}
_BATCHED: Final = {"experts_implementation": "batched_mm"}
"""Experts as gathered products: of what transformers offers, the form whose shapes no data decides."""

_EXPERTS: Final = {"num_experts_per_tok": 2}

FAMILIES: Final[dict[str, Family]] = {
    "llama": Family("LlamaConfig", _SIZES, "grouped heads, rotary positions, RMS norm"),
    "gpt2": Family(
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": _HIDDEN,
            "n_layer": _LAYERS,
            "n_head": _HEADS,
            "n_positions": CONTEXT,
        },
        "learned positions, biases, layer norm",
    ),
    "qwen2": Family("Qwen2Config", _SIZES, "biases on q, k and v"),
    "mistral": Family("MistralConfig", {**_SIZES, "sliding_window": WINDOW}, "a window in every layer"),
    "qwen3": Family("Qwen3Config", {**_SIZES, "head_dim": _HEAD}, "norms on queries and keys"),
    "gemma2": Family("Gemma2Config", {**_SIZES, **_GEMMA}, "alternating windows, bounded scores"),
    "gemma3": Family(
        "Gemma3TextConfig",
        {**_SIZES, **_GEMMA, "num_hidden_layers": 3, "layer_types": _LAYERS_GEMMA3},
        "two rotary bases",
    ),
    "phi3": Family("Phi3Config", _SIZES, "q, k and v from one product"),
    "gemma": Family("GemmaConfig", {**_SIZES, "head_dim": _HEAD, "num_key_value_heads": 1}, "one KV head"),
    "phi": Family(
        "PhiConfig",
        {
            **_SIZES,
            "num_key_value_heads": _HEADS,
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_type": "default"},
        },
        "half of a head rotates; attention and MLP side by side",
    ),
    "phi3-long": Family(
        "Phi3Config",
        {**_SIZES, "original_max_position_embeddings": SHORT_CONTEXT, "rope_parameters": _LONG_ROPE},
        "frequencies chosen by the longest position",
    ),
    "opt": Family(
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": _HIDDEN,
            "word_embed_proj_dim": _HIDDEN,
            "ffn_dim": 256,
            "num_hidden_layers": _LAYERS,
            "num_attention_heads": _HEADS,
            "max_position_embeddings": CONTEXT,
        },
        "learned positions with an offset, ReLU",
    ),
    "bloom": Family(
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": _HIDDEN, "n_layer": _LAYERS, "n_head": _HEADS},
        "alibi from key positions",
    ),
    "mpt": Family(
        "MptConfig",
        {
            "vocab_size": VOCAB,
            "d_model": _HIDDEN,
            "n_layers": _LAYERS,
            "n_heads": _HEADS,
            "max_seq_len": CONTEXT,
            "expansion_ratio": 2,
        },
        "alibi from distances to the end",
    ),
    "starcoder2": Family("Starcoder2Config", {**_SIZES, "sliding_window": WINDOW}, "a window, layer norm"),
    "llama3": Family("LlamaConfig", {**_SIZES, "rope_parameters": _ROPE_LLAMA3}, "scaled frequencies"),
    "llama4": Family(
        "Llama4TextConfig",
        {
            **_SIZES,
            "intermediate_size_mlp": 256,
            "num_hidden_layers": 4,
            "head_dim": _HEAD,
            "attention_chunk_size": CHUNK,
            "floor_scale": SHORT_CONTEXT,
            "moe_layers": [],
        },
        "attention inside chunks, every fourth layer without positions",
    ),
    "llama4-moe": Family(
        "Llama4TextConfig",
        {
            **_SIZES,
            "intermediate_size_mlp": 256,
            "num_hidden_layers": 4,
            "head_dim": _HEAD,
            "attention_chunk_size": CHUNK,
            "floor_scale": SHORT_CONTEXT,
            "num_local_experts": 4,
        },
        "llama4 with experts in every layer",
    ),
    "gpt-oss": Family(
        "GptOssConfig",
        {
            **_SIZES,
            **_EXPERTS,
            "head_dim": _HEAD,
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "rope_parameters": _ROPE_YARN,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "sinks, alternating windows, experts",
        _BATCHED,
    ),
    "deepseek": Family(
        "DeepseekV3Config", {**_SIZES, **_MLA}, "latent keys and values, values narrower than keys"
    ),
    "mixtral": Family(
        "MixtralConfig", {**_SIZES, **_EXPERTS, "num_local_experts": 4}, "two of four experts", _BATCHED
    ),
    "qwen2-moe": Family(
        "Qwen2MoeConfig",
        {
            **_SIZES,
            **_EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
        },
        "experts, and one that all tokens share",
        _BATCHED,
    ),
    "gemma4": Family(
        "Gemma4TextConfig",
        {
            **_SIZES,
            "head_dim": _HEAD,
            "global_head_dim": 2 * _HEAD,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "keys and values from one projection where a layer sees all tokens, other heads there",
    ),
    "olmoe": Family(
        "OlmoeConfig", {**_SIZES, **_EXPERTS, "num_experts": 4}, "experts, wide q/k norms", _BATCHED
    ),
}
