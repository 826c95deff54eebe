"""Convolutions in register tiles: against torch in float64, in place, in slices, and what they allocate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import tvm
from kernel_machines import Machine
from test_schedule import fused, tensor
from torch.nn import functional
from tvm import relax, tirx
from tvm.relax import op

from kvc.codegen.workspaces import thread_buffers
from kvc.kernels.emit import compiled
from kvc.kernels.schedule import schedule_elementwise
from kvc_passes.boxes import Access, Box
from kvc_passes.loop_nests import Kernel, overwritten
from kvc_passes.slice_kernels import sliced

_TILE = 192 << 10


@dataclass(frozen=True)
class Case:
    """Extents of x [n, c, h, w] and of the window."""

    x: tuple[int, ...]
    channels: int
    window: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.channels, self.x[1] // self.groups, *self.window)

    def plain(self) -> tirx.PrimFunc:
        """max(conv(x, w) + c + r, 0), as TVM makes it."""
        sizes = functional.conv2d(torch.empty(self.x), torch.empty(self.weight), **self.options).shape
        args = [tensor("x", *self.x), tensor("w", *self.weight), tensor("c", 1, self.channels, 1, 1)]
        args.append(tensor("r", *sizes))
        builder = relax.BlockBuilder()
        with builder.function("main", args):
            with builder.dataflow():
                convolved = builder.emit(
                    op.nn.conv2d(args[0], args[1], self.stride, self.padding, self.dilation, self.groups)
                )
                total = builder.emit(op.add(builder.emit(op.add(convolved, args[2])), args[3]))
                result = builder.emit_output(op.nn.relu(total))
            builder.emit_func_output(result)
        return fused(builder.get())

    @property
    def options(self) -> dict[str, int]:
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    def expected(self, x: np.ndarray, w: np.ndarray, c: np.ndarray, r: np.ndarray) -> np.ndarray:
        x, w, c, r = (torch.from_numpy(a.astype(np.float64)) for a in (x, w, c, r))
        result: np.ndarray = torch.relu(functional.conv2d(x, w, **self.options) + c + r).numpy()
        return result

    @property
    def error(self) -> float:
        """Of sums of positive terms: at most those of their roundings."""
        return (np.prod(self.weight[1:]) + 3) * 2.0**-24


CASES = {
    "padded": Case((1, 5, 13, 19), 12),
    "rows of several vectors, a batch": Case((2, 3, 6, 40), 8, (5, 3), padding=2),
    "strides": Case((1, 4, 15, 15), 6, (7, 7), stride=2, padding=3),
    "one of a stride": Case((1, 6, 14, 14), 7, (1, 1), stride=2, padding=0),
    "dilated": Case((1, 4, 12, 17), 4, dilation=2, padding=2),
    "pixels where they stand": Case((1, 24, 7, 7), 20, (1, 1), padding=0),
    "rows where they stand": Case((1, 700, 30, 10), 4, (1, 1), padding=0),
    "fewer pixels than a vector": Case((1, 9, 2, 3), 4, (1, 1), padding=0),
    "groups": Case((1, 12, 9, 9), 8, groups=4),
    "every channel for itself": Case((1, 10, 9, 9), 10, groups=10),
    "parts of the columns": Case((1, 260, 2, 128), 3, padding=1),
}


def arrays(func: tirx.PrimFunc) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.random([int(n) for n in buffer.shape], np.float32) for buffer in func.params]


def has_tiles(func: tirx.PrimFunc) -> bool:
    return "sums" in func.script()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tiles_against_float64(machine: Machine, case: Case) -> None:
    func = case.plain()
    scheduled = schedule_elementwise(func, machine.traits, True)
    assert has_tiles(scheduled)
    x, w, c, r, y = arrays(func)
    got = machine.call(compiled(scheduled, machine.target), x, w, c, r, y)[-1]
    np.testing.assert_allclose(got, case.expected(x, w, c, r), rtol=case.error)


def test_what_stands_in_rows_is_not_copied(machine: Machine) -> None:
    for name, copied in (("padded", True), ("one of a stride", True), ("pixels where they stand", False)):
        scheduled = schedule_elementwise(CASES[name].plain(), machine.traits, False)
        assert ("tile" in scheduled.script()) == copied


def test_over_what_it_adds(machine: Machine) -> None:
    case = CASES["padded"]
    over = overwritten(case.plain(), 3)
    scheduled = schedule_elementwise(over, machine.traits, True)
    assert has_tiles(scheduled)
    x, w, c, r = arrays(over)
    got = machine.call(compiled(scheduled, machine.target), x, w, c, r)[-1]
    np.testing.assert_allclose(got, case.expected(x, w, c, r), rtol=case.error)


@pytest.mark.parametrize("into_whole", [False, True])
def test_a_slice_has_the_same_numbers(machine: Machine, into_whole: bool) -> None:
    case = CASES["strides"]
    func = case.plain()
    inputs = arrays(func)
    every = machine.call(compiled(schedule_elementwise(func, machine.traits, True), machine.target), *inputs)[
        -1
    ]
    kernel = Kernel.of(func)
    access = Access.of(kernel)
    assert kernel is not None
    assert access is not None
    box: Box = ((0, 1), (0, 6), (2, 5), (0, 8))
    held = [access.needed(box).buffers.get(buffer) for buffer in kernel.inputs]
    part = schedule_elementwise(sliced(access, box, held, into_whole), machine.traits, True)
    assert has_tiles(part)
    cut = [a[tuple(slice(*r) for r in own or ())] for a, own in zip(inputs[:-1], held, strict=True)]
    output = np.zeros_like(every) if into_whole else np.zeros_like(every[:, :, 2:5])
    got = machine.call(compiled(part, machine.target), *cut, output)[-1]
    np.testing.assert_array_equal(got[:, :, 2:5] if into_whole else got, every[:, :, 2:5])
    assert not into_whole or not got[:, :, 5:].any()


def test_buffers_are_counted_and_small(machine: Machine) -> None:
    for case in (*CASES.values(), Case((1, 512, 14, 14), 512, stride=2), Case((1, 64, 56, 56), 64)):
        scheduled = schedule_elementwise(case.plain(), machine.traits, True)
        counted = thread_buffers([tvm.IRModule({"main": scheduled})])
        assert 0 < counted[0] <= _TILE + 64


def test_other_forms_stay_without_tiles(machine: Machine) -> None:
    n = tirx.Var("n", "int64")
    args = [tensor("x", n, 4, 9, 9), tensor("w", 4, 4, 3, 3)]
    builder = relax.BlockBuilder()
    with builder.function("main", args):
        with builder.dataflow():
            result = builder.emit_output(op.nn.conv2d(*args, padding=1))
        builder.emit_func_output(result)
    stepping = Case((1, 4, 21, 21), 4, stride=2, dilation=2, padding=2)
    deep = Case((1, 9000, 3, 3), 2)
    for func in (fused(builder.get()), stepping.plain(), deep.plain()):
        assert not has_tiles(schedule_elementwise(func, machine.traits, False))
