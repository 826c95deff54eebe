"""Schedules for products that TVM generates: register tiles of several rows by a few vectors."""

from __future__ import annotations

import math
from typing import Any

from tvm import s_tir, tirx
from tvm.ir import TensorLoad
from tvm.sym import Analyzer
from tvm.tirx.analysis import undefined_vars
from tvm_ffi import structural_walk

from .traits import CpuTraits

_SPARE = 4
"""Vector registers that are no sums: a vector of each operand and what addresses take."""
WORTH_THREADS = 16384
"""Points of a loop nest from which it is worth waking other threads for."""
_DEPTH = 4
"""Sums of fewer terms are not worth a tile."""


def schedule_contraction(s: s_tir.Schedule, traits: CpuTraits, threads: bool) -> bool:
    """Schedule a function of one sum of products, and perhaps what is computed from it element by element.

    The sum of an element runs over its terms in their order, whatever the tiles and however many rows there
    are, so a slice of the rows has the same numbers.

    Args:
        s: of one function; blocks that could be inlined are.
        threads: whether to spread the tiles over threads.

    Returns: False for another form, which is left as it is: another number of blocks, symbolic extents, a
        last axis along which no operand is contiguous, or that is no whole number of vectors.
    """
    blocks = list(s.get_child_blocks(s.get_sblock("root")))
    if not 1 <= len(blocks) <= 2 or not _contracts(s.get(blocks[0]), traits.lanes):
        return False
    total = blocks[0]
    if len(blocks) == 2 and not _elementwise(s.get(total), s.get(blocks[1])):
        return False
    if len(blocks) == 1:
        s.cache_write(total, 0, "local")
    else:
        s.set_scope(total, 0, "local")
    result = s.get_consumers(total)[0]
    loops = s.get_loops(result)
    extents = [int(s.get(loop).extent) for loop in loops]
    row, column = _row(s.get(total)), len(loops) - 1
    height, width = _tile(1 if row is None else extents[row], extents[column], traits)
    outer = [loop for i, loop in enumerate(loops) if i not in (row, column)]
    across, inner = s.split(loops[column], [None, width])
    tiles, tile = [across], [inner]
    if row is not None:
        down, rows = s.split(loops[row], [None, height])
        tiles, tile = [across, down], [rows, inner]
    s.reorder(*outer, *tiles, *tile)
    last = tiles[-1]
    if threads and math.prod(int(v.dom.extent) for v in s.get(total).iter_vars) >= WORTH_THREADS:
        last = _spread(s, [*outer, *tiles], traits.threads)
    s.compute_at(total, last, preserve_unit_loops=True)
    _sum_of_tile(s, total, traits.lanes)
    _vectors(s, tile, traits.lanes)
    return True


def _contracts(block: Any, lanes: int) -> bool:
    """Whether a block sums products of which one factor is contiguous along the last axis of the output."""
    variables = list(block.iter_vars)
    if not all(isinstance(v.dom.extent, tirx.IntImm) for v in variables) or block.init is None:
        return False
    spatial = [v for v in variables if v.iter_type == tirx.IterVar.DataPar]
    terms = [v for v in variables if v.iter_type == tirx.IterVar.CommReduce]
    if not spatial or not terms or variables != [*spatial, *terms] or not _stores(block, spatial):
        return False
    last = spatial[-1]
    loads = [load for load in _loads(block) if not load.source.same_as(block.body.buffer)]
    if (
        int(last.dom.extent) % lanes
        or math.prod(int(v.dom.extent) for v in terms) < _DEPTH
        or len(loads) != 2
    ):
        return False
    along = [load for load in loads if any(last.var.same_as(v) for v in _used(load))]
    return bool(along) and all(
        _moves_with(load.indices[-1], last.var)
        and not any(last.var.same_as(v) for index in list(load.indices)[:-1] for v in undefined_vars(index))
        for load in along
    )


def _moves_with(index: Any, variable: Any) -> bool:
    """Whether an index is a variable and what does not depend on it, such as where a slice begins."""
    rest = Analyzer().simplify(index - variable)
    return not any(variable.same_as(v) for v in undefined_vars(rest))


