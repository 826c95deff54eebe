"""Computations of one kernel, for the tests of boxes and of slices."""

from __future__ import annotations

from typing import Any

from tvm import te, topi

from kvc_passes.boxes import Access
from kvc_passes.loop_nests import Kernel

Made = tuple[list[Any], Any]
"""Inputs and the output of a computation."""


def access(made: Made) -> Access:
    inputs, output = made
    found = Access.of(Kernel.of(te.create_prim_func([*inputs, output])))
    assert found is not None
    return found


def tensor(*shape: int, dtype: str = "float32") -> Any:
    return te.placeholder(shape, dtype, name="x")


def elementwise() -> Made:
    x, y = tensor(8, 6), tensor(6)
    return [x, y], te.compute((8, 6), lambda i, j: x[i, j] * 2.0 + y[j])


def matmul() -> Made:
    a, b = tensor(8, 5), tensor(5, 6)
    return [a, b], topi.matmul(a, b)


def softmax() -> Made:
    x = tensor(3, 8, 6)
    return [x], topi.nn.softmax(x)


def layer_norm() -> Made:
    x, scale, shift = tensor(3, 8, 6), tensor(6), tensor(6)
    return [x, scale, shift], topi.nn.layer_norm(x, scale, shift, [2], 1e-5)


def convolution(
    size: int = 16, kernel: int = 3, stride: int = 1, padding: int = 1, dilation: int = 1
) -> Made:
    x, w = tensor(1, 2, size, size), tensor(4, 2, kernel, kernel)
    return [x, w], topi.nn.conv2d(x, w, stride, padding, dilation)


def pool() -> Made:
    x = tensor(1, 2, 8, 8)
    return [x], topi.nn.pool2d(x, [2, 2], [2, 2], [1, 1], [0, 0, 0, 0], "max")


def concatenation() -> Made:
    x, y = tensor(2, 4, 8), tensor(2, 3, 8)
    return [x, y], topi.concatenate([x, y], 1)


def upsampling() -> Made:
    x = tensor(1, 2, 8, 8)
    return [x], te.compute((1, 2, 16, 16), lambda n, c, i, j: x[n, c, i // 2, j // 2])


def heads_apart() -> Made:
    """[rows, heads * 4] -> [heads, rows, 4]."""
    x = tensor(8, 12)
    apart = topi.reshape(x, (8, 3, 4))
    return [x], topi.transpose(apart, [1, 0, 2])


def gather() -> Made:
    table, ids = tensor(50, 6), tensor(8, dtype="int64")
    return [table, ids], te.compute((8, 6), lambda i, j: table[ids[i], j])


def turned() -> Made:
    x = tensor(8)
    return [x], te.compute((8,), lambda i: x[7 - i])
