"""From a causal language model in PyTorch to an ONNX file, the way `torch.onnx.export` writes one today.

Two forms, both with dynamic batch and sequence lengths:

    no past     input_ids i64[batch, seq] -> logits f32[batch, seq, V]; the older exporter of PyTorch needs a
                second input, attention_mask i64[batch, seq]
    with past   input_ids i64[batch, seq], attention_mask i64[batch, past + seq],
                position_ids i64[batch, seq], past_key_values.N.key / .value f32[batch, Hkv, past, D]
                -> logits f32[batch, seq, V], present.N.key / .value f32[batch, Hkv, past + seq, D]

A model that takes no positions has no input position_ids. In a model of 16 bits, f32 is its own type.
"""

# mypy: disable-error-code="misc"
# PyTorch is not followed by mypy, so its Module counts as Any, which strict mode does not let be subclassed.

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import onnx
import torch

from kvc_models.adapt import known_maxima, without_complex_numbers

Exporter = Literal["dynamo", "torchscript"]
"""The two exporters of PyTorch: the one that captures with torch.export, and the older one that traces."""

DTYPES: Final = ("float32", "float16", "bfloat16")
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


class _Masked(_NoPast):
    """input_ids i64[b, s], attention_mask i64[b, s] -> logits f32[b, s, V]."""

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits: torch.Tensor = result.logits
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
        return self.run(past, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    def run(self, past: list[torch.Tensor], **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from transformers.cache_utils import DynamicCache

        # No config is given: a cache made from one drops keys older than the window, and the exported graph
        # must return all of them.
        cache = DynamicCache(ddp_cache_data=list(zip(past[::2], past[1::2])))
        result = self.model(**inputs, past_key_values=cache, use_cache=True)
        layers = result.past_key_values.layers
        return (result.logits, *(x for layer in layers for x in (layer.keys, layer.values)))


class _WithPastNoPositions(_WithPast):
    """The same for a model that takes no positions."""

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        return self.run(past, input_ids=input_ids, attention_mask=attention_mask)


def cache_of(model: Any, batch: int, past: int) -> list[torch.Tensor]:
    """Keys and values k_0, v_0, k_1, ... [batch, Hkv, past, D], as the model itself makes them."""
    from transformers.cache_utils import DynamicCache

    ids = torch.arange(1, batch * past + 1).reshape(batch, past)
    with _quiet(), torch.no_grad():
        layers = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values.layers
    return [x.clone() for layer in layers for x in (layer.keys, layer.values)]


def export_decoder(
    model: Any,
    out: Path,
    *,
    with_past: bool = False,
    opset: int = DEFAULT_OPSET,
    external_data: bool = True,
    exporter: Exporter = "dynamo",
) -> Path:
    """Export a transformers causal language model to `out` and return `out`.

    Args:
        model: the model in evaluation mode.
        out: the ONNX file. With `external_data` the weights go into a file beside it, `out` + ".data".
        with_past: take and return keys and values; otherwise only input_ids -> logits.
        opset: the ONNX operator set, 18 or later.
        external_data: keep the weights out of the ONNX file; "dynamo" only.
        exporter: which of PyTorch's exporters.

    Raises:
        ModelError: PyTorch cannot export this model at this opset.
    """
    older = exporter == "torchscript"
    traced = trace_with_past(model, cache_of) if with_past else _trace_no_past(model, masked=older)
    with without_complex_numbers(), known_maxima():
        if older:
            return export_with_torchscript(traced, out, opset=opset)
        return export_traced(traced, out, opset=opset, external_data=external_data)


def _trace_no_past(model: Any, masked: bool) -> Traced:
    ids = torch.arange(EXAMPLE_BATCH * EXAMPLE_SEQ).reshape(EXAMPLE_BATCH, EXAMPLE_SEQ)
    both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    if masked:
        names = ["input_ids", "attention_mask"]
        return Traced(
            _Masked(model), (ids, torch.ones_like(ids)), dict.fromkeys(names, both), names, ["logits"]
        )
    return Traced(_NoPast(model), (ids,), {"input_ids": both}, ["input_ids"], ["logits"])


def trace_with_past(model: Any, caches: Callable[[Any, int, int], list[torch.Tensor]]) -> Traced:
    """The module and the arguments of the form with past; `caches` makes them as `cache_of` does."""
    dynamic = torch.export.Dim.DYNAMIC
    positions = torch.arange(EXAMPLE_PAST, EXAMPLE_PAST + EXAMPLE_SEQ).repeat(EXAMPLE_BATCH, 1)
    tokens = {
        "input_ids": torch.arange(EXAMPLE_BATCH * EXAMPLE_SEQ).reshape(EXAMPLE_BATCH, EXAMPLE_SEQ),
        "attention_mask": torch.ones(EXAMPLE_BATCH, EXAMPLE_PAST + EXAMPLE_SEQ, dtype=torch.int64),
        "position_ids": positions,
    }
    module = _WithPast(model)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        del tokens["position_ids"]
        module = _WithPastNoPositions(model)
    past = caches(model, EXAMPLE_BATCH, EXAMPLE_PAST)
    shapes: dict[str, Any] = {name: {0: dynamic, 1: dynamic} for name in tokens}
    shapes["past"] = [{0: dynamic, 2: dynamic}] * len(past)
    pairs = [f"{layer}.{kind}" for layer in range(len(past) // 2) for kind in ("key", "value")]
    inputs = [*tokens, *(f"past_key_values.{pair}" for pair in pairs)]
    outputs = ["logits", *(f"present.{pair}" for pair in pairs)]
    return Traced(module, (*tokens.values(), past), shapes, inputs, outputs)


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
    program = capture(traced, out.name, opset=opset)
    with replacing(out) as part, _quiet():
        program.save(part, external_data=external_data)
    return out


def capture(traced: Traced, name: str, *, opset: int) -> Any:
    """The ONNXProgram of a module, not yet written; `name` is for messages. Raises as `export_decoder`."""
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
        raise ModelError(
            f"PyTorch cannot export {name} at opset {opset}: {_reason(error)}; try another opset (18 to 23)"
        ) from error
    assert program is not None
    written = program.model.opset_imports[""]
    if written != opset:  # PyTorch falls back to another one without a word
        raise ModelError(
            f"PyTorch cannot export {name} at opset {opset}, only at {written}; try opset 18 to 23"
        )
    return program


def export_with_torchscript(traced: Traced, out: Path, *, opset: int) -> Path:
    """Export with the older exporter, weights inside the file; see `export_decoder`."""
    whole = "past + seq" if any(name.startswith("past") for name in traced.input_names) else "seq"
    axes: dict[str, dict[int, str]] = {}
    for name in (*traced.input_names, *traced.output_names):
        if name.startswith(("past", "present")):
            axes[name] = {0: "batch", 2: "past" if name.startswith("past") else whole}
        else:
            lengths = {"attention_mask": whole, "encoder_hidden_states": "rows"}
            axes[name] = {0: "batch", 1: lengths.get(name, "seq")}
    try:
        with replacing(out) as part, _quiet(), torch.no_grad():
            torch.onnx.export(
                traced.module.eval(),
                traced.arguments,
                str(part),
                dynamo=False,
                dynamic_axes=axes,
                input_names=list(traced.input_names),
                output_names=list(traced.output_names),
                opset_version=opset,
            )
            onnx.checker.check_model(str(part), full_check=True)  # it does write graphs that are no ONNX
    except Exception as error:
        raise ModelError(f"PyTorch's older exporter cannot export {out.name}: {_reason(error)}") from error
    return out


def _reason(error: Exception) -> str:
    """The first line of an error's message, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