def _stores(block: Any, spatial: list[Any]) -> bool:
    """Whether a block stores at the place that its variables are, or that much further."""
    return isinstance(block.body, tirx.BufferStore) and _at_place(block.body.indices, spatial)


def _at_place(indices: Any, spatial: list[Any]) -> bool:
    """Whether indices are these variables, each moved by a constant; an axis of one element is one, too."""
    if len(indices) != len(spatial):
        return False
    analyzer = Analyzer()
    for variable in spatial:
        analyzer.bind(variable.var, variable.dom)
    return all(
        isinstance(analyzer.simplify(index - variable.var), tirx.IntImm)
        for index, variable in zip(indices, spatial)
    )


def _elementwise(total: Any, result: Any) -> bool:
    """Whether a block computes each element from one sum, those of neighbours from neighbours."""
    variables = list(result.iter_vars)
    if any(v.iter_type != tirx.IterVar.DataPar for v in variables) or not _stores(result, variables):
        return False
    own = [load for load in _loads(result) if load.source.same_as(total.body.buffer)]
    return all(_at_place(load.indices, variables) for load in own)


def _loads(block: Any) -> list[Any]:
    found: list[Any] = []
    structural_walk(block.body.value, (TensorLoad, found.append))
    return found


def _used(load: Any) -> list[Any]:
    return [v for index in load.indices for v in undefined_vars(index)]


def _row(block: Any) -> int | None:
    """The last axis that a factor along the columns does not depend on: it is loaded once for several."""
    spatial = [v for v in block.iter_vars if v.iter_type == tirx.IterVar.DataPar]
    last = spatial[-1].var
    along = [load for load in _loads(block) if any(last.same_as(v) for v in _used(load))]
    along = [load for load in along if not load.source.same_as(block.body.buffer)]
    for number in reversed(range(len(spatial) - 1)):
        free = not any(spatial[number].var.same_as(v) for load in along for v in _used(load))
        if free and int(spatial[number].dom.extent) > 1:
            return number
    return None


def _tile(rows: int, columns: int, traits: CpuTraits) -> tuple[int, int]:
    """Rows and columns of a tile: both divide, its sums fit the registers, few loads for a product."""
    best, found = 0.0, (1, traits.lanes)
    for vectors in (1, 2, 3, 4):
        if columns % (vectors * traits.lanes):
            continue
        for height in range(1, rows + 1):
            if rows % height or (height + 1) * vectors > traits.registers - _SPARE:
                continue
            worth = height * vectors / (height + vectors)
            if worth > best:
                best, found = worth, (height, vectors * traits.lanes)
    return found


def _spread(s: s_tir.Schedule, loops: list[Any], threads: int) -> Any:
    """Fuse the outermost loops until there is enough for every thread; the last of what is left."""
    count, used = 1, 0
    while used < len(loops) and (used == 0 or count < 2 * threads):
        count *= int(s.get(loops[used]).extent)
        used += 1
    outermost = s.fuse(*loops[:used]) if used > 1 else loops[0]
    if count > 1:
        s.parallel(outermost)
    return loops[-1] if used < len(loops) else outermost


def _sum_of_tile(s: s_tir.Schedule, total: Any, lanes: int) -> None:
    """The tile in the block's own loops, terms outside of it; its start apart."""
    loops = s.get_loops(total)
    variables = list(s.get(total).iter_vars)
    own = loops[-len(variables) :]
    spatial = [loop for loop, v in zip(own, variables) if v.iter_type == tirx.IterVar.DataPar]
    terms = [loop for loop, v in zip(own, variables) if v.iter_type == tirx.IterVar.CommReduce]
    s.reorder(*terms, *spatial)
    _vectors(s, spatial, lanes)  # first: what is left of a sum without its start is no reduction
    start = s.decompose_reduction(total, terms[0])
    s.vectorize(s.get_loops(start)[-1])


def _vectors(s: s_tir.Schedule, tile: list[Any], lanes: int) -> None:
    for loop in tile[:-1]:
        s.unroll(loop)
    vectors, lane = s.split(tile[-1], [None, lanes])
    s.unroll(vectors)
    s.vectorize(lane)
