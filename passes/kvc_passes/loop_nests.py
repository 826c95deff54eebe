"""Kernels that TVM generates, read as loop nests: what every element is computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tvm import relax, s_tir, tirx
from tvm.ir import Call, TensorLoad
from tvm_ffi import structural_equal, structural_walk

from .graph import same_shape, static

OVERWRITES: Final = "kvc.overwrites"
"""Attribute of kernels: the inputs, by number, whose memory the output may take."""
OVERWRITTEN: Final = "kvc.overwritten"
"""Attribute of kernels whose output has taken the memory of an input: what number that had."""


@dataclass(frozen=True, eq=False)
class Nest:
    """Loops around one block that stores one element.

    Attributes:
        loops: the outermost first; loop i runs over the domain of the block's variable i.
        block: its body is `store`; `init` of a reduction comes before.
        store: `buffer[indices] = value`.
    """

    loops: tuple[Any, ...]
    block: Any
    store: Any

    @property
    def pointwise(self) -> bool:
        """Whether the block writes element v where its variables are v, once: no reduction."""
        variables = [v.var for v in self.block.iter_vars]
        indices = list(self.store.indices)
        parallel = all(v.iter_type == tirx.IterVar.DataPar for v in self.block.iter_vars)
        return parallel and len(variables) == len(indices) and all(map(_same, variables, indices))

    @property
    def loads(self) -> list[Any]:
        """Every load in the block but a reduction's of its own sum."""
        found: list[Any] = []
        for part in (self.store.value, None if self.block.init is None else self.block.init.value):
            if part is not None:
                structural_walk(part, (TensorLoad, found.append))
        return [load for load in found if not load.source.same_as(self.store.buffer)]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A PrimFunc of loop nests.

    Attributes:
        inputs, output: its buffers; the output is the last parameter.
        locals: buffers that it allocates.
        nests: in the order in which they run.
    """

    function: tirx.PrimFunc
    inputs: tuple[Any, ...]
    output: Any
    locals: tuple[Any, ...]
    nests: tuple[Nest, ...]

    @classmethod
    def of(cls, function: Any) -> Kernel | None:
        """The kernel as loop nests; None for one of another form, such as hand-written or scheduled ones."""
        nests = nests_of(function)
        if nests is None or not all(map(tirx.is_buffer_var, function.params)):
            return None
        *inputs, output = function.params
        return cls(function, tuple(inputs), output, tuple(function.body.block.alloc_buffers), nests)

    def overwritable(self) -> tuple[int, ...]:
        """The inputs whose memory the output may take, by number.

        Proved: every element of such an input is read only to compute the output's element at the same
        place, through values at the same place, and that is written once, behind those reads. A schedule may
        do elements in any order and side by side, and nothing breaks.
        """
        writers = [nest for nest in self.nests if nest.store.buffer.same_as(self.output)]
        if len(writers) != 1 or not writers[0].pointwise:
            return ()
        if any(load.source.same_as(self.output) for nest in self.nests for load in nest.loads):
            return ()
        aligned = self._aligned(writers[0])
        found = []
        for number, buffer in enumerate(self.inputs):
            alike = same_shape(buffer.shape, self.output.shape) and str(buffer.dtype) == str(
                self.output.dtype
            )
            readers = [n for n in self.nests if any(x.source.same_as(buffer) for x in n.loads)]
            if alike and readers and all(n in aligned and _at_place(n, buffer) for n in readers):
                found.append(number)
        return tuple(found)

    def _aligned(self, writer: Nest) -> list[Nest]:
        """Nests whose element v is read by nothing but the output's element v, through others of these."""
        found = [writer]
        for nest in reversed(self.nests):
            made = nest.store.buffer
            if nest is writer or not nest.pointwise or not same_shape(made.shape, self.output.shape):
                continue
            if sum(n.store.buffer.same_as(made) for n in self.nests) != 1:
                continue
            readers = [n for n in self.nests if any(x.source.same_as(made) for x in n.loads)]
            if readers and all(n in found and _at_place(n, made) for n in readers):
                found.append(nest)
        return found


def nests_of(function: Any) -> tuple[Nest, ...] | None:
    """The nests of a PrimFunc; None for one of another form, such as hand-written or scheduled ones."""
    if not isinstance(function, tirx.PrimFunc) or not isinstance(function.body, s_tir.SBlockRealize):
        return None
    if (function.attrs or {}).get("tirx.is_scheduled", False):
        return None
    root = function.body.block
    if root.iter_vars or root.match_buffers or not function.params:
        return None
    parts = list(root.body.seq) if isinstance(root.body, tirx.SeqStmt) else [root.body]
    found = [_nest(part) for part in parts]
    return None if None in found else tuple(n for n in found if n)


def overwritten(function: tirx.PrimFunc, number: int) -> tirx.PrimFunc:
    """The kernel without its input of that number: the output's memory holds it when the kernel starts."""
    made = function.specialize({function.params[number]: function.params[-1]})
    return made.without_attr(OVERWRITES).with_attr(OVERWRITTEN, number)


def call_kernel(functions: Any, call: relax.Expr) -> Kernel | None:
    """The kernel that a `call_tir` of tensors alone runs, of which `functions` has the PrimFunc."""
    if len(call.args) != 2 or not isinstance(call.ty_args[0], relax.TensorType):
        return None
    return Kernel.of(functions.get(call.args[0]))


def _nest(statement: Any) -> Nest | None:
    loops: list[Any] = []
    while isinstance(statement, tirx.For):
        loops.append(statement)
        statement = statement.body
    if not isinstance(statement, s_tir.SBlockRealize):
        return None
    block = statement.block
    plain = (
        isinstance(statement.predicate, tirx.IntImm)
        and bool(statement.predicate.value)
        and isinstance(block.body, tirx.BufferStore)
        and (block.init is None or isinstance(block.init, tirx.BufferStore))
        and not (block.match_buffers or block.alloc_buffers)
        and not (_takes_buffers(block.body) or _takes_buffers(block.init))
        and len(loops) == len(block.iter_vars) == len(statement.iter_values)
        and all(map(_whole, loops, block.iter_vars, statement.iter_values))
    )
    return Nest(tuple(loops), block, block.body) if plain else None


def _whole(loop: Any, variable: Any, value: Any) -> bool:
    """Whether the loop is the variable, over all of its domain."""
    same = _equal(loop.extent, variable.dom.extent) and _equal(loop.min, variable.dom.min)
    return same and _same(value, loop.loop_var) and loop.kind == tirx.ForKind.SERIAL


def _equal(a: Any, b: Any) -> bool:
    numbers = static(a), static(b)
    return numbers[0] == numbers[1] if None not in numbers else structural_equal(a, b)


def _at_place(nest: Nest, buffer: Any) -> bool:
    """Whether a pointwise nest reads the buffer only where it writes."""
    own = list(nest.store.indices)
    reads = [x for x in nest.loads if x.source.same_as(buffer)]
    return all(len(x.indices) == len(own) and all(map(_same, x.indices, own)) for x in reads)


def _takes_buffers(statement: Any) -> bool:
    """Whether a call gets a buffer itself: what it reads there is not known."""
    found: list[Any] = []
    if statement is not None:
        structural_walk(statement, (Call, lambda call: found.extend(map(tirx.is_buffer_var, call.args))))
    return any(found)


def _same(a: Any, b: Any) -> bool:
    return bool(a.same_as(b))
