"""Functions of the host that launch Triton kernels, and how they are made again for an architecture.

A launch is `call_packed(name, *arguments, null, null, threads, grid x, y, z, shared)`, the form in which
TVM's CUDA modules are called; the two pointers are Triton's scratch memory, which kvc's kernels do not use.
How much shared memory a kernel takes is known when it is compiled: until then SHARED stands there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tvm import IRModule, tirx
from tvm.ir import Call, StringImm
from tvm.tirx import PrimFunc
from tvm_ffi import structural_walk

from kvc_passes.loop_nests import OVERWRITTEN, overwritten

from ..emit import Emitter, Expr, i64
from . import boxes
from .device import DeviceKernel
from .knobs import DEFAULTS, Knobs

SHARED = -1
"""Stands for the bytes of shared memory of a launch until its kernel is compiled."""

_PROMOTION = 2
"""Boxes are read in 128 bytes through the second-level cache (CUtensorMapL2promotion)."""

VARIANT = "kvc.variant"
"""The attribute of a function that names how it is made."""

Make = Callable[[int, Knobs], PrimFunc]
"""Makes a function for an architecture, with tuned parameters."""


@dataclass(frozen=True)
class Matrix:
    """What boxes are copied of: `rows` rows of `width` elements in a buffer."""

    buffer: Any
    rows: Expr
    width: int


@dataclass
class Variants:
    """What the functions of a compilation launch, and how each is made for an architecture such as 90.

    Attributes:
        arch: the architecture that functions are made for at first; they run on later ones, too.
        knobs: what of the kernels was tuned.
        kernels: the kernels of all functions that were made, by name.
        makers: makes a function for another architecture, by the value of its attribute VARIANT.
        keys: what is made, by the same: the kind of function and all that it depends on.
    """

    arch: int
    knobs: Knobs = DEFAULTS
    kernels: dict[str, DeviceKernel] = field(default_factory=dict)
    makers: dict[str, Make] = field(default_factory=dict)
    keys: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def function(self, key: tuple[Any, ...], make: Make) -> PrimFunc:
        """`make` for the first architecture; equal keys make equal functions."""
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        self.makers[name], self.keys[name] = make, key
        return make(self.arch, self.knobs).with_attr(VARIANT, name)

    def key_of(self, function: Any) -> tuple[Any, ...] | None:
        """The key of a function that was made here."""
        name = function.attrs.get(VARIANT) if isinstance(function, PrimFunc) else None
        return None if name is None else self.keys[str(name)]

    def remade(self, module: IRModule, arch: int, refused: Collection[str] = ()) -> IRModule:
        """`module` with its functions made for `arch`, untuned where they would launch `refused` kernels."""
        functions = dict(module.functions_items())
        for variable, function in functions.items():
            name = function.attrs.get(VARIANT) if isinstance(function, PrimFunc) else None
            if name is not None:
                make = self.makers[str(name)]
                made = make(arch, self.knobs)
                if launched(made) & set(refused):
                    made = make(arch, DEFAULTS)
                made = made.with_attr(VARIANT, name)
                if (place := function.attrs.get(OVERWRITTEN)) is not None:
                    made = overwritten(made, int(place))
                functions[variable] = made.with_attr("global_symbol", function.attrs["global_symbol"])
        return IRModule(functions)

    def launch(self, e: Emitter, kernel: DeviceKernel, values: Mapping[str, Any], grid: Any) -> None:
        """Emit the launch of a kernel with the values that its parameters name: buffers, matrices and int64
        numbers."""
        self.kernels[kernel.name] = kernel
        arguments: list[Any] = []
        for name, kind in kernel.types:
            if boxes.is_matrix(kind):
                arguments += _map(e, kind, values[name])
            else:
                value = values[name]
                arguments.append(value.data if kind.startswith("*") else tirx.Cast("int32", value))
        null = tirx.reinterpret("handle", tirx.const(0, "uint64"))
        blocks = [i64(g) if isinstance(g, int) else g for g in (*grid, 1, 1, 1)[:3]]
        call = tirx.call_packed(
            kernel.name, *arguments, null, null, i64(32 * kernel.warps), *blocks, i64(SHARED)
        )
        e.add(tirx.Evaluate(call))


def _map(e: Emitter, kind: str, matrix: Matrix) -> list[Expr]:
    """Emit the encoding of a tensor map; the arguments of a launch for a matrix of boxes (boxes.HIDDEN)."""
    made = tirx.tvm_stack_alloca("tensormap", 1)
    room = tirx.Var("map", made.ty)
    e.add(tirx.stmt.Bind(room, made))
    rows, columns, swizzle = boxes.copied(kind)
    # Sizes, strides in bytes and the box from the fastest axis on; steps of one element.
    shape = (i64(matrix.width), matrix.rows, matrix.width * boxes.BYTES, columns, rows, 1, 1)
    encode = ("runtime.cuTensorMapEncodeTiled", room, boxes.dtype_of(kind), 2, matrix.buffer.data)
    # Not interleaved; zeros outside.
    e.add(tirx.Evaluate(tirx.call_packed(*encode, *shape, 0, swizzle, _PROMOTION, 0)))
    sizes = [tirx.Cast("int32", matrix.rows), tirx.const(matrix.width, "int32")]
    return [room, *sizes, i64(matrix.width), i64(1)]


def launched(function: PrimFunc) -> set[str]:
    """Names of what a function calls as packed functions."""
    names: set[str] = set()

    def visit(call: Any) -> None:
        if is_launch(call):
            names.add(str(call.args[0].value))

    structural_walk(function.body, [(Call, visit)])
    return names


def is_launch(call: Any) -> bool:
    return getattr(call.op, "name", "") == "tirx.tvm_call_packed" and isinstance(call.args[0], StringImm)


def parts(count: Expr, size: int) -> Expr:
    """Programs that do `size` each."""
    return tirx.floordiv(count + (size - 1), i64(size))
