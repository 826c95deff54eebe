"""Boxes of a kernel's inputs: what a box of its output is computed from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from computations import (
    Made,
    access,
    concatenation,
    convolution,
    elementwise,
    gather,
    heads_apart,
    layer_norm,
    matmul,
    pool,
    softmax,
    tensor,
    turned,
    upsampling,
)
from hypothesis import given
from hypothesis import strategies as st
from tvm import te, tirx
from tvm.tirx import if_then_else

from kvc_passes.boxes import Access, Box, reshaped
from kvc_passes.loop_nests import Kernel


def boxes(made: Made, box: Box) -> list[Box | None]:
    """Of every input the box that a box of the output takes."""
    kernel = access(made)
    needed = kernel.needed(box)
    return [needed.buffers.get(buffer) for buffer in kernel.kernel.inputs]


CASES: list[tuple[Callable[[], Made], Box, list[Box | None]]] = [
    (elementwise, ((2, 4), (0, 6)), [((2, 4), (0, 6)), ((0, 6),)]),
    (elementwise, ((0, 8), (3, 5)), [((0, 8), (3, 5)), ((3, 5),)]),
    (matmul, ((2, 4), (0, 6)), [((2, 4), (0, 5)), ((0, 5), (0, 6))]),
    (matmul, ((0, 8), (1, 3)), [((0, 8), (0, 5)), ((0, 5), (1, 3))]),
    (softmax, ((0, 3), (2, 4), (0, 6)), [((0, 3), (2, 4), (0, 6))]),
    (softmax, ((0, 3), (0, 8), (2, 4)), [((0, 3), (0, 8), (0, 6))]),
    (layer_norm, ((0, 3), (2, 4), (0, 6)), [((0, 3), (2, 4), (0, 6)), ((0, 6),), ((0, 6),)]),
    (convolution, ((0, 1), (0, 4), (4, 8), (0, 16)), [((0, 1), (0, 2), (3, 9), (0, 16)), None]),
    (convolution, ((0, 1), (0, 4), (0, 4), (0, 16)), [((0, 1), (0, 2), (0, 5), (0, 16)), None]),
    (convolution, ((0, 1), (1, 2), (12, 16), (5, 6)), [((0, 1), (0, 2), (11, 16), (4, 7)), None]),
    (pool, ((0, 1), (0, 2), (1, 3), (0, 4)), [((0, 1), (0, 2), (2, 6), (0, 8))]),
    (concatenation, ((0, 2), (0, 7), (2, 4)), [((0, 2), (0, 4), (2, 4)), ((0, 2), (0, 3), (2, 4))]),
    (upsampling, ((0, 1), (0, 2), (4, 8), (0, 16)), [((0, 1), (0, 2), (2, 4), (0, 8))]),
    (heads_apart, ((1, 2), (0, 8), (0, 4)), [((0, 8), (4, 8))]),
    (heads_apart, ((0, 3), (2, 5), (0, 4)), [((2, 5), (0, 12))]),
    (gather, ((2, 4), (0, 3)), [((0, 50), (0, 3)), ((2, 4),)]),
    (turned, ((0, 2),), [((6, 8),)]),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_expected_boxes(case: int) -> None:
    make, box, expected = CASES[case]
    found = boxes(make(), box)
    for got, wanted in zip(found, expected, strict=True):
        assert wanted is None or got == wanted


def test_a_convolution_with_stride() -> None:
    made = convolution(stride=2)
    first, weights = boxes(made, ((0, 1), (1, 3), (2, 4), (0, 8)))
    assert first == ((0, 1), (0, 2), (3, 8), (0, 16))
    assert weights == ((1, 3), (0, 2), (0, 3), (0, 3))


def scan() -> tirx.PrimFunc:
    """A nest that reads its own earlier elements."""
    from tvm.script import tirx as T

    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.Buffer((T.int64(8),), "float32"), y: T.Buffer((T.int64(8),), "float32")) -> None:
        for i in range(T.int64(8)):
            with T.sblock("y"):
                v = T.axis.spatial(T.int64(8), i)
                T.reads(x[v], y[T.max(v - T.int64(1), T.int64(0))])
                T.writes(y[v])
                y[v] = x[v] + y[T.max(v - T.int64(1), T.int64(0))]

    return kernel


def symbolic() -> tirx.PrimFunc:
    x = te.placeholder((tirx.Var("n", "int64"), 4), name="x")
    return te.create_prim_func([x, te.compute(x.shape, lambda i, j: x[i, j] + 1.0)])


def read_again() -> tirx.PrimFunc:
    """The output is read by a nest of its own kernel."""
    x = tensor(8)
    y = te.compute((8,), lambda i: x[i] + 1.0, name="y")
    return te.create_prim_func([x, te.compute((8,), lambda i: y[i] + 1.0), y])


@pytest.mark.parametrize("make", [scan, symbolic, read_again])
def test_other_kernels_are_left_alone(make: Callable[[], tirx.PrimFunc]) -> None:
    assert Access.of(Kernel.of(make())) is None


def test_what_is_not_known_of_an_index_is_all() -> None:
    x = tensor(8)
    squares = te.compute((3,), lambda i: if_then_else(i * i < 8, x[i * i], 0.0))
    low, high = boxes(([x], squares), ((1, 3),))[0][0]  # type: ignore[index]
    assert low <= 1
    assert high >= 5
    floats = te.compute((8,), lambda i: x[(i.astype("float32") * 0.5).astype("int64")])
    assert boxes(([x], floats), ((1, 3),)) == [((0, 8),)]


RESHAPES: list[tuple[Box, tuple[int, ...], tuple[int, ...], Box | None]] = [
    (((0, 1), (2, 4), (0, 6)), (1, 8, 6), (8, 6), ((2, 4), (0, 6))),
    (((2, 4), (0, 6)), (8, 6), (1, 8, 6), ((0, 1), (2, 4), (0, 6))),
    (((0, 8), (1, 2), (0, 4)), (8, 3, 4), (8, 12), ((0, 8), (4, 8))),
    (((0, 8), (4, 12)), (8, 12), (8, 3, 4), ((0, 8), (1, 3), (0, 4))),
    (((0, 8), (4, 10)), (8, 12), (8, 3, 4), None),
    (((0, 8), (0, 3), (1, 2)), (8, 3, 4), (8, 12), None),
    (((2, 4),), (8,), (8, 1), ((2, 4), (0, 1))),
    (((2, 4), (0, 1)), (8, 1), (8,), ((2, 4),)),
    (((0, 2), (0, 4)), (8, 4), (2, 16), ((0, 1), (0, 8))),
]


@pytest.mark.parametrize("case", range(len(RESHAPES)))
def test_boxes_of_reshapes(case: int) -> None:
    box, shape, source, expected = RESHAPES[case]
    assert reshaped(box, shape, source) == expected


SHAPES = [(24,), (2, 12), (4, 6), (2, 3, 4), (1, 24), (4, 1, 6), (3, 8), (2, 2, 6), (24, 1)]


@given(data=st.data())
def test_a_box_of_a_reshape_has_the_same_elements_in_the_same_order(data: st.DataObject) -> None:
    shape, source = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(SHAPES))
    lows = [data.draw(st.integers(0, size - 1)) for size in shape]
    box = tuple((low, data.draw(st.integers(low + 1, size))) for low, size in zip(lows, shape))
    found = reshaped(box, shape, source)
    if found is None:
        return
    numbers = np.arange(24)
    part = numbers.reshape(source)[tuple(slice(*r) for r in found)].reshape([h - low for low, h in box])
    np.testing.assert_array_equal(part, numbers.reshape(shape)[tuple(slice(*r) for r in box)])
