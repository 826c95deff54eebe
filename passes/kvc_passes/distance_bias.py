"""Learned biases of the distance between query and key: a table is read at a bucket of it (T5)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import tvm
from tvm import relax, tirx

from .affine import Affine
from .conditions import Unprovable, is_condition
from .element import Elements, Index
from .element_rules import RULES
from .graph import Graph, aligned, dims, op_name, static
from .indices import int64, replaced
from .spans import OPERATIONS, Span, computed

_EXACT: Final = 4096
"""Distances that are looked at one by one."""
_LONGEST: Final = 1 << 30
"""Beyond what positions can be."""
_MOST: Final = 2.0**10
"""Larger numbers in a table are none of a bias."""
_TYPES: Final = ("bool", "int32", "int64", "float32", "float64")
"""Of values that are followed: narrower ones wrap, or round more."""
_WIDER: Final = [(narrow, wide) for narrow in ("float16", "bfloat16") for wide in ("float32", "float64")]
"""Casts that leave every number as it is."""


_DISTANCE: Final = Span(
    np.arange(_EXACT + 1, dtype=np.float64), np.append(np.arange(_EXACT, dtype=np.float64), _LONGEST)
)


class _NoRule(Unprovable):
    """An operation cannot be followed; what it computes may have an expression all the same."""


class Distances(Elements):
    """Elements as numbers by distance, of values that depend on nothing else.

    Where an element is an integer expression of the index, it must be one of the distance: then it is
    followed through operations that have no exact expression, such as a logarithm.
    """

    def __init__(self, elements: Elements, position: Any, key: Any) -> None:
        super().__init__(elements.graph, {}, elements.analyzer)
        self.exact, self.position, self.key = elements, position, key
        self.distance = tirx.Var("distance", "int64")

    def at(self, value: relax.Expr, index: Index) -> Any:
        """A Span. Raises Unprovable for what depends on more than the distance."""
        reason = Unprovable("depends on more than the distance between query and key")
        try:
            found = self._evaluated(self.exact.at(value, index))
            return found.kept_in(_dtype(value)) if "int" in _dtype(value) else found
        except Unprovable as error:
            call = self.graph.definitions.get(value) if isinstance(value, relax.Var) else None
            if call is None:
                raise reason from error
        try:
            return self.at(call, index) if isinstance(call, relax.Var) else self._of_call(value, call, index)
        except _NoRule as error:
            raise (reason if self._expressed(value, index) else error) from None

    def _of_call(self, value: relax.Var, call: relax.Call, index: Index) -> Any:
        name, dtype = op_name(call), _dtype(value)
        floats = "float" in dtype
        if name in _MOVES:
            return RULES[name](self, call, index)
        if name in ("full", "full_like"):
            return self.at(call.args[1], [])
        if name == "astype":
            return self.at(call.args[0], index).cast(_dtype(call.args[0]), dtype)
        if name not in OPERATIONS or (name == "divide" and not floats):
            raise _NoRule(f"uses the operation {name}, which has no rule for distances")
        return computed(name, dtype, *(self.at(o, aligned(o, index)) for o in call.args))

    def simplify(self, value: Any) -> Any:
        return self.exact.simplify(value)

    def _expressed(self, value: relax.Expr, index: Index) -> bool:
        with contextlib.suppress(Unprovable):
            self.exact.at(value, index)
            return True
        return False

    def _evaluated(self, expression: Any) -> Span:
        """A number, or an integer expression of query and key as one of the distance."""
        if isinstance(expression, (bool, int, float)):
            return Span.of(expression, _EXACT + 1)
        if not isinstance(expression, tirx.Expr) or is_condition(expression):
            raise Unprovable("is no integer expression")
        at_distance = replaced(expression, self.key, self.position - self.distance)
        found = self.analyzer.simplify(at_distance)
        first, second = (replaced(found, self.distance, int64(d)) for d in (0, 1))
        start, step = (static(self.analyzer.simplify(e)) for e in (first, second - first))
        linear = None if start is None or step is None else int64(start) + self.distance * step
        if linear is None or not self.analyzer.can_prove_equal(found, linear):
            raise Unprovable("depends on more than the distance between query and key")
        moved = Span(_DISTANCE.low * step + start, _DISTANCE.high * step + start)
        return Span(np.minimum(moved.low, moved.high), np.maximum(moved.low, moved.high))


_MOVES: Final = ("expand_dims", "squeeze", "broadcast_to", "reshape", "permute_dims", "strided_slice")


@dataclass(frozen=True)
class LearnedBias:
    """A lookup in a table [buckets, heads], whose result is added to the scores.

    Attributes:
        var: the result of the lookup.
        table: the table's numbers.
        symbol: stands for the result in elements.
        reads: the indices at which elements of the result were read.
    """

    var: relax.Var
    table: np.ndarray
    symbol: Any
    reads: list[list[Any]]

    @staticmethod
    def find(
        graph: Graph, values: Sequence[relax.Expr], tables: Mapping[relax.Var, np.ndarray]
    ) -> LearnedBias | None:
        """The only lookup in a table of floats that one of `values` is made of, None where there is none."""
        found = []
        for var in graph.ancestors(values):
            call = graph.definitions.get(var)
            if call is None or op_name(call) != "take" or int(call.attrs.axis or 0) != 0:
                continue
            data = graph.resolve(call.args[0])
            while op_name(data) == "astype" and (_dtype(data.args[0]), _dtype(data)) in _WIDER:
                data = graph.resolve(data.args[0])
            table = tables.get(data) if isinstance(data, relax.Var) else None
            if isinstance(data, tvm.ir.GenericConst):
                table = data.value.numpy()
            if table is not None and table.ndim == 2 and table.dtype.kind in "fV":
                found.append((var, table))
        if len(found) != 1:
            return None
        numbers = found[0][1].astype(np.float64)
        if not np.isfinite(numbers).all() or np.abs(numbers).max() > _MOST:
            return None
        return LearnedBias(found[0][0], numbers, tirx.Var("bias", "int64"), [])

    def leaf(self, analyzer: Any) -> Callable[[Index], Any]:
        """Elements of the result: the symbol, whatever it stands for."""
        analyzer.bind(self.symbol, tvm.ir.Range(int64(-int(_MOST)), int64(int(_MOST))), True)

        def read(index: Index) -> Any:
            self.reads.append(list(index))
            return Affine(0.0, ((self.symbol, 1.0),))

        return read

    def factor(self, number: Any) -> float:
        """How often the result is in a sum."""
        terms = number.terms if isinstance(number, Affine) else ()
        return float(sum(c for e, c in terms if isinstance(e, tirx.Var) and e.same_as(self.symbol)))

    def by_distance(
        self, elements: Elements, position: Any, key: Any, head: Any
    ) -> tuple[tuple[float, ...], ...]:
        """For every head what is added at distances 0, 1, ..; from the last on it is always the same.

        Raises Unprovable where the bucket may depend on more than the distance, or on rounding.
        """
        call = elements.graph.definitions[self.var]
        rank = len(dims(call.args[1]))
        first = self.reads[0]
        if any(str(index) != str(first) for index in self.reads):
            raise Unprovable("reads a learned bias at several places for one score")
        rest = first[rank:]
        if len(rest) != 1 or not isinstance(rest[0], tirx.Var) or not rest[0].same_as(head):
            raise Unprovable("adds a learned bias that is not one of each head")
        made_of = [v for v in elements.graph.ancestors([call.args[1]]) if isinstance(v.ty, relax.TensorType)]
        for dtype in sorted({_dtype(v) for v in made_of}.difference(_TYPES)):
            raise Unprovable(f"adds a learned bias by a bucket that is computed in {dtype}")
        span = Distances(elements, position, key).at(call.args[1], first[:rank])
        if not span.exact:
            raise Unprovable(
                "adds a learned bias whose bucket is not the same in any rounding, or never ends"
            )
        buckets = span.low.astype(np.int64)
        if buckets.min() < 0 or buckets.max() >= len(self.table):
            raise Unprovable("reads a learned bias outside its table")
        changes = np.flatnonzero(np.diff(buckets))
        last = int(changes[-1]) + 1 if len(changes) else 0
        return tuple(tuple(map(float, column[buckets[: last + 1]])) for column in self.table.T)


def _dtype(value: relax.Expr) -> str:
    return str(value.ty.dtype.dtype)
