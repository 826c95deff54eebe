"""A small builder of scheduled TIR functions.

Kernels are written as Python that emits statements: Python loops unroll, Python conditions specialise,
and helper functions return expressions. `Emitter` collects the statements and wraps them into a PrimFunc
that TVM neither fuses nor schedules again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import s_tir, tirx

Expr = Any
"""A tirx expression, or a Python number where one is accepted."""

OPAQUE = 8
"""op_pattern kOpaque: FuseOps leaves such a function alone."""


def i64(value: int) -> Expr:
    """An int64 constant."""
    return tirx.const(value, "int64")


def f32(value: float) -> Expr:
    """A float32 constant."""
    return tirx.const(value, "float32")


def lanes_of(value: Expr) -> int:
    """Elements of a vector expression, 1 for a scalar."""
    dtype = str(value.ty.dtype)
    return int(dtype.partition("x")[2] or 1)


def splat(value: Expr, lanes: int) -> Expr:
    """`value` in every element of a vector (the value itself for one lane)."""
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def vec(start: Expr, lanes: int) -> Expr:
    """The index of `lanes` consecutive elements that begin at `start`."""
    return start if lanes == 1 else tirx.Ramp(start, tirx.const(1, start.ty.dtype), lanes)


def widened(value: Expr) -> Expr:
    """A scalar or vector of any float type as float32, without a change of value."""
    name, _, count = str(value.ty.dtype).partition("x")
    if name == "float32":
        return value
    if name == "float16":
        return tirx.Cast(f"float32x{count}" if count else "float32", value)
    # By bits: TVM takes a cast of bfloat16 in a bound variable for one of integers.
    lanes = lanes_of(value)
    bits = tirx.reinterpret(_like("uint16", lanes), value)
    high = tirx.Cast(_like("uint32", lanes), bits) << splat(tirx.const(16, "uint32"), lanes)
    return tirx.reinterpret(_like("float32", lanes), high)


def narrowed(value: Expr, dtype: str) -> Expr:
    """A float32 scalar or vector rounded to the nearest of a float type, ties to even; NaN stays NaN."""
    lanes = lanes_of(value)
    if dtype == "float32":
        return value
    if dtype == "float16":
        return tirx.Cast(_like(dtype, lanes), value)

    def number(value: int) -> Expr:
        return splat(tirx.const(value, "uint32"), lanes)

    bits = tirx.reinterpret(_like("uint32", lanes), value)
    even = (bits >> number(16)) & number(1)
    rounded = (bits + even + number(0x7FFF)) >> number(16)
    nan = (bits & number(0x7FFFFFFF)) > number(0x7F800000)
    quiet = (bits >> number(16)) | number(0x40)  # the rounding could carry a NaN into the sign
    short = tirx.Cast(_like("uint16", lanes), tirx.Select(nan, quiet, rounded))
    return tirx.reinterpret(_like(dtype, lanes), short)


def _like(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def fold(value: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """A vector folded into one element."""
    name, _, count = str(value.ty.dtype).partition("x")
    width = int(count or 1)
    while width > 2:
        width //= 2
        half = f"{name}x{width}"
        value = combine(tirx.vectorlow(half, value), tirx.vectorhigh(half, value))
    if width == 2:
        value = combine(*(tirx.Shuffle([value], [tirx.const(i, "int32")]) for i in range(2)))
    return value


def fold_four(e: Emitter, values: Sequence[Expr]) -> Expr:
    """The sums of the elements of four float32 vectors of at least four lanes, as one vector of four.

    A third of the instructions of four folds: pairs of vectors are interleaved before they are added.
    """
    lanes = lanes_of(values[0])

    def joined(a: Expr, b: Expr, low: Sequence[int], high: Sequence[int]) -> Expr:
        def pick(order: Sequence[int]) -> Expr:
            places = [four + (i if i < 4 else i - 4 + lanes) for four in range(0, lanes, 4) for i in order]
            return tirx.Shuffle([a, b], [tirx.const(p, "int32") for p in places])

        return e.bind("both", pick(low) + pick(high))

    pairs = [joined(a, b, (0, 4, 1, 5), (2, 6, 3, 7)) for a, b in (values[:2], values[2:])]
    result = joined(pairs[0], pairs[1], (0, 1, 4, 5), (2, 3, 6, 7))
    while lanes > 4:
        lanes //= 2
        half = f"float32x{lanes}"
        result = e.bind("half", tirx.vectorlow(half, result) + tirx.vectorhigh(half, result))
    return result


def chunks(size: int, lanes: int) -> list[tuple[int, int]]:
    """(offset, width) of the vectors that cover `size` elements; the last ones may be narrower."""
    result, at = [], 0
    while at < size:
        while lanes > size - at:
            lanes //= 2
        result.append((at, lanes))
        at += lanes
    return result


class Emitter:
    """Collects statements; loops and conditions are context managers."""

    def __init__(self) -> None:
        self._stack: list[list[Any]] = [[]]

    def add(self, statement: Any) -> None:
        """Append a statement."""
        self._stack[-1].append(statement)

    @contextmanager
    def _scope(self, close: Callable[[Any], Any]) -> Iterator[None]:
        self._stack.append([])
        yield
        body = self._stack.pop()
        if body:
            self.add(close(body[0] if len(body) == 1 else tirx.SeqStmt(body)))

    @contextmanager
    def loop(self, name: str, extent: Expr, *, parallel: bool = False, start: Expr = 0) -> Iterator[Expr]:
        """A loop of an int64 variable over start .. start + extent - 1."""
        var = tirx.Var(name, "int64")
        kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
        start = i64(start) if isinstance(start, int) else start
        extent = i64(extent) if isinstance(extent, int) else extent
        with self._scope(lambda body: tirx.For(var, start, extent, kind, body)):
            yield var

    @contextmanager
    def unrolled(self, name: str, extent: int) -> Iterator[Expr]:
        """A loop that is unrolled late: the passes before that see one iteration only."""
        var = tirx.Var(name, "int64")
        with self._scope(lambda body: tirx.For(var, i64(0), i64(extent), tirx.ForKind.UNROLLED, body)):
            yield var

    @contextmanager
    def vectorized(self, name: str, extent: int) -> Iterator[Expr]:
        """A loop of which all iterations are lanes of vectors."""
        var = tirx.Var(name, "int64")
        with self._scope(lambda body: tirx.For(var, i64(0), i64(extent), tirx.ForKind.VECTORIZED, body)):
            yield var

    @contextmanager
    def when(self, condition: Expr) -> Iterator[None]:
        """Statements that run only where `condition` holds."""
        with self._scope(lambda body: tirx.IfThenElse(condition, body, None)):
            yield

    def switch(self, value: Expr, cases: Sequence[int], emit: Callable[[int], None]) -> None:
        """Emit `emit(case)` for every case, of which the one equal to `value` runs.

        Side by side rather than nested: TVM's passes are slow on deep chains of conditions.
        """
        for case in cases:
            with self.when(tirx.EQ(value, i64(case))):
                emit(case)

    def bind(self, name: str, value: Expr) -> Expr:
        """A variable with the value of an expression, for the rest of the scope."""
        var = tirx.Var(name, value.ty.dtype)
        self.add(tirx.stmt.Bind(var, value))
        return var

    def local(self, name: str, size: int | Sequence[int], dtype: str = "float32") -> Any:
        """A buffer on the stack; with constant indexes only it lives in registers."""
        shape = [size] if isinstance(size, int) else size
        buffer = tirx.decl_buffer([i64(n) for n in shape], dtype, name, scope="local")
        self.add(tirx.stmt.AllocBuffer(buffer))
        return buffer

    def store(self, buffer: Any, value: Expr, *indices: Expr) -> None:
        """buffer[indices] = value; a vector is stored where the last index is a ramp."""
        self.add(tirx.BufferStore(buffer, value, list(indices)))

    def prefetch(self, buffer: Any, *indices: Expr) -> None:
        """Fetch the cache line of an element into the second-level cache; it need not be read after all.

        It is dear in a loop that sums up in registers: LLVM takes it for something that may read the sums,
        and stores all of them in every iteration. The first-level cache fetches few lines at a time.
        """
        at = tirx.address_of(buffer[tuple(indices)])
        hint = [tirx.const(value, "int32") for value in (0, 2, 1)]  # to read, from the second level on, data
        self.add(tirx.Evaluate(tirx.call_intrin("void", "tirx.prefetch", at, *hint)))

    def function(self, params: Sequence[Any], reads: Sequence[Any], writes: Sequence[Any]) -> tirx.PrimFunc:
        """The PrimFunc of `params` (buffers) whose body is what was emitted."""
        body = self._stack.pop()
        block = s_tir.SBlock(
            [],
            [_whole(b) for b in reads],
            [_whole(b) for b in writes],
            "root",
            body[0] if len(body) == 1 else tirx.SeqStmt(body),
        )
        attrs = {"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": OPAQUE, "s_tir": True}
        func = tirx.PrimFunc(list(params), s_tir.SBlockRealize([], True, block))
        for key, value in attrs.items():
            func = func.with_attr(key, value)
        return func


def copy_rows(
    e: Emitter, source: Any, at: Sequence[Expr], target: Any, to: Sequence[Expr], size: int, lanes: int
) -> None:
    """Copy a row of `size` float32 elements by vectors, rounded to the type of `target`."""
    for start, width in chunks(size, lanes):
        index = vec(i64(start), width)
        e.store(target, narrowed(source[(*at, index)], str(target.dtype)), *to, index)


def _whole(buffer: Any) -> Any:
    return buffer[tuple(slice(0, n) for n in buffer.shape)]


def argument(name: str, shape: Sequence[Expr], dtype: str = "float32") -> Any:
    """A buffer parameter; a dimension is an int or a symbolic int64 variable."""
    return tirx.decl_buffer([i64(n) if isinstance(n, int) else n for n in shape], dtype, name)


def size_var(name: str) -> Expr:
    """A symbolic dimension."""
    return tirx.Var(name, "int64")


def compiled(func: tirx.PrimFunc, target: tvm.target.Target) -> Any:
    """The function compiled on its own, for tests and measurements."""
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=target)["main"]
