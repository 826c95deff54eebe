"""One element of a tensor as a symbolic expression of its index.

Masks, positions and head layouts are small programs over shapes. Instead of running them on samples,
`Elements.at` follows the definitions of a value backwards for one symbolic index and returns an integer,
float or boolean expression of it. A claim about all elements is then a claim about one expression, which
`tvm.sym` can prove with its SMT solver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.sym import Analyzer, ProofStrength

from .affine import Affine
from .conditions import Choice, Unprovable, is_condition
from .element_rules import RULES
from .graph import Graph, op_name
from .tables import read_table

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
            return read_table(value.value.numpy(), index)
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
