"""Graphs of real size, with random weights: for measuring memory and speed where no trained model can be had.

The exporter is given weights of the real shapes that share one element, so that it needs little memory; the
data file is then written piece by piece. What comes out is what PyTorch exports of a model of that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from kvc_models.export import DEFAULT_OPSET, capture, replacing, trace_with_past

SIZES: Final[dict[str, dict[str, int]]] = {
    "7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
}
"""Llama 2 7B, Llama 3 8B (with the positions of 3.1), Llama 3.2 1B (its head not tied to the embedding)."""

ALIGNMENT: Final = 4096
INSIDE: Final = 1 << 16
"""Bytes; smaller tensors, constants and norms among them, stay in the ONNX file."""
_PIECE: Final = 1 << 22
_STD: Final = 0.02


def make_big(
    out: Path,
    params: str,
    *,
    dtype: str = "float16",
    opset: int = DEFAULT_OPSET,
    sparse: bool = False,
    **options: int,
) -> Path:
    """Write a Llama of a real size, in the form with past, to `out` and `out` + ".data"; return `out`.

    Args:
        out: the ONNX file.
        params: one of `SIZES`.
        dtype: "float32", "float16" or "bfloat16".
        opset: the ONNX operator set.
        sparse: the data file is one hole: it has its size, holds zeros and takes no room on the disk.
        options: replace numbers of `SIZES`.

    Raises:
        ModelError: PyTorch cannot export at this opset.
    """
    import onnx_ir

    model = _hollow({**SIZES[params], **options}, getattr(torch, dtype))
    program = capture(trace_with_past(model, _empty_caches), out.name, opset=opset)
    large = [v for v in program.model.graph.initializers.values() if v.const_value.nbytes > INSIDE]
    with replacing(out) as part:
        location, end = out.name + ".data", 0
        places = []
        for value in large:
            tensor = value.const_value
            places.append((end, tensor.size))
            value.const_value = onnx_ir.ExternalTensor(
                location,
                end,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=value.name,
                base_dir=part.parent,
            )
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        _write(part.with_name(location), end, [] if sparse else places, getattr(torch, dtype))
        onnx_ir.save(program.model, part)
    return out


def _hollow(sizes: dict[str, int], dtype: torch.dtype) -> Any:
    """A model whose matrices have all their elements in one place; norms and frequencies are real."""
    import transformers

    config = transformers.LlamaConfig(**sizes)
    config.dtype = dtype
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    element = torch.zeros(1, dtype=dtype)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            real = (
                torch.ones(weight.shape, dtype=dtype) if weight.dim() == 1 else element.expand(weight.shape)
            )
            setattr(module, name, torch.nn.Parameter(real, requires_grad=False))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)
    return model


def _empty_caches(model: Any, batch: int, past: int) -> list[torch.Tensor]:
    config = model.config
    shape = (batch, config.num_key_value_heads, past, config.hidden_size // config.num_attention_heads)
    return [torch.zeros(shape, dtype=config.dtype) for _ in range(2 * config.num_hidden_layers)]


def _write(data: Path, size: int, places: Sequence[tuple[int, int]], dtype: torch.dtype) -> None:
    """A file of `size` bytes with small random numbers at `places`: (first byte, elements)."""
    generator = torch.Generator().manual_seed(0)
    with data.open("wb") as file:
        file.truncate(size)
        for begin, elements in places:
            file.seek(begin)
            for first in range(0, elements, _PIECE):
                count = min(_PIECE, elements - first)
                numbers = torch.randn(count, generator=generator).mul_(_STD).to(dtype)
                file.write(memoryview(numbers.view(torch.uint8).numpy()))
