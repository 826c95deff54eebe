"""Expressions that passes write which change the form of an attention's state."""

from __future__ import annotations

import numpy as np
from tvm import relax, tirx

from .graph import dims
from .provenance import Piece
from .rotations import Angles


def shared_columns(builder: relax.BlockBuilder, source: relax.Expr, piece: Piece, n: tirx.Var) -> relax.Expr:
    """The elements of a piece that all heads share, [1, 1, n, width]."""
    last = len(dims(source)) - 1
    end = piece.first + piece.width
    part = builder.emit(relax.op.strided_slice(source, [last], [piece.first], [end], assume_inbound=True))
    return builder.emit(relax.op.reshape(part, shape(1, 1, n, piece.width)))


_FINE = 256.0
"""Parts of a cosine are kept in steps of a 256th, which every float holds, and what is left."""


def angles(
    builder: relax.BlockBuilder,
    given: Angles,
    n: tirx.Var,
    dtype: str,
    values: dict[relax.Var, relax.Expr],
    *,
    fine: bool,
) -> list[relax.Expr]:
    """Cosines and sines as a row keeps them, each [1, 1, n, pairs] of `dtype`; if fine, then the rest."""

    def typed(value: relax.Expr) -> relax.Expr:
        same = str(value.ty.dtype.dtype) == dtype
        return value if same else builder.emit(relax.op.astype(value, dtype))

    found = []
    for var, first in (given.cosine, given.sine):
        angle = Piece(0, given.pairs, var, first, 0)
        found.append(shared_columns(builder, replaced(var, values), angle, n))
    if not fine:
        return [typed(each) for each in found]
    unit = relax.const(_FINE, str(found[0].ty.dtype.dtype))
    scaled = [builder.emit(relax.op.multiply(angle, unit)) for angle in found]
    whole = [builder.emit(relax.op.floor(each)) for each in scaled]
    coarse = [builder.emit(relax.op.divide(each, unit)) for each in whole]
    left = [builder.emit(relax.op.subtract(a, b)) for a, b in zip(scaled, whole)]
    return [typed(each) for each in (*coarse, *left)]


def head_columns(piece: Piece, heads: int, group: int) -> np.ndarray:
    """Columns of a product, head by head."""
    first = piece.first + np.arange(heads) // group * (piece.stride or 0)
    return (first[:, None] + np.arange(piece.width)).reshape(-1).astype(np.int64)


def indices(columns: np.ndarray) -> relax.Expr:
    return relax.const(columns, "int64")


def replaced(value: relax.Expr, values: dict[relax.Var, relax.Expr]) -> relax.Expr:
    return values.get(value, value) if isinstance(value, relax.Var) else value


def shape(*extents: int | tirx.PrimExpr) -> relax.ShapeExpr:
    return relax.ShapeExpr([tirx.IntImm("int64", e) if isinstance(e, int) else e for e in extents])
