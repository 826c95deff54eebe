"""Keys and values as they stand in pages: floats, or codes with a scale for every token and KV head.

int8 codes are -127 .. 127; int4 codes -7 .. 7 plus 8, two to a byte (elements i and i + dim / 2). fp8 codes
are the bits of e4m3 (OCP 8-bit floating point, 2023): a float16's, 2^-8 times as large, without the last 7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tvm import tirx

from .emit import Emitter, Expr, f32, fold, i64, lanes_of, narrowed, splat, vec, widened

_LARGEST: Final = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}
_FP8_UNIT: Final = 2.0**8


@dataclass(frozen=True)
class Stored:
    """A form of keys and values: `name` of the codes, None for floats of `kv_dtype`."""

    name: str | None
    kv_dtype: str

    @property
    def dtype(self) -> str:
        """Of a page's elements."""
        return {None: self.kv_dtype, "int8": "int8"}.get(self.name, "uint8")

    @property
    def parts(self) -> int:
        """Elements that share a byte."""
        return 2 if self.name == "int4" else 1

    def element(self, raw: Expr, part: int) -> Expr:
        """Element `part` of what was loaded, float32, to be multiplied with `scale`."""
        lanes = lanes_of(raw)
        if self.name is None:
            return widened(raw)
        if self.name == "int8":
            return tirx.Cast(_of("float32", lanes), raw)
        if self.name == "fp8":
            code = tirx.Cast(_of("uint16", lanes), raw)
            bits = ((code & _int(0x80, code)) << _int(8, code)) | ((code & _int(0x7F, code)) << _int(7, code))
            return tirx.Cast(_of("float32", lanes), tirx.reinterpret(_of("float16", lanes), bits))
        code = tirx.Cast(_of("int32", lanes), raw)
        code = (code >> _int(4 * part, code)) & _int(15, code)
        return tirx.Cast(_of("float32", lanes), code) - splat(f32(8), lanes)

    def scale(self, raw: Expr) -> Expr:
        """The factor of elements, from a page's scale."""
        factor = _FP8_UNIT if self.name == "fp8" else 1.0
        return widened(raw) * splat(f32(factor), lanes_of(raw))

    def scale_of(self, e: Emitter, row: Callable[[int, int], Expr], parts: Sequence[tuple[int, int]]) -> Expr:
        """The scale of a row of numbers, `row(start, width)`: the bits of a bfloat16."""
        largest = f32(0)
        for start, width in parts:
            value = e.bind("x", row(start, width))
            largest = tirx.Max(largest, fold(tirx.Max(value, splat(f32(0), width) - value), tirx.Max))
        unit = e.bind("unit", largest * f32(1 / _LARGEST[str(self.name)]))
        return e.bind("scale", tirx.reinterpret("uint16", narrowed(unit, "bfloat16")))

    def code(self, elements: Sequence[Expr], inverse: Expr) -> Expr:
        """What is stored of float32 numbers that share a byte; `inverse` is 1 over their scale, or 0."""
        codes = [self._code(x * splat(inverse, lanes_of(x))) for x in elements]
        return codes[0] if len(codes) == 1 else codes[0] | (codes[1] << _int(4, codes[1]))

    def _code(self, x: Expr) -> Expr:
        lanes, largest = lanes_of(x), _LARGEST[str(self.name)]
        x = tirx.Max(tirx.Min(x, splat(f32(largest), lanes)), splat(f32(-largest), lanes))
        if self.name == "fp8":
            half = narrowed(x * splat(f32(1 / _FP8_UNIT), lanes), "float16")
            bits = tirx.reinterpret(_of("uint16", lanes), half)
            size = bits & _int(0x7FFF, bits)
            even = (size >> _int(7, bits)) & _int(1, bits)
            rounded = (size + _int(0x3F, bits) + even) >> _int(7, bits)
            return tirx.Cast(_of("uint8", lanes), rounded | ((bits >> _int(8, bits)) & _int(0x80, bits)))
        whole = tirx.floor(x + splat(f32(0.5), lanes))
        if self.name == "int8":
            return tirx.Cast(_of("int8", lanes), whole)
        return tirx.Cast(_of("uint8", lanes), whole + splat(f32(8), lanes))


def inverse_of(e: Emitter, scale: Expr) -> Expr:
    """1 over a scale, given by its bits; 0 for one of 0."""
    wide = e.bind("wide", widened(tirx.reinterpret("bfloat16", scale)))
    return e.bind("inverse", tirx.Select(wide > f32(0), f32(1) / wide, f32(0)))


def row_of(source: Any, at: Sequence[Expr]) -> Callable[[int, int], Expr]:
    """Vectors of the last axis of `source`."""
    return lambda start, width: source[(*at, vec(i64(start), width))]


def _of(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _int(value: int, like: Expr) -> Expr:
    name, _, count = str(like.ty.dtype).partition("x")
    return splat(tirx.const(value, name), int(count or 1))
