"""Which kernel calls run slice by slice, such that the least is alive: feed-forward parts, as a rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from math import gcd
from typing import Any, Final

from tvm import IRModule, relax, tirx
from tvm.ir import PrimType

from .graph import dims, graph_of, op_name, static
from .place_arena import ALIGNMENT, Arena, element_bytes, row_bytes
from .prove_rows import ROWS, row_axis
from .row_slices import TOKENS, Segment, has_tokens, is_kernel_call

FINEST: Final = 64
"""The most slices of a call: each is a call of its own."""
_BEYOND: Final = 1 << 30
"""A binding behind all of a run."""


def segments_of(mod: IRModule) -> tuple[Segment, ...]:
    """The segments of a lowered function, with which the least is alive for many tokens in small slices.

    A segment is a run of kernel calls, one behind the other, that are known to work row by row (`kvc.rows`),
    on temporaries whose outermost axis is the tokens'. What only its calls read and write then needs room for
    the rows of one slice. Of the segments that keep what is alive within the least that the finest slices
    reach, those are taken that read the fewest weights, since every slice reads them again.
    """
    steps = _Steps(mod)
    runs = list(steps.runs())
    inside = {call for run in runs for call in run}
    least = max((steps.alive[at] for i, at in enumerate(steps.calls) if i not in inside), default=0)
    ways = [steps.ways(run) for run in runs]
    for each in ways:
        least = max(least, min(way.peak for way in each))
    found = []
    for run, each in zip(runs, ways, strict=True):
        best = min((way for way in each if way.peak <= least), key=lambda way: (way.weights, way.calls))
        if best.calls:
            found.append(steps.chosen(run[best.low], run[best.low] + best.calls - 1))
    return tuple(found)


@dataclass(frozen=True)
class _Way:
    """A segment in a run of calls, or none, with the bytes a token that are alive in the run at most."""

    low: int
    calls: int
    """How many, from the run's number `low` on; 0 for no segment."""
    peak: int
    """With one of FINEST slices at a time."""
    weights: int
    """Bytes of the weights that its calls read."""


