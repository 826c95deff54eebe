"""One arena for all temporaries of a function, its size a compile-time constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

from tvm import IRModule, relax, tirx

from .base import Result
from .errors import PlanningError
from .graph import dims, graph_of, op_name, operands, static
from .rebuild import substitute, with_main
from .row_slices import TOKENS, Segment, SliceWriter, has_tokens, is_kernel_call

ALIGNMENT = 64  # bytes; generated code loads whole vectors
_REPAIRS = 4
"""How often an order that leaves gaps is repaired."""
Returned = Literal["none", "apart", "within"]
"""Temporaries that a function returns: there must be none; they are allocations of their own; or they lie in
the arena, whose memory stays as long as the caller holds them."""


@dataclass(frozen=True)
class Temporary:
    """A temporary tensor, and the first and last binding between which it is alive."""

    var: relax.Var
    alloc: relax.Call
    first: int
    last: int
    inner: bool = False
    """Whether only one segment uses it: it holds the rows of a slice."""

    def size(self, bounds: Mapping[str, int], rows: int = 0) -> int:
        """Bytes, aligned, with the symbols at their bounds; `rows`: tokens of a slice, 0 for all."""
        if self.inner and rows:
            bounds = {**bounds, TOKENS: min(bounds[TOKENS], rows)}
        count = 1
        for dim in self.alloc.args[0].values:
            count *= evaluate(dim, bounds)
        size = count * element_bytes(str(self.alloc.args[1].value))
        return -(-size // ALIGNMENT) * ALIGNMENT

    def with_slices(self, segment: Segment) -> Temporary:
        """The same where a segment runs slice by slice: what it shares with others is alive in all of it."""
        begins, ends = segment.holds(self.first), segment.holds(self.last)
        if begins and ends:
            return replace(self, inner=True)
        first, last = segment.first if begins else self.first, segment.last if ends else self.last
        return replace(self, first=first, last=last) if begins or ends else self


@dataclass(frozen=True)
class Arena:
    """The temporaries of a function and where they can lie."""

    temporaries: tuple[Temporary, ...]
    roots: Mapping[relax.Var, frozenset[relax.Var]] = field(default_factory=dict)
    """Of every value the temporaries that it lies in."""
    returned: frozenset[relax.Var] = frozenset()
    """Those that leave the function, where they may."""

    @classmethod
    def of(cls, mod: IRModule, returned: Returned = "none", *, segments: Sequence[Segment] = ()) -> Arena:
        """The temporaries of `main`; values that alias one keep it alive.

        segments: parts that run slice by slice; what they share with others is alive in all of them. Raises
        PlanningError for a temporary that is returned and must not be.
        """
        graph = graph_of(mod["main"])
        roots: dict[relax.Var, set[relax.Var]] = {}
        first: dict[relax.Var, int] = {}
        last: dict[relax.Var, int] = {}
        for step, var in enumerate(graph.order):
            value = graph.definitions[var]
            if op_name(value) == "builtin.alloc_tensor":
                roots[var], first[var], last[var] = {var}, step, step
                continue
            used = [r for o in operands(value) if isinstance(o, relax.Var) for r in roots.get(o, ())]
            for root in used:
                last[root] = step
            if not isinstance(value, relax.Call) or op_name(value) == "reshape":
                roots[var] = set(used)
        result = graph.function.body.body
        leaving = {r for o in operands(graph.definitions.get(result, result)) for r in roots.get(o, ())}
        leaving |= roots.get(result, set())
        for root in leaving:
            if returned == "none":
                raise PlanningError(f"the temporary {root.name} leaves the function")
            last[root] = len(graph.order)
            if returned == "apart":
                first.pop(root)
        found = [Temporary(v, graph.definitions[v], first[v], last[v]) for v in first]
        for segment in segments:
            found = [t.with_slices(segment) for t in found]
        of_values = {var: frozenset(own) for var, own in roots.items()}
        return cls(tuple(found), of_values, frozenset(leaving & first.keys()))

    def size(self, bounds: Mapping[str, int], rows: int = 0) -> int:
        """Bytes that the arena needs with the symbols at their bounds, `rows` tokens a slice."""
        return self.place(bounds, rows)[1]

    def place(self, bounds: Mapping[str, int], rows: int = 0) -> tuple[dict[relax.Var, int], int]:
        """Offset of every temporary, and the bytes of all: the best of three orders.

        What leaves the function is also tried after everything else: it takes no more than beside the arena.
        Where an order leaves gaps, what reaches beyond the least is tried before everything else, and again.
        """
        sizes = self._sizes(bounds, rows)
        least = max(self._alive(sizes), default=ALIGNMENT)
        lives = [(t.first, t.last - t.first + 1) for t in self.temporaries]
        keys: tuple[Callable[[int], tuple[int, int]], ...] = (
            lambda i: (-sizes[i], lives[i][0]),
            lambda i: (-lives[i][1], -sizes[i]),
            lambda i: (-sizes[i] * lives[i][1], lives[i][0]),
        )
        orders = [sorted(range(len(sizes)), key=key) for key in keys]
        if self.returned:
            leaves = [t.var in self.returned for t in self.temporaries]
            orders += [sorted(order, key=lambda i: leaves[i]) for order in orders]
        offsets, total = min(self._tried(sizes, orders, least), key=lambda each: each[1])
        return {t.var: offset for t, offset in zip(self.temporaries, offsets)}, total

    def _tried(
        self, sizes: Sequence[int], orders: list[list[int]], least: int
    ) -> Iterator[tuple[list[int], int]]:
        """Places by orders and by repaired ones, up to the first of `least` bytes: none takes less."""
        for _ in range(_REPAIRS + 1):
            for number, order in enumerate(orders):
                offsets, total = self._placed(sizes, order)
                yield offsets, total
                if total == least:
                    return
                beyond = [i for i in order if offsets[i] + sizes[i] > least]
                orders[number] = beyond + [i for i in order if offsets[i] + sizes[i] <= least]

    def alive(self, bounds: Mapping[str, int], rows: int = 0) -> list[int]:
        """Bytes that are alive at every binding up to the last that uses any."""
        return self._alive(self._sizes(bounds, rows))

    def _alive(self, sizes: Sequence[int]) -> list[int]:
        change = [0] * (max((t.last for t in self.temporaries), default=-1) + 2)
        for t, size in zip(self.temporaries, sizes):
            change[t.first] += size
            change[t.last + 1] -= size
        return list(accumulate(change[:-1]))

    def _sizes(self, bounds: Mapping[str, int], rows: int) -> list[int]:
        unlike = dict(zip(self._shapes, self.temporaries))
        known = {key: t.size(bounds, rows) for key, t in unlike.items()}
        return [known[key] for key in self._shapes]

    def _placed(self, sizes: Sequence[int], order: Sequence[int]) -> tuple[list[int], int]:
        """Blocks one after another in this order, each in the smallest gap that it fits."""
        offsets = [-1] * len(sizes)
        for i in order:
            busy = sorted((offsets[j], offsets[j] + sizes[j]) for j in self._together[i] if offsets[j] >= 0)
            best: tuple[int, int] | None = None
            free = 0
            for start, end in busy:
                if start - free >= sizes[i] and (best is None or start - free < best[0]):
                    best = start - free, free
                free = max(free, end)
            offsets[i] = free if best is None else best[1]
        return offsets, max((at + size for at, size in zip(offsets, sizes)), default=ALIGNMENT)

    @cached_property
    def _shapes(self) -> list[str]:
        """What the size of each temporary depends on: layers repeat."""
        return [f"{t.alloc.args[0]} {t.alloc.args[1]} {t.inner}" for t in self.temporaries]

    @cached_property
    def _together(self) -> list[list[int]]:
        """Of every temporary, those that are alive at a time when it is."""
        found: list[list[int]] = [[] for _ in self.temporaries]
        alive: list[int] = []
        for i in sorted(range(len(found)), key=lambda i: self.temporaries[i].first):
            alive = [j for j in alive if self.temporaries[j].last >= self.temporaries[i].first]
            for j in alive:
                found[i].append(j)
                found[j].append(i)
            alive.append(i)
        return found


@dataclass(frozen=True)
class PlaceArena:
    """Temporaries become places in one storage.

    Before: `builtin.alloc_tensor(shape, ...)` for every temporary, shapes in symbols such as n.
    After: one `memory.alloc_storage(bytes)` at the start, `memory.alloc_tensor(storage, offset, shape)` for
        every temporary; two that are alive at the same time never overlap.
    Needs: CallTIRRewrite (allocations are explicit) and a bound for every symbol.
    Refuses: an arena larger than `bytes`, which would break the plan (PlanningError).

    Placement is best fit over lifetimes, by decreasing size, length of life or both, as in "Efficient Memory
    Management for Deep Neural Net Inference" (Pisarchyk and Lee, 2020). `bytes` = None takes what is needed.

    With `rows`, the calls of every segment run for so many tokens after another: tensors that only they use
    have room for those, and of others a call gets the rows of its tokens, where they lie.
    """

    bounds: Mapping[str, int]
    bytes: int | None = None
    returned: Returned = "none"
    segments: tuple[Segment, ...] = ()
    rows: int = 0
    """Tokens of a slice, a multiple of the unit of every segment; 0 for all at once."""

    def run(self, mod: IRModule) -> Result:
        """Facts of the result: bytes of the arena."""
        function, segments = mod["main"], self.segments if self.rows else ()
        graph = graph_of(function)
        arena = Arena.of(mod, self.returned, segments=segments)
        offsets, needed = arena.place(self.bounds, self.rows)
        total = needed if self.bytes is None else self.bytes
        if needed > total:
            raise PlanningError(f"temporaries take {needed} bytes, {total} were planned")
        inside = {step: s for s in segments for step in range(s.first, s.last + 1)}
        builder = relax.BlockBuilder()
        with builder.function(
            "main", list(function.params), attrs=dict(function.attrs) if function.attrs else None
        ):
            shape = relax.ShapeExpr([tirx.IntImm("int64", total)])
            storage = builder.emit(
                relax.op.memory.alloc_storage(shape, 0, "global", "uint8"), name_hint="arena"
            )
            tensors = _Tensors(builder, storage, arena, offsets, self.rows)
            values: dict[relax.Var, relax.Expr] = {}
            writer = SliceWriter(builder, function, self.bounds[TOKENS], self.rows) if segments else None
            calls: list[relax.Call] = []
            for step, var in enumerate(graph.order):
                value, segment = graph.definitions[var], inside.get(step)
                if writer is not None and segment is not None and is_kernel_call(value):
                    calls.append(value)
                    if step == segment.last:
                        writer.write(calls, tensors.rows, values)
                        calls = []
                elif tensors.is_inner(var):
                    continue  # every slice has tensors of its own
                elif var in offsets:
                    values[var] = tensors.at(offsets[var], value.args[0], str(value.args[1].value))
                else:
                    values[var] = builder.emit(substitute(value, values), name_hint=var.name)
            builder.emit_func_output(substitute(function.body.body, values))
        new = builder.get()["main"]
        return Result(with_main(mod, new.with_attr("global_symbol", "main")), len(offsets), total)


class _Tensors:
    """Tensors at places of the arena. Layers repeat: most have been made before."""

    def __init__(
        self,
        builder: relax.BlockBuilder,
        storage: relax.Var,
        arena: Arena,
        offsets: Mapping[relax.Var, int],
        rows: int,
    ) -> None:
        self.builder, self.storage, self.arena = builder, storage, arena
        self.offsets, self.slice = offsets, rows
        self.inner = {t.var for t in arena.temporaries if t.inner and has_tokens(t.var)}
        self.made: dict[tuple[int, str], relax.Var] = {}

    def is_inner(self, var: relax.Var) -> bool:
        """Whether a value lies in what slices have for themselves."""
        own = self.arena.roots.get(var, frozenset())
        return bool(own) and own <= self.inner

    def rows(self, value: relax.Var, number: int, shape: relax.ShapeExpr) -> relax.Expr:
        """The rows of slice `number`, which are `shape`."""
        (root,) = self.arena.roots[value]
        offset = self.offsets[root]
        if root not in self.inner:
            offset += number * self.slice * row_bytes(root)
        return self.at(offset, shape, str(value.ty.dtype.dtype))

    def at(self, offset: int, shape: relax.ShapeExpr, dtype: str) -> relax.Var:
        """The tensor at an offset, its data pointer moved there: kernels take no tensors with an offset."""
        key = (offset, f"{shape}{dtype}")
        if key not in self.made:
            made = self.builder.emit(relax.op.memory.alloc_tensor(self.storage, offset, shape, dtype))
            if offset != 0:
                move = relax.ExternFunc("vm.builtin.ensure_zero_offset")
                moved = relax.Call(move, [made], ty_args=[relax.TensorType(shape, dtype)])
                made = self.builder.emit(moved)
            self.made[key] = made
        return self.made[key]


def row_bytes(value: relax.Var) -> int:
    """Bytes of a tensor for one token."""
    count = 1
    for dim in dims(value):
        count *= evaluate(dim, {TOKENS: 1})
    return count * element_bytes(str(value.ty.dtype.dtype))


def element_bytes(dtype: str) -> int:
    """Bytes of one element; booleans take one."""
    return -(-int("".join(c for c in dtype if c.isdigit()) or 8) // 8)


def evaluate(dim: Any, bounds: Mapping[str, int]) -> int:
    """A dimension with its symbols at their bounds. Raises PlanningError for a symbol without one."""
    value = static(dim)
    if value is not None:
        return value
    if isinstance(dim, tirx.Var):
        if dim.name not in bounds:
            raise PlanningError(f"no bound is known for the symbol {dim.name}")
        return bounds[dim.name]
    a, b = evaluate(dim.a, bounds), evaluate(dim.b, bounds)
    rules = {tirx.Add: a + b, tirx.Sub: a - b, tirx.Mul: a * b, tirx.Max: max(a, b), tirx.Min: min(a, b)}
    if isinstance(dim, tirx.FloorDiv):
        return a // b
    if type(dim) not in rules:
        raise PlanningError(f"the extent {dim} has no bound")
    return rules[type(dim)]
