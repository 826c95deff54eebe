"""Kernels for a box of the output compute the elements that the kernel for all of it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
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
    turned,
    upsampling,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import tirx

from kvc_passes.boxes import Access, Box, extents
from kvc_passes.loop_nests import Kernel
from kvc_passes.slice_kernels import sliced

MAKERS: list[Callable[[], Made]] = [
    elementwise,
    matmul,
    softmax,
    layer_norm,
    convolution,
    pool,
    concatenation,
    upsampling,
    heads_apart,
    gather,
    turned,
]


def shape_of(buffer: Any) -> tuple[int, ...]:
    return tuple(int(dim) for dim in buffer.shape)


def arrays(kernel: Access) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    found = []
    for buffer in kernel.kernel.inputs:
        size = shape_of(buffer)
        values = rng.integers(0, 50, size) if "int" in str(buffer.dtype) else rng.standard_normal(size)
        found.append(values.astype(str(buffer.dtype)))
    return found


def run(function: tirx.PrimFunc, given: list[np.ndarray], output: np.ndarray) -> np.ndarray:
    """The output, which holds `output` before."""
    target = tvm.target.Target({"kind": "llvm", "opt-level": 0})
    module = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target)
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in (*given, output)]
    module["main"](*tensors)
    result: np.ndarray = tensors[-1].numpy()
    return result


def at(array: np.ndarray, box: Box) -> np.ndarray:
    return array[tuple(slice(*part) for part in box)]


def check(kernel: Access, box: Box) -> None:
    """A slice from parts of the inputs, and one from the whole inputs into the whole output."""
    shape = shape_of(kernel.kernel.output)
    given = arrays(kernel)
    expected = run(kernel.kernel.function, given, np.zeros(shape, np.float32))
    needed = kernel.needed(box)
    held = [needed.buffers.get(buffer) for buffer in kernel.kernel.inputs]
    part = sliced(kernel, box, held, False)
    assert Kernel.of(part) is not None
    parts = [array if b is None else at(array, b) for array, b in zip(given, held, strict=True)]
    np.testing.assert_array_equal(run(part, parts, np.zeros(extents(box), np.float32)), at(expected, box))
    into = sliced(kernel, box, [None] * len(given), True)
    wanted = np.full(shape, 7, np.float32)
    at(wanted, box)[...] = at(expected, box)
    np.testing.assert_array_equal(run(into, given, np.full(shape, 7, np.float32)), wanted)


@pytest.mark.parametrize("make", MAKERS)
def test_slices_are_parts_of_the_whole(make: Callable[[], Made]) -> None:
    kernel = access(make())
    shape = shape_of(kernel.kernel.output)
    axis = int(np.argmax(shape))
    for low, high in ((0, 2), (1, shape[axis])):
        box = [(0, size) for size in shape]
        box[axis] = (low, high)
        check(kernel, tuple(box))


def test_a_slice_takes_no_more_than_its_box() -> None:
    """Buffers inside, such as padded inputs, have the size of the slice."""
    kernel = access(convolution())
    box = ((0, 1), (0, 4), (4, 8), (0, 16))
    part = Kernel.of(sliced(kernel, box, [((0, 1), (0, 2), (3, 9), (0, 16)), None], False))
    assert part is not None
    assert shape_of(part.output) == (1, 4, 4, 16)
    assert [shape_of(buffer) for buffer in part.locals] == [(1, 2, 6, 18)]
    assert shape_of(part.inputs[0]) == (1, 2, 6, 16)


def test_an_element_wise_slice_may_overwrite_its_input() -> None:
    kernel = access(elementwise())
    box = ((2, 4), (0, 6))
    part = Kernel.of(sliced(kernel, box, [box, None], False))
    assert part is not None
    assert part.overwritable() == (0,)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_convolution(data: st.DataObject) -> None:
    size, kernel = data.draw(st.integers(5, 12)), data.draw(st.integers(1, 4))
    stride, padding = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    dilation = data.draw(st.integers(1, 2 if size + 2 * padding > 2 * kernel else 1))
    made = access(convolution(size, kernel, stride, padding, dilation))
    shape = shape_of(made.kernel.output)
    box = []
    for length in shape:
        low = data.draw(st.integers(0, length - 1))
        box.append((low, data.draw(st.integers(low + 1, length))))
    check(made, tuple(box))
