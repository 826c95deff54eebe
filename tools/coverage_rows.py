"""The rows of docs/coverage.md: which model, written by which exporter, with numbers of which type."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
FIXTURES: Final = ROOT / "tests" / "fixtures"

EXPORTERS: Final = (
    "dynamo-20",
    "dynamo-20-past",
    "dynamo-23",
    "dynamo-23-past",
    "torchscript-17",
    "torchscript-17-past",
)
MORE_OPSETS: Final = ("dynamo-18", "dynamo-18-past", "dynamo-24", "dynamo-24-past")
FOREIGN: Final = ("optimum", "genai")
"""Exporters that need an environment of their own; their files are in tests/fixtures."""

FLOATS: Final = ("float32", "float16", "bfloat16")
NBITS: Final = tuple(
    f"nbits{bits}-{block}{suffix}"
    for bits, block, suffix in [
        *itertools.product((4, 8), (16, 32, 64, 128), ("", "-zero")),
        (4, 256, ""),
    ]
)
QDQ: Final = tuple(
    f"qdq-{stored}-{grain}"
    for stored, grain in itertools.product(("int8", "uint8", "int4", "uint4"), ("tensor", "channel", "block"))
)
OTHERS: Final = ("dynamic-tensor", "dynamic-channel", "static")
QUANTIZED: Final = (*NBITS, *QDQ, *OTHERS, "float16+nbits4-32", "float16+nbits4-32-zero")
"""`nbits<bits>-<block>[-zero]`: MatMulNBits; `-zero`: with zero points. `qdq-<type>-<grain>`: weights behind
DequantizeLinear. `dynamic`, `static`: also activations are integers. `float16+`: of a float16 graph."""

HALF_FAMILIES: Final = ("llama", "gpt2", "gemma2", "bloom", "gpt-oss", "deepseek")
"""Families in 16-bit floats: of every kind of attention one."""
QUANTIZED_FAMILIES: Final = ("gpt2", "gemma2", "mixtral")
SOME_QUANTIZED: Final = ("nbits4-32", "nbits8-64-zero", "qdq-int8-channel", "qdq-uint4-block")
"""What more families than one are quantized to."""


@dataclass(frozen=True)
class Row:
    """One model file to cover."""

    family: str
    exporter: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.family}/{self.exporter}/{self.dtype}"

    @classmethod
    def parse(cls, text: str) -> Row:
        """The inverse of `str`.

        Raises:
            ValueError: not three parts.
        """
        family, exporter, dtype = text.split("/")
        return cls(family, exporter, dtype)

    @property
    def with_past(self) -> bool:
        return self.exporter.endswith("-past") or self.exporter in FOREIGN

    @property
    def width(self) -> str:
        """The float type that the graph computes in."""
        for dtype in ("float16", "bfloat16"):
            if self.dtype.startswith(dtype):
                return dtype
        return "float16" if self.dtype.endswith("-cuda") else "float32"


def fixture(row: Row) -> Path:
    """Where a foreign exporter's file is committed."""
    suffix = "" if row.dtype == "float32" else f"-{row.dtype}"
    return FIXTURES / row.exporter / f"{row.family}{suffix}.onnx"


def all_rows() -> list[Row]:
    """Every row, float32 first."""
    from kvc_models import FAMILIES

    rows = [Row(f, e, "float32") for f, e in itertools.product(FAMILIES, EXPORTERS)]
    rows += [Row(f, e, "float32") for f, e in itertools.product(("llama", "gpt2", "gemma2"), MORE_OPSETS)]
    halves = itertools.product(HALF_FAMILIES, ("dynamo-20-past", "dynamo-23"), ("float16", "bfloat16"))
    rows += [Row(*each) for each in halves]
    rows += [Row("llama", "dynamo-21", dtype) for dtype in QUANTIZED]
    rows += [Row(f, "dynamo-21", dtype) for f, dtype in itertools.product(QUANTIZED_FAMILIES, SOME_QUANTIZED)]
    rows += [Row("llama", "dynamo-21-past", dtype) for dtype in ("nbits4-32", "qdq-int8-channel")]
    return rows + foreign_rows()


def foreign_rows() -> list[Row]:
    """A row for every committed fixture."""
    rows = []
    for exporter in FOREIGN:
        for file in sorted((FIXTURES / exporter).glob("*.onnx")):
            family, _, dtype = file.stem.partition("-")
            rows.append(Row(family, exporter, dtype or "float32"))
    return rows


def model_file(row: Row, work: Path) -> Path:
    """The row's ONNX file, in a folder of `work` that belongs to the versions in use; written once.

    Raises:
        ModelError: the exporter or the quantizer cannot write it.
    """
    from kvc_models import export_tiny

    if row.exporter in FOREIGN:
        return fixture(row)
    out = work / f"models-{_versions()}" / (str(row).replace("/", "-") + ".onnx")
    if out.exists():
        return out
    part = out.with_suffix(f".{os.getpid()}.onnx")
    if row.dtype in FLOATS:
        exporter, opset, *_ = row.exporter.split("-")
        options: dict[str, Any] = {"exporter": exporter, "opset": int(opset), "dtype": row.dtype}
        export_tiny(row.family, part, with_past=row.with_past, **options)
        part.with_suffix(".assets").replace(out.with_suffix(".assets"))
    else:
        base = model_file(Row(row.family, row.exporter, row.width), work)
        _quantize(base, part, row.dtype.partition("+")[2] or row.dtype)
    part.replace(out)
    return out


def _quantize(base: Path, out: Path, how: str) -> None:
    from kvc_models import quantize
    from kvc_models.families import VOCAB

    kind, *options = how.split("-")
    if kind.startswith("nbits"):
        quantize.matmul_nbits(
            base,
            out,
            bits=int(kind.removeprefix("nbits")),
            block=int(options[0]),
            symmetric="zero" not in options,
            accuracy=1,
        )
    elif kind == "qdq":
        stored: Any = options[0]
        grain: Any = options[1]
        quantize.qdq_weights(base, out, stored=stored, grain=grain)
    elif kind == "dynamic":
        quantize.dynamic(base, out, per_channel=options == ["channel"])
    else:
        quantize.static(base, out, vocab=VOCAB)


def _versions() -> str:
    """Names what the files depend on."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "models" / "kvc_models").glob("*.py")):
        if file.stem in ("tiny", "export", "families", "adapt", "quantize"):
            digest.update(file.read_bytes())
    for package in ("torch", "transformers", "onnxscript", "onnxruntime"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()[:12]
