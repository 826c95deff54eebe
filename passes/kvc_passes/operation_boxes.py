"""The operations of a function, asked which parts of which values a part of one is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax

from .boxes import Access, Box, extents, reshaped
from .graph import op_name, static
from .loop_nests import call_kernel
from .place_arena import ALIGNMENT, element_bytes
from .rematerialize import Operations

Reads = tuple[tuple[int, "Box | None"], ...]


class OperationBoxes:
    """What boxes of every operation's value take; all that is asked for is kept, since searches ask again.

    Attributes:
        operations: the function's.
        number: of every binding that is an operation.
        values: of every operation what it is bound to.
        shapes: of its value, None for symbolic ones and tuples.
        views: whether it is a reshape.
        accesses: its kernel; None for views and for kernels that cannot be asked.
        names: what it calls.
        arguments: of a kernel the operations that it is given, -1 for parameters and constants.
    """

    def __init__(self, operations: Operations) -> None:
        self.operations = operations
        self.number = {var: i for i, var in enumerate(operations.vars)}
        self.values = [operations.graph.definitions[var] for var in operations.vars]
        self.shapes = [_static(var) for var in operations.vars]
        kinds = [op_name(value) for value in self.values]
        self.views = [kind == "reshape" for kind in kinds]
        calls = [
            value if kind == "call_tir" else None for value, kind in zip(self.values, kinds, strict=True)
        ]
        self.names = [
            kind if call is None else str(call.args[0].name_hint)
            for call, kind in zip(calls, kinds, strict=True)
        ]
        known: dict[str, Access | None] = {}
        for call, name in zip(calls, self.names, strict=True):
            if call is not None and name not in known:
                known[name] = Access.of(call_kernel(operations.functions, call))
        self.accesses = [None if c is None else known[n] for c, n in zip(calls, self.names, strict=True)]
        self.arguments = [
            [] if call is None else [self._operation(a) for a in call.args[1].fields] for call in calls
        ]
        self._elements = [
            element_bytes(str(var.ty.dtype.dtype)) if shape is not None else 0
            for var, shape in zip(operations.vars, self.shapes, strict=True)
        ]
        self._reads: dict[tuple[int, Box], Reads] = {}
        self._inputs: dict[tuple[str, Box], tuple[Box | None, ...]] = {}

    def shape(self, op: int) -> tuple[int, ...]:
        return self.shapes[op] or ()

    def bytes(self, op: int, box: Box) -> int:
        """Of a box of a value, as an arena aligns them."""
        size = count(extents(box)) * self._elements[op]
        return -(-size // ALIGNMENT) * ALIGNMENT

    def reads(self, op: int, box: Box) -> Reads:
        """The operations that a box of a value is computed from, and the boxes of them; None for no box."""
        found = self._reads.get((op, box))
        if found is None:
            found = self._reads[op, box] = self._read(op, box)
        return found

    def _read(self, op: int, box: Box) -> Reads:
        if self.views[op]:
            source = self._operation(self.values[op].args[0])
            return () if source < 0 else ((source, reshaped(box, self.shape(op), self.shape(source))),)
        access, key = self.accesses[op], (self.names[op], box)
        if key not in self._inputs and access is not None:
            needed = access.needed(box).buffers
            self._inputs[key] = tuple(needed.get(buffer) for buffer in access.kernel.inputs)
        parts = zip(self.arguments[op], self._inputs[key], strict=True)
        return tuple((source, part) for source, part in parts if source >= 0 and part is not None)

    def _operation(self, value: Any) -> int:
        return self.number.get(value, -1) if isinstance(value, relax.Var) else -1


def count(sizes: Sequence[int]) -> int:
    """Elements of a shape."""
    result = 1
    for size in sizes:
        result *= size
    return result


def _static(var: relax.Var) -> tuple[int, ...] | None:
    shape = getattr(var.ty, "shape", None)
    sizes = [static(dim) for dim in shape.values] if isinstance(shape, relax.ShapeExpr) else [None]
    return None if None in sizes else tuple(size or 0 for size in sizes)
