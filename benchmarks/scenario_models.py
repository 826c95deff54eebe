"""The models of benchmarks/scenarios.py in the form that each engine takes: one seed, float16 if it can."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common import ROOT, WORK, run_python
from benchmarks.peer_models import Missing, genai_folder, once, openvino_folder

FOLDER = WORK / "scenarios"


def onnx_file(name: str, options: argparse.Namespace) -> Path:
    """kvc's: exported by kvc_models without past."""
    out = FOLDER / f"{name}.onnx"
    if not out.exists():
        run_python(["-m", "kvc_models", "export", name, str(out), "--dtype", "float16"])
    return out


def transformers_folder(name: str, options: argparse.Namespace) -> Path:
    """The same weights as transformers saves them: what the peers convert."""

    def make(out: Path) -> None:
        from kvc_models import sized, tiny

        tiny.cast(sized.make_sized(name), "float16").save_pretrained(out)
        tiny.tokenizer().save_pretrained(out)

    return once(FOLDER / f"{name}-hf", make)


def genai(name: str, options: argparse.Namespace) -> Path:
    """onnxruntime-genai's float32 model: its float16 model fails on CPUs at the first decode step."""
    source, script = transformers_folder(name, options), ROOT / "benchmarks" / "engines" / "genai_builder.py"
    return once(
        FOLDER / f"{name}-genai",
        lambda out: genai_folder(options.peer_python, source, out, builder=[str(script)]),
    )


def openvino(name: str, options: argparse.Namespace) -> Path:
    """OpenVINO's, with float16 weights; of Gemma 3, optimum-intel 2.2 exports that of transformers 4 only."""
    source, older = transformers_folder(name, options), None
    if json.loads((source / "config.json").read_text())["model_type"] == "gemma3_text":
        older = options.transformers_4
        if not older.is_dir():
            raise Missing(f"optimum-intel needs transformers 4 to export Gemma 3, and {older} is not there")
        source = once(FOLDER / f"{name}-hf-4", lambda out: _for_transformers_4(source, out))
    return once(
        FOLDER / f"{name}-openvino",
        lambda out: openvino_folder(options.peer_python, source, out, weights="fp16", packages=older),
    )


def _for_transformers_4(source: Path, out: Path) -> None:
    """The same folder with two rotary bases as transformers 4 writes them."""
    out.mkdir()
    for file in source.iterdir():
        (out / file.name).symlink_to(Path("..") / source.name / file.name)
    config = _config(source)
    bases = config.pop("rope_parameters")
    config["rope_theta"] = bases["full_attention"]["rope_theta"]
    config["rope_local_base_freq"] = bases["sliding_attention"]["rope_theta"]
    (out / "config.json").unlink()
    (out / "config.json").write_text(json.dumps(config, indent=2))


def gguf_file(name: str, options: argparse.Namespace) -> Path:
    """llama.cpp's: matrices float16, norms float32, no vocabulary. It knows no Mistral with windows."""
    source = transformers_folder(name, options)
    return once(FOLDER / f"{name}.gguf", lambda out: _write_gguf(source, out))


def _write_gguf(source: Path, out: Path) -> None:
    import gguf

    config = _config(source)
    gemma = config["model_type"] == "gemma3_text"
    kind = gguf.MODEL_ARCH.GEMMA3 if gemma else gguf.MODEL_ARCH.LLAMA
    writer = gguf.GGUFWriter(str(out), gguf.MODEL_ARCH_NAMES[kind])
    layers, rope = config["num_hidden_layers"], config["rope_parameters"]
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    names = gguf.get_tensor_name_map(kind, layers)
    for tensor, value in _tensors(source):
        known = names.get_name(tensor, try_suffixes=(".weight",))
        if known is None:
            raise Missing(f"llama.cpp has no name for {tensor}")
        norm = value.ndim == 1
        writer.add_tensor(known, value.astype(np.float32) + (1 if gemma else 0) if norm else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(source: Path) -> Iterator[tuple[str, np.ndarray]]:
    from safetensors import safe_open

    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no dictionary
                yield name, opened.get_tensor(name)


def _config(source: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((source / "config.json").read_text())
    return read


def kv_bytes(config: dict[str, Any], batch: int, context: int, *, windows: bool) -> int:
    """Bytes of keys and values in 2 bytes a number: of all tokens, or of those that a window still shows."""
    layers = config["num_hidden_layers"]
    kinds = (
        config.get("layer_types") or ["sliding_attention" if config.get("sliding_window") else ""] * layers
    )
    token = 2 * 2 * config["num_key_value_heads"] * config["head_dim"]
    window = config.get("sliding_window") if windows else None
    seen = [min(context, window) if window and kind == "sliding_attention" else context for kind in kinds]
    return int(batch * token * sum(seen))


def configuration(name: str) -> dict[str, Any]:
    """Its config.json, without its weights."""
    from kvc_models import sized

    return {"head_dim": 64, **sized.SIZED[name][1]}