class _Steps:
    """The kernel calls of a function, and what is alive with them for each of many tokens."""

    def __init__(self, mod: IRModule) -> None:
        self.mod, self.graph = mod, graph_of(mod["main"])
        self.params = set(self.graph.function.params)
        order = self.graph.order
        self.calls = [i for i, var in enumerate(order) if _runs(self.graph.definitions[var])]
        arena = Arena.of(mod, "apart")
        own = {t.var for t in arena.temporaries}
        self.roots = {var: roots for var, roots in arena.roots.items() if roots <= own}
        sizes = {t.var: row_bytes(t.var) for t in arena.temporaries if has_tokens(t.var)}
        self.lives = [(t.first, t.last, sizes[t.var]) for t in arena.temporaries if t.var in sizes]
        change = [0] * (len(order) + 1)
        for first, last, size in self.lives:
            change[first] += size
            change[last + 1] -= size
        self.alive = list(accumulate(change))
        """Bytes a token, by binding."""
        self._known: dict[Any, list[_Way]] = {}

    def runs(self) -> Iterator[range]:
        """Runs of calls that may be in a segment, by number among all calls."""
        begin = 0
        for i in range(len(self.calls) + 1):
            if i == len(self.calls) or not self._fits(self._call(i)):
                if i > begin:
                    yield range(begin, i)
                begin = i + 1

    def segment(self, low: int, high: int) -> Segment:
        """From behind the call before the first to the last."""
        return Segment(self.calls[low - 1] + 1 if low else 0, self.calls[high])

    def chosen(self, low: int, high: int) -> Segment:
        """The segment, with its unit and its weights."""
        tensors = {a for i in range(low, high + 1) for a in self._call(i).args if self.roots.get(a)}
        rows = (row_bytes(root) for value in tensors for root in self.roots[value])
        unit = max(ALIGNMENT // gcd(ALIGNMENT, size) for size in rows)
        weights = sum(self._weights(self._call(i)) for i in range(low, high + 1))
        return replace(self.segment(low, high), unit=unit, weights=weights)

    def ways(self, run: range) -> list[_Way]:
        """No segment, and every segment in a run. Layers repeat: most runs are alike."""
        span = self.segment(run[0], run[-1])
        lives = tuple(
            (
                first - span.first if first >= span.first else -1,
                last - span.first if last <= span.last else _BEYOND,
                size,
            )
            for first, last, size in self.lives
            if first <= span.last and last >= span.first
        )
        calls = tuple(self.calls[i] - span.first for i in run)
        weights = tuple(self._weights(self._call(i)) for i in run)
        key = (lives, calls, weights)
        if key not in self._known:
            self._known[key] = _ways(lives, calls, weights)
        return self._known[key]

    def _call(self, number: int) -> relax.Call:
        return self.graph.definitions[self.graph.order[self.calls[number]]]

    def _fits(self, call: relax.Call) -> bool:
        """Whether a call may be one for some of the tokens."""
        attrs = self.mod[call.op].attrs if is_kernel_call(call) else None
        if attrs is None or not attrs.get(ROWS, False):
            return False
        tensors = [a for a in call.args if not isinstance(a.ty, PrimType)]
        open_ = [a for a in tensors if any(static(dim) is None for dim in dims(a))]
        return bool(open_) and all(self._is_rows(a) for a in open_)

    def _is_rows(self, value: relax.Expr) -> bool:
        """Whether a value is a temporary, or a view of one, in which the tokens are one behind the other."""
        owners = self.roots.get(value, frozenset())
        return len(owners) == 1 and all(map(_by_tokens, (value, *owners)))

    def _weights(self, call: relax.Call) -> int:
        """Bytes of the weights that a call reads, but for those of which it looks rows up by number."""
        if any(str(a.ty.dtype.dtype) in ("int32", "int64") for a in call.args if self.roots.get(a)):
            return 0
        return sum(_bytes(a) for a in call.args if a in self.params)


def _ways(
    lives: tuple[tuple[int, int, int], ...], calls: tuple[int, ...], weights: tuple[int, ...]
) -> list[_Way]:
    """`lives`: first and last binding and bytes of temporaries; `calls`: the bindings of a run."""
    whole = [sum(size for first, last, size in lives if first <= at <= last) for at in calls]
    found = [_Way(0, 0, max(whole), 0)]
    for low in range(len(calls)):
        begin = calls[low - 1] + 1 if low else 0
        inner = [0] * len(calls)  # bytes of what only the segment uses, by call
        before = begin - 1
        for high in range(low, len(calls)):
            end, shared = calls[high], 0
            for first, last, size in lives:
                if first < begin <= last or begin <= first <= end < last:
                    shared += size
                elif first >= begin and before < last <= end:
                    for i in range(low, high + 1):
                        inner[i] += size if first <= calls[i] <= last else 0
            peak = max([*whole[:low], shared + -(-max(inner) // FINEST), *whole[high + 1 :]])
            found.append(_Way(low, high - low + 1, peak, sum(weights[low : high + 1])))
            before = end
    return found


def _runs(value: relax.Expr) -> bool:
    """Whether a binding does something: it is no allocation and no view."""
    return isinstance(value, relax.Call) and op_name(value) not in ("builtin.alloc_tensor", "reshape")


def _by_tokens(value: relax.Expr) -> bool:
    """Whether the outermost axis is the tokens', or a fixed number of rows for each."""
    shape = dims(value)
    try:
        axis = row_axis(shape)
    except ValueError:
        return False
    if axis is None:
        return False
    dim = shape[axis]
    factors = [dim.a, dim.b] if isinstance(dim, tirx.Mul) else [dim]
    symbols = [factor for factor in factors if static(factor) is None]
    return len(symbols) == 1 and isinstance(symbols[0], tirx.Var) and symbols[0].name == TOKENS


def _bytes(weight: relax.Var) -> int:
    count = 1
    for dim in dims(weight):
        count *= static(dim) or 1
    return count * element_bytes(str(weight.ty.dtype.dtype))
