"""One element of a tensor as a symbolic expression of its index.

Masks, positions and head layouts are small programs over shapes. Instead of running them on samples,
`Elements.at` follows the definitions of a value backwards for one symbolic index and returns an integer,
float or boolean expression of it. A claim about all elements is then a claim about one expression, which
`tvm.sym` can prove with its SMT solver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.sym import Analyzer, ProofStrength

from .affine import Affine
from .conditions import Choice, Unprovable, choose, is_condition
from .element_rules import RULES
from .graph import Graph, op_name, static

Index = Sequence[Any]
Leaf = Callable[[Index], Any]


class Elements:
    """Elements of the values of one function.

    Args:
        graph: the function.
        leaves: for parameters and values where the walk ends, the element at an index.
        analyzer: knows the bounds of the symbols in the indices.
    """

    def __init__(self, graph: Graph, leaves: dict[relax.Var, Leaf], analyzer: Analyzer) -> None:
        self.graph, self.leaves, self.analyzer = graph, leaves, analyzer
        self._memo: dict[tuple[relax.Var, str], Any] = {}

    def at(self, value: relax.Expr, index: Index) -> Any:
        """The element of `value` at `index`.

        Returns an int, float, bool, a tirx expression, or a Choice of such. Raises Unprovable.
        """
        if isinstance(value, relax.Var):
            if value in self.leaves:
                return self.leaves[value](index)
            if value not in self.graph.definitions:
                raise Unprovable(f"depends on the input '{value.name}'")
            key = (value, str([str(i) for i in index]))
            if key not in self._memo:
                self._memo[key] = self.at(self.graph.definitions[value], index)
            return self._memo[key]
        if isinstance(value, tvm.ir.GenericConst):
            return self._constant(value.value.numpy(), index)
        name = op_name(value) or type(value).__name__
        if name not in RULES:
            raise Unprovable(f"uses the operation {name}, which has no element rule")
        try:
            return RULES[name](self, value, index)
        except Unprovable:
            raise
        except Exception as error:  # expressions of types that TVM's operators do not combine
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise Unprovable(f"uses {name} in a form that has no element rule ({reason})") from error

    def simplify(self, value: Any) -> Any:
        if isinstance(value, (bool, int, float, Choice, Affine)):
            return value
        value = self.analyzer.simplify(value)
        if isinstance(value, tirx.IntImm):
            return bool(value.value) if is_condition(value) else int(value.value)
        if isinstance(value, tirx.FloatImm):
            return float(value.value)
        return value

    def prove(self, condition: Any) -> bool:
        if isinstance(condition, bool):
            return condition
        return bool(self.analyzer.can_prove(condition, ProofStrength.SYMBOLIC_BOUND))

    def _constant(self, array: np.ndarray, index: Index) -> Any:
        if array.size == 1:
            return array.reshape(-1)[0].item()
        known = [int(i) if isinstance(i, int) else static(i) for i in index]
        free = [axis for axis, i in enumerate(known) if i is None and array.shape[axis] > 1]
        part = array[tuple(slice(None) if a in free else (k or 0) for a, k in enumerate(known))]
        if not free:
            return part.item()
        if (part == part.reshape(-1)[0]).all():
            return part.reshape(-1)[0].item()
        if len(free) == 2:
            rows, columns = np.indices(part.shape)
            if np.array_equal(part == part[0, 0], columns <= rows) and np.unique(part).size == 2:
                return choose(index[free[1]] <= index[free[0]], part[0, 0].item(), part[0, -1].item())
        if len(free) == 1 and np.array_equal(part, np.arange(part.size)):
            return index[free[0]]
        raise Unprovable(
            f"reads a constant table of shape {list(array.shape)} that is neither uniform nor triangular"
        )
