"""Kernels that compute every row from the same row alone, proved from their loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tvm import IRModule, tirx
from tvm.ir import TensorLoad
from tvm.sym import Analyzer
from tvm_ffi import structural_equal, structural_map, structural_walk

from .base import Result
from .graph import static
from .loop_nests import Nest, nests_of

ROWS: Final = "kvc.rows"
"""Attribute of kernels that compute every row of what they write from the same row of what they read."""


@dataclass(frozen=True)
class ProveRows:
    """Mark the kernels that work row by row; a call for some of the rows then computes those.

    Before: PrimFuncs as legalization and fusion make them; products are marked by the pass that calls them.
    After: the same, with the attribute `kvc.rows` where it is proved.
    Needs: FuseTIR; kernels that are not scheduled yet.
    Refuses: nothing; what is not proved is not marked.
    """

    def run(self, mod: IRModule) -> Result:
        functions, count = dict(mod.functions_items()), 0
        for name, function in functions.items():
            if is_rowwise(function):
                functions[name] = function.with_attr(ROWS, True)
                count += 1
        return Result(IRModule(functions), count)


def row_axis(shape: Any) -> int | None:
    """The axis of rows: all before it are 1, all behind it known. None for a shape that has none.

    Raises ValueError where rows stand behind another axis, or there are several.
    """
    open_ = [axis for axis, dim in enumerate(shape) if static(dim) is None]
    if not open_:
        return None
    if len(open_) > 1 or any(static(dim) != 1 for dim in shape[: open_[0]]):
        raise ValueError("the rows are not the outermost axis")
    return open_[0]


def is_rowwise(function: Any) -> bool:
    """Whether every row of all buffers of a kernel is computed from the same row of others, and from nothing
    that depends on which row it is or on how many there are."""
    nests = nests_of(function)
    if nests is None:
        return False
    buffers = [*filter(tirx.is_buffer_var, function.params), *function.body.block.alloc_buffers]
    try:
        axes = {buffer: row_axis(buffer.shape) for buffer in buffers}
    except ValueError:
        return False
    extents = [buffer.shape[axis] for buffer, axis in axes.items() if axis is not None]
    if not extents or not all(_equal(extents[0], extent) for extent in extents):
        return False
    return all(_keeps_rows(nest, axes, extents[0]) for nest in nests)


def _equal(a: Any, b: Any) -> bool:
    """Whether two extents are the same, such as 2 * n and n * 2."""
    return bool(structural_equal(a, b) or Analyzer().can_prove_equal(a, b))


def _keeps_rows(nest: Nest, axes: dict[Any, int | None], extent: Any) -> bool:
    """Whether a nest computes rows from the same rows; what has no rows, from what has none."""
    variables = {v.var: v for v in nest.block.iter_vars}
    axis = axes.get(nest.store.buffer)
    row = None if axis is None else nest.store.indices[axis]
    if row is not None:
        own = variables.pop(row, None) if isinstance(row, tirx.Var) else None
        if own is None or own.iter_type != tirx.IterVar.DataPar:
            return False
        if static(own.dom.min) != 0 or not _equal(own.dom.extent, extent):
            return False
    if any(static(v.dom.extent) is None for v in variables.values()):
        return False
    others = [index for place, index in enumerate(nest.store.indices) if place != axis]
    values = [nest.store.value] + ([] if nest.block.init is None else [nest.block.init.value])
    return all(_is_free(part, row, axes, variables) for part in (*others, *values))


def _is_free(part: Any, row: Any, axes: dict[Any, int | None], variables: dict[Any, Any]) -> bool:
    """Whether an expression reads row `row` alone, and nothing else of it depends on rows or their number."""
    known, strange = set(variables), []

    def check(expression: Any) -> None:
        structural_walk(expression, (tirx.Var, lambda v: None if v in known else strange.append(v)))

    def load(found: Any) -> Any:  # the innermost first: those in its indices are variables by now
        axis = axes.get(found.source)
        for place, index in enumerate(found.indices):
            if place != axis:
                check(index)
            elif row is None or not index.same_as(row):
                strange.append(found)
        known.add(value := tirx.Var("loaded", found.ty.dtype))
        return value

    check(structural_map(part, [(TensorLoad, load)]))
    return not strange
