"""ProveRows: which kernels compute every row from the same row alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tvm import relax, tirx
from tvm.relax import op
from tvm.target import Target

from kvc.codegen.lower import fused
from kvc.pipeline import Runner
from kvc_passes.prove_rows import ROWS, ProveRows
from support import Draft, module_of, param, symbol

N = symbol("n")
Body = Callable[[Draft, relax.Var, relax.Var, relax.Var], relax.Expr]
X, WEIGHT, IDS = param("x", [1, N, 8]), param("w", [6, 8]), param("ids", [1, N], "int64")


def proved(body: Body) -> list[bool]:
    """Of every kernel of a graph over x [1, n, 8], w [6, 8] and ids [1, n], whether it works row by row."""
    mod, _ = module_of([X, WEIGHT, IDS], body)
    mod = ProveRows().run(fused(mod, Target("llvm"), Runner())).module
    kernels = [f for f in mod.functions.values() if isinstance(f, tirx.PrimFunc)]
    return [bool(f.attrs.get(ROWS, False)) for f in kernels]


ROW_BY_ROW: dict[str, Body] = {
    "element-wise": lambda e, x, w, i: e(op.nn.gelu(e(op.multiply(x, x)))),
    "softmax": lambda e, x, w, i: e(op.nn.softmax(x, axis=-1)),
    "mean of a row": lambda e, x, w, i: e(op.subtract(x, e(op.mean(x, axis=-1, keepdims=True)))),
    "product": lambda e, x, w, i: e(op.matmul(x, e(op.permute_dims(w)))),
    "rows of a table": lambda e, x, w, i: e(op.take(w, i, axis=0)),
    "columns": lambda e, x, w, i: e(op.strided_slice(x, axes=[2], begin=[2], end=[6])),
    "two rows a token": lambda e, x, w, i: e(
        op.broadcast_to(e(op.expand_dims(e(op.squeeze(x, [0])), 1)), [N, 2, 8])
    ),
    "other rows of a weight": lambda e, x, w, i: e(
        op.add(x, e(op.take(w, e(op.full([], relax.const(3, "int64"), "int64")), axis=0)))
    ),
}

MIXED: dict[str, Body] = {
    "mean over tokens": lambda e, x, w, i: e(op.mean(x, axis=1, keepdims=True)),
    "less the mean over tokens": lambda e, x, w, i: e(op.subtract(x, e(op.mean(x, axis=1, keepdims=True)))),
    "tokens backwards": lambda e, x, w, i: e(op.flip(x, axis=1)),
    "a softmax over tokens": lambda e, x, w, i: e(op.nn.softmax(x, axis=1)),
    "the first token": lambda e, x, w, i: e(op.strided_slice(x, axes=[1], begin=[0], end=[1])),
    "every token with the first": lambda e, x, w, i: e(
        op.add(x, e(op.strided_slice(x, axes=[1], begin=[0], end=[1])))
    ),
    "heads before tokens": lambda e, x, w, i: e(
        op.permute_dims(e(op.reshape(x, [1, N, 2, 4])), [0, 2, 1, 3])
    ),
    "tokens with tokens": lambda e, x, w, i: e(op.matmul(x, e(op.permute_dims(x, [0, 2, 1])))),
    "tokens by index": lambda e, x, w, i: e(op.take(e(op.squeeze(x, [0])), i, axis=0)),
    "which token it is": lambda e, x, w, i: e(
        op.add(e(op.astype(e(op.arange(0, N, 1, "int64")), "float32")), e(op.squeeze(e(op.sum(x, -1)), [0])))
    ),
}


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_kernels_that_work_row_by_row(name: str) -> None:
    found = proved(ROW_BY_ROW[name])
    assert found
    assert all(found[:1])


@pytest.mark.parametrize("name", MIXED)
def test_kernels_that_do_not(name: str) -> None:
    assert not all(proved(MIXED[name]))
