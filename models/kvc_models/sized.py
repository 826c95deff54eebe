"""Decoders with the shapes of real models, long contexts and random weights.

Bytes and speed hold, text does not. Each comes with the small tokenizer of `kvc_models.tiny`: most of their
token ids stand for no text.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from kvc_models.tiny import END_OF_TEXT, SEED, tokenizer

CONTEXT: Final = 32768

SIZED: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "smollm2-long": (
        "SmolLM2-135M's shapes",
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-1b": (
        "Gemma-3-1B's shapes: five of six layers have a window of 512",
        {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
            "layer_types": [
                "full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(26)
            ],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "tie_word_embeddings": True,
        },
    ),
    "mistral-window": (
        "a Mistral of 0.9 billion parameters: every layer has a window of 4096",
        {
            "model_type": "mistral",
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": False,
        },
    ),
    "gpt2-124m": (
        "GPT-2's shapes (124M) with 32k positions: keys that do not turn",
        {
            "model_type": "gpt2",
            "vocab_size": 50257,
            "n_positions": CONTEXT,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
        },
    ),
    "opt-350m": (
        "OPT-350M's shapes with 32k positions: norms behind, narrow embeddings",
        {
            "model_type": "opt",
            "vocab_size": 50272,
            "hidden_size": 1024,
            "word_embed_proj_dim": 512,
            "ffn_dim": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "do_layer_norm_before": False,
        },
    ),
    "llama2-slice": (
        "two layers of Llama-2-7B's shapes: as many KV heads as heads, keys that turn",
        {
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "phi3-slice": (
        "two layers of Phi-3-mini's shapes: one product for q, k and v",
        {
            "model_type": "phi3",
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek-slice": (
        "four layers of DeepSeek-V2-Lite's attention, with a feed-forward part of Llama's kind",
        {
            "model_type": "deepseek_v3",
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "first_k_dense_replace": 4,
        },
    ),
    "phi15-slice": (
        "two layers of Phi-1.5's shapes: attention beside the feed-forward part",
        {
            "model_type": "phi",
            "vocab_size": 8192,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 2,
            "num_attention_heads": 32,
            "partial_rotary_factor": 0.5,
        },
    ),
    "gemma4-slice": (
        "four layers of a Gemma-4's attention, with a dense feed-forward part: in every other one keys and "
        "values are one projection",
        {
            "model_type": "gemma4_text",
            "vocab_size": 32000,
            "hidden_size": 2816,
            "intermediate_size": 8448,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "num_global_key_value_heads": 2,
            "global_head_dim": 512,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "sliding_window": 1024,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "tie_word_embeddings": True,
        },
    ),
}
"""What each is, and the options of its configuration."""


def make_sized(name: str) -> Any:
    """A transformers causal language model of `SIZED`: random float32 weights, always the same."""
    import transformers

    end = tokenizer().convert_tokens_to_ids(END_OF_TEXT)
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    options = {"max_position_embeddings": CONTEXT, **ends, **SIZED[name][1]}
    config = transformers.AutoConfig.for_model(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return transformers.AutoModelForCausalLM.from_config(config).eval()
