"""Constant matrices behind products: which parameters they are made of, in which format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tvm import relax
from tvm.ir import GenericConst

from .graph import Graph, dims, op_name, operands, static
from .markers import DEQUANTIZE, Dequantize, HeadProduct, attributes, tensors
from .weight_format import FLOAT32, WeightFormat

_FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Source:
    """Parameters of the imported model, as rows of a weight.

    Attributes:
        name: the parameter that holds the numbers or codes.
        columns: its share of the product's columns.
        transposed: it stands as [depth, columns], not [columns, depth].
        picked: its columns that are meant, as (first, count), () for all.
        coded: how codes become numbers, None for floats.
        scales, zeros: the parameters of codes, "" for none.
    """

    name: str
    columns: int = 0
    transposed: bool = False
    coded: Dequantize | None = None
    scales: str = ""
    zeros: str = ""
    picked: tuple[tuple[int, int], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.name, self.scales, self.zeros) if name)


@dataclass(frozen=True)
class PackedWeight:
    """A weight of the compiled model: where its numbers come from.

    Attributes:
        sources: one parameter, or those whose products are computed together.
        depth: the weight as a matrix is [columns, depth], y = x @ w^T; 0 for a weight kept as it is.
        format: how its numbers are stored.
    """

    sources: tuple[Source, ...]
    depth: int = 0
    format: WeightFormat = FLOAT32

    @classmethod
    def kept(cls, name: str) -> PackedWeight:
        """A weight that is stored as it is."""
        return cls((Source(name),))

    @property
    def columns(self) -> int:
        return sum(source.columns for source in self.sources)


@dataclass(frozen=True)
class HeadWeight:
    """A weight of the compiled model that is a matrix for every KV head; see markers.HeadProduct.

    Head g's rows are first + g * stride .. + width - 1 of the source [columns, depth], of which
    y_g = x_g @ w_g^T is made; absorbed: y_g = x_g @ w_g.
    """

    source: Source
    depth: int
    heads: int
    width: int
    first: int
    stride: int
    absorbed: bool
    format: WeightFormat = FLOAT32

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source,)

    @property
    def columns(self) -> int:
        """Elements of y_g."""
        return self.depth if self.absorbed else self.width

    @property
    def inner(self) -> int:
        """Elements of x_g."""
        return self.width if self.absorbed else self.depth


@dataclass(frozen=True)
class WeightPart:
    """One tensor of a packed weight: its data (0), scales (1) or zeros (2)."""

    weight: PackedWeight | HeadWeight
    part: int = 0


def weight_of(graph: Graph, value: relax.Expr) -> PackedWeight | None:
    """The weight [depth, columns] behind the right side of a product, None when it is none."""
    if len(dims(value)) != 2:
        return None
    joined = graph.resolve(value)
    is_joined = op_name(joined) == "concat" and int(joined.attrs.axis) % 2 == 1
    parts = [_source(graph, part) for part in (operands(joined) if is_joined else [value])]
    depth = static(dims(value)[0])
    known = [part for part in parts if part is not None]
    if not depth or len(known) != len(parts) or len({format for _, format in known}) != 1:
        return None
    return PackedWeight(tuple(source for source, _ in known), depth, known[0][1])


def table_of(graph: Graph, value: relax.Expr) -> PackedWeight | None:
    """The weight [rows, depth] that a lookup reads rows of, None when it is none."""
    if len(dims(value)) != 2:
        return None
    rows, depth = (static(d) for d in dims(value))
    table, transposed = _widened(graph, value), False
    swap = graph.resolve(table)
    if op_name(swap) == "permute_dims":
        table, transposed = swap.args[0], True
    found = _rows(graph, table, rows or 0, transposed)
    return PackedWeight((found[0],), depth, found[1]) if found is not None and depth else None


def head_weight_of(graph: Graph, value: relax.Expr, attrs: HeadProduct) -> HeadWeight | None:
    """The weight [depth, columns] behind a product a head, None when it is none, or codes."""
    found, depth = _source(graph, value), static(dims(value)[0])
    if found is None or not depth or found[1].coded or found[0].picked:
        return None
    heads = attrs.heads // attrs.group
    return HeadWeight(
        found[0], depth, heads, attrs.width, attrs.first, attrs.stride, attrs.absorbed, found[1]
    )


def _source(graph: Graph, value: relax.Expr) -> tuple[Source, WeightFormat] | None:
    """The source behind a factor [depth, columns]."""
    columns = static(dims(value)[1]) if len(dims(value)) == 2 else None
    if columns is None:
        return None
    weight, transposed = _widened(graph, value), True
    choice = graph.resolve(weight)
    if op_name(choice) == "take" and choice.attrs.axis is not None and int(choice.attrs.axis) == 1:
        index = graph.resolve(choice.args[1])
        found = _source(graph, choice.args[0]) if isinstance(index, GenericConst) else None
        if found is None or found[0].picked or len(dims(index)) != 1:
            return None
        picked = runs([int(i) for i in index.value.numpy()])
        return replace(found[0], columns=columns, picked=picked), found[1]
    swap = graph.resolve(weight)
    if op_name(swap) == "permute_dims" and len(dims(weight)) == 2:
        weight, transposed = swap.args[0], False
    return _rows(graph, weight, columns, transposed)


def _rows(
    graph: Graph, value: relax.Expr, columns: int, transposed: bool
) -> tuple[Source, WeightFormat] | None:
    weight = _widened(graph, value)
    if weight in graph.function.params:
        dtype = str(weight.ty.dtype.dtype)
        return (Source(weight.name, columns, transposed), WeightFormat(dtype)) if dtype in _FLOATS else None  # type: ignore[arg-type]
    marker = graph.resolve(weight)
    if op_name(marker) != DEQUANTIZE:
        return None
    attrs, names = attributes(marker, Dequantize), [graph.alias(t) for t in tensors(marker)]
    if all(math.prod(static(d) or 0 for d in dims(n)) == 1 for n in names[1:]):  # one scale for all
        axis: Literal[0, 1] = 0 if transposed else 1
        attrs = replace(attrs, axis=axis, block=attrs.columns if axis else attrs.rows, zeros_stored=0)
    if attrs.axis != (0 if transposed else 1) or any(n not in graph.function.params for n in names):
        return None
    codes, scales, *zeros = names
    source = Source(codes.name, columns, transposed, attrs, scales.name, zeros[0].name if zeros else "")
    return source, _format(attrs, str(scales.ty.dtype.dtype), bool(zeros))


def _format(attrs: Dequantize, scales: Any, zeros: bool) -> WeightFormat:
    """Codes are made unsigned when they are packed: what stood for zero is then the middle, or is stored."""
    middle = attrs.middle + ((1 << (attrs.bits - 1)) if attrs.signed else 0)
    own = zeros or middle != 1 << (attrs.bits - 1)
    return WeightFormat("uint4" if attrs.bits == 4 else "uint8", attrs.block, scales, own)


def runs(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Numbers as (first, count) of consecutive ones."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == sum(found[-1]):
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((number, 1))
    return tuple(found)


def _widened(graph: Graph, value: relax.Expr) -> relax.Expr:
    """`value` without renamings and casts between floats."""
    value = graph.alias(value)
    while op_name(call := graph.resolve(value)) == "astype" and "float" in str(call.args[0].ty.dtype.dtype):
        value = graph.alias(call.args[0])
    return value
