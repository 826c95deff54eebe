"""From a causal language model in PyTorch to an ONNX file, the way `torch.onnx.export` writes one today.

Two forms, both with dynamic batch and sequence lengths:

    no past     input_ids i64[batch, seq] -> logits f32[batch, seq, V]
    with past   input_ids i64[batch, seq], attention_mask i64[batch, past + seq],
                position_ids i64[batch, seq], past_key_values.N.key / .value f32[batch, Hkv, past, D]
                -> logits f32[batch, seq, V], present.N.key / .value f32[batch, Hkv, past + seq, D]
"""

# mypy: disable-error-code="misc"
# PyTorch is not followed by mypy, so its Module counts as Any, which strict mode does not let be subclassed.

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

DEFAULT_OPSET: Final = 20
EXAMPLE_BATCH: Final = 2
EXAMPLE_SEQ: Final = 6
EXAMPLE_PAST: Final = 5
"""Lengths of the traced example: distinct and above 1, so that no dimension is specialised or merged."""


class ModelError(Exception):
    """A model cannot be obtained or exported; the message says what to do."""


class _NoPast(torch.nn.Module):
    """input_ids i64[b, s] -> logits f32[b, s, V]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


class _WithPast(torch.nn.Module):
    """Token ids, mask, positions and the flat list k_0, v_0, k_1, ... -> (logits, k_0, v_0, k_1, ...)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        from transformers.cache_utils import DynamicCache

        # No config is given: a cache made from one drops keys older than the window, and the exported graph
        # must return all of them.
        cache = DynamicCache(ddp_cache_data=list(zip(past[::2], past[1::2])))
        result = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        layers = result.past_key_values.layers
        return (result.logits, *(x for layer in layers for x in (layer.keys, layer.values)))


def cache_shape(config: Any, batch: int, past: int) -> tuple[int, int, int, int]:
    """The shape [batch, Hkv, past, D] of one layer's keys, from a transformers config."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (batch, heads, past, dim)


def export_decoder(
    model: Any, out: Path, *, with_past: bool = False, opset: int = DEFAULT_OPSET, external_data: bool = True
) -> Path:
    """Export a transformers causal language model to `out` and return `out`.

    Args:
        model: the model in evaluation mode, fp32.
        out: the ONNX file. With `external_data` the weights go into a file beside it, `out` + ".data".
        with_past: take and return keys and values; otherwise only input_ids -> logits.
        opset: the ONNX operator set, 18 or later.
        external_data: keep the weights out of the ONNX file.

    Raises:
        ModelError: PyTorch cannot export this model at this opset.
    """
    ids = torch.arange(EXAMPLE_BATCH * EXAMPLE_SEQ).reshape(EXAMPLE_BATCH, EXAMPLE_SEQ)
    dynamic = torch.export.Dim.DYNAMIC
    both = {0: dynamic, 1: dynamic}
    if not with_past:
        traced = Traced(_NoPast(model), (ids,), {"input_ids": both}, ["input_ids"], ["logits"])
        return export_traced(traced, out, opset=opset, external_data=external_data)
    layers = model.config.num_hidden_layers
    positions = torch.arange(EXAMPLE_PAST, EXAMPLE_PAST + EXAMPLE_SEQ).repeat(EXAMPLE_BATCH, 1)
    mask = torch.ones(EXAMPLE_BATCH, EXAMPLE_PAST + EXAMPLE_SEQ, dtype=torch.int64)
    shape = cache_shape(model.config, EXAMPLE_BATCH, EXAMPLE_PAST)
    past = [torch.zeros(shape) for _ in range(2 * layers)]
    shapes = {
        "input_ids": both,
        "attention_mask": both,
        "position_ids": both,
        "past": [{0: dynamic, 2: dynamic}] * (2 * layers),
    }
    pairs = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{pair}" for pair in pairs)]
    outputs = ["logits", *(f"present.{pair}" for pair in pairs)]
    traced = Traced(_WithPast(model), (ids, mask, positions, past), shapes, inputs, outputs)
    return export_traced(traced, out, opset=opset, external_data=external_data)


@dataclass(frozen=True)
class Traced:
    """A module, arguments to trace it with, and the names and dynamic dimensions of the ONNX graph."""

    module: torch.nn.Module
    arguments: tuple[Any, ...]
    dynamic_shapes: dict[str, Any]
    input_names: Sequence[str]
    output_names: Sequence[str]


def export_traced(traced: Traced, out: Path, *, opset: int, external_data: bool) -> Path:
    """Export any module to `out`; see `export_decoder` for what is written and raised."""
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                traced.module.eval(),
                traced.arguments,
                dynamo=True,
                dynamic_shapes=traced.dynamic_shapes,
                input_names=traced.input_names,
                output_names=traced.output_names,
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"PyTorch cannot export {out.name} at opset {opset}: {reason}; try another opset (18 to 23)"
        ) from error
    assert program is not None
    written = program.model.opset_imports[""]
    if written != opset:  # PyTorch falls back to another one without a word
        raise ModelError(
            f"PyTorch cannot export {out.name} at opset {opset}, only at {written}; try opset 18 to 23"
        )
    with replacing(out) as part, _quiet():
        program.save(part, external_data=external_data)
    return out


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A path to write the ONNX file to; it and the files beside it take their places when all is done.

    They are written into a hidden folder beside `out`. An older `out` goes first and the new one comes last,
    so that whenever `out` is there, its data file belongs to it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f".{out.name}.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        yield folder / out.name
        out.unlink(missing_ok=True)
        data = out.with_name(out.name + ".data")
        data.unlink(missing_ok=True)
        others = sorted(path for path in folder.iterdir() if path.name != out.name)
        for path in [*others, folder / out.name]:
            path.chmod(0o644)
            os.replace(path, out.parent / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def assets_folder(out: Path) -> Path:
    """The folder of tokenizer and configuration files that belong to the ONNX file `out`."""
    return out.with_name(out.stem + ".assets")


def save_assets(model: Any, tokenizer: Any, out: Path) -> Path:
    """Write the tokenizer, chat template and configurations into `assets_folder(out)`; return the folder."""
    folder = assets_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet():
        tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of the exporter: they concern its own internals."""
    names = ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir", "transformers")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
