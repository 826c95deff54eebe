"""Expressions that passes write which change the form of an attention's state."""

from __future__ import annotations

import numpy as np
from tvm import relax, tirx

from .graph import dims
from .provenance import Piece


def shared_columns(builder: relax.BlockBuilder, source: relax.Expr, piece: Piece, n: tirx.Var) -> relax.Expr:
    """The elements of a piece that all heads share, [1, 1, n, width]."""
    last = len(dims(source)) - 1
    end = piece.first + piece.width
    part = builder.emit(relax.op.strided_slice(source, [last], [piece.first], [end], assume_inbound=True))
    return builder.emit(relax.op.reshape(part, shape(1, 1, n, piece.width)))


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
