"""The rows at which an encoder reads its tables: proved to be there, up to a longest request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import relax, tirx
from tvm.sym import Analyzer

from kvc_passes.conditions import Unprovable, as_condition, is_condition, lift
from kvc_passes.element import Elements
from kvc_passes.errors import UnsupportedModel
from kvc_passes.facts import EncoderInput
from kvc_passes.graph import Graph, dims, op_name, static
from kvc_passes.indices import bind_extent, bind_index, int64
from kvc_passes.spans import Span

from .frontend.encoders import ImportedEncoder
from .index_spans import Spans
from .planning.budget import LONGEST, most_of


def longest_read(imported: ImportedEncoder, graph: Graph, inputs: Sequence[EncoderInput]) -> int:
    """The longest request whose indices all have a row in the tables that are read at them.

    Masks are all ones, ids are below their bound.

    Raises:
        UnsupportedModel: an index cannot be proved to be in its table, not even for the shortest request.
    """
    given = dict(zip(graph.function.params, inputs))
    most = LONGEST
    for var in graph.order:
        call = graph.definitions[var]
        try:
            if op_name(call) == "take":
                most = min(most, _longest_take(graph, given, call))
            elif op_name(call) in ("gather_nd", "gather_elements"):
                _check_gather(graph, given, call)
        except Unprovable as error:
            path, node = imported.file.path, imported.names.describe(var)
            raise UnsupportedModel(f"{path}: {node} reads a table at an index that {error}") from error
    return most


def _longest_take(graph: Graph, given: Mapping[relax.Var, EncoderInput], call: relax.Call) -> int:
    rows = dims(call.args[0])[int(call.attrs.axis or 0)]
    count = static(rows)
    least = 0 if str(call.attrs.mode) == "clip" else -rows  # below 0 a row from the end
    if count is None:
        _prove(graph, given, call.args[1], None, rows, least)
        return LONGEST

    def read(extent: int) -> Span:
        return Spans(graph, given, extent).of(call.args[1])

    def within(extent: int) -> bool:
        span = read(extent)
        return bool(span.low.min() >= int(least) and span.high.max() < count)

    longest = most_of(LONGEST, within)
    if not longest:
        span = read(1)
        raise Unprovable(f"may be {span.low.min():.0f} .. {span.high.max():.0f}; the table has {count} rows")
    return longest


def _check_gather(graph: Graph, given: Mapping[relax.Var, EncoderInput], call: relax.Call) -> None:
    """Raises Unprovable."""
    data, indices = call.args[:2]
    if op_name(call) == "gather_elements":
        _prove(graph, given, indices, None, dims(data)[int(call.attrs.axis)])
        return
    width, first = static(dims(indices)[-1]), int(call.attrs.batch_dims)
    if width is None:
        raise Unprovable("has an unknown number of components")
    for component in range(width):
        _prove(graph, given, indices, component, dims(data)[first + component])


def _prove(
    graph: Graph,
    given: Mapping[relax.Var, EncoderInput],
    indices: relax.Expr,
    component: int | None,
    rows: Any,
    least: Any = 0,
) -> None:
    """Prove all indices, or a component of them, to be least .. rows - 1. Raises Unprovable."""
    analyzer = Analyzer()
    shape = dims(indices)
    for symbol in {d for d in (*shape, rows) if isinstance(d, tirx.Var)}:
        bind_extent(analyzer, symbol, 1)
    index: list[Any] = [bind_index(analyzer, f"i{axis}", extent) for axis, extent in enumerate(shape)]
    if component is not None:
        index[-1] = component
    ones = {p: _one(p) for p, i in given.items() if i.mask}
    elements = Elements(graph, ones, analyzer)
    at = elements.at(indices, index)

    def is_row(i: Any) -> Any:
        if not isinstance(i, (int, tirx.Expr)) or is_condition(i):
            raise Unprovable("is no integer expression")
        return tirx.And(int64(i) >= int64(least), int64(i) < int64(rows))

    within = as_condition(lift(is_row, at))
    if not elements.prove(within):
        raise Unprovable(f"cannot be proved to be one of its {rows} rows")


def _one(param: relax.Var) -> Callable[[Any], Any]:
    return lambda index: True if str(param.ty.dtype.dtype) == "bool" else 1
