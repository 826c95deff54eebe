"""Schedules for the functions that TVM generates: element-wise, gathers, and reductions of rows."""

from __future__ import annotations

import logging
import math
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.ir import Call, TensorLoad, TensorRegion
from tvm_ffi import structural_map, structural_walk

from .contraction import WORTH_THREADS, schedule_contraction
from .convolution import convolution_kernel
from .read_convolution import read_convolution
from .traits import CpuTraits

_LOG = logging.getLogger(__name__)
_UNROLL = 8
_COSTLY = frozenset(["exp", "tanh", "sigmoid", "erf", "sqrt", "rsqrt", "sin", "cos", "log", "pow", "power"])


def schedule_elementwise(func: tirx.PrimFunc, traits: CpuTraits, parallel: bool) -> tirx.PrimFunc:
    """A generated PrimFunc with its producers inlined, rows on threads when `parallel`, and vectorised.

    Functions that are already scheduled, and those of a form that the steps do not fit, come back as they
    are. Reductions over the last axis keep one partial result a lane, so sums may round differently.
    """
    if func.attrs is not None and func.attrs.get("tirx.is_scheduled", False):
        return func
    try:
        apart = _with_input_apart(func)
        result = _scheduled(apart, traits, parallel)
        if apart is not func:
            result = result.specialize({result.params[0]: result.params[-1]})
    except Exception as error:  # TVM raises many kinds; an unscheduled function is slow, not wrong
        _LOG.debug("left unscheduled: %s", error)
        return func
    return result.with_attr("tirx.is_scheduled", True)


def _scheduled(func: tirx.PrimFunc, traits: CpuTraits, parallel: bool) -> tirx.PrimFunc:
    """In the first way that fits: tiles of pixels, of rows and columns, of columns; rows and lanes."""
    for tiles in (_Scheduler.pixels, _Scheduler.product, _Scheduler.convolution):
        try:
            if (found := tiles(_Scheduler(func, traits, parallel))) is not None:
                return found
        except Exception as error:  # a form that the tiles do not fit after all
            _LOG.debug("without tiles: %s", error)
    return _Scheduler(func, traits, parallel).rows_and_lanes()


def _with_input_apart(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """A function whose output holds an input when it starts, with that as another first parameter.

    What is read before it is written, in one block or in several, cannot be scheduled. It may be that one
    buffer again in any schedule, since an element is read only for the element at the same place. What a
    block reads that an earlier one wrote is no input: such a function stays as it is.
    """
    if not func.params or not tirx.is_buffer_var(func.params[-1]):
        return func
    output = func.params[-1]
    writes: list[bool] = []
    inputs: list[bool] = []

    def look(block: Any) -> None:
        if isinstance(block.body, tirx.BufferStore):
            if block.init is None and any(r.source.same_as(output) for r in block.reads):
                inputs.append(not any(writes))
            writes.append(block.body.buffer.same_as(output))

    structural_walk(func.body, [(s_tir.SBlock, look)])
    if not inputs or not all(inputs):
        return func
    before = tirx.decl_buffer(output.shape, str(output.dtype), "before")

    def load(old: Any) -> Any:
        return tirx.BufferLoad(before, old.indices) if old.source.same_as(output) else old

    def block(old: Any) -> Any:
        reads = [TensorRegion(before, r.region, r.ty) if r.source.same_as(output) else r for r in old.reads]
        return s_tir.SBlock(
            old.iter_vars,
            reads,
            old.writes,
            old.name_hint,
            structural_map(old.body, [(TensorLoad, load)]),
            old.init,
            old.alloc_buffers,
            old.match_buffers,
            old.annotations,
        )

    def statement(old: Any) -> Any:
        if isinstance(old, tirx.For):
            return tirx.For(old.loop_var, old.min, old.extent, old.kind, statement(old.body))
        if isinstance(old, tirx.SeqStmt):
            return tirx.SeqStmt([statement(part) for part in old.seq])
        inner = old.block
        if not isinstance(inner.body, tirx.BufferStore):
            new = s_tir.SBlock(
                [], [], [], inner.name_hint, statement(inner.body), alloc_buffers=inner.alloc_buffers
            )
            return s_tir.SBlockRealize(old.iter_values, old.predicate, new)
        return s_tir.SBlockRealize(
            old.iter_values, old.predicate, block(inner) if inner.init is None else inner
        )

    return tirx.PrimFunc([before, *func.params], statement(func.body), func.ret_type, attrs=func.attrs)


def _calls(node: Any) -> set[str]:
    names: set[str] = set()
    structural_walk(node, (Call, lambda call: names.add(getattr(call.op, "name", "").rpartition(".")[2])))
    return names


def _static(extent: Any) -> int | None:
    return int(extent) if isinstance(extent, tvm.tirx.IntImm) else None


class _Scheduler:
    def __init__(self, func: tirx.PrimFunc, traits: CpuTraits, parallel: bool) -> None:
        self.traits, self.parallel = traits, parallel
        self.symbol = "main"
        # A schedule writes into a body that another function holds, too: it asks only whether parts of it are
        # held elsewhere.
        func = s_tir.renew_defs(func)
        module = tvm.IRModule({self.symbol: func.with_attr("global_symbol", self.symbol)})
        self.name = func.attrs.get("global_symbol", None) if func.attrs is not None else None
        self.s = s_tir.Schedule(module)
        self.branches = "if_then_else" in _calls(func.body)

    def pixels(self) -> tirx.PrimFunc | None:
        """As register tiles of a convolution over rows of pixels; None for another form."""
        return self.convolution(rows=True)

    def convolution(self, rows: bool = False) -> tirx.PrimFunc | None:
        """As register tiles of a convolution; None for another form. rows: over rows of pixels alone."""
        self._inline(windows=False)
        params, blocks = list(self.s.mod[self.symbol].params), [self.s.get(b) for b in self._blocks()]
        sums = [i for i, block in enumerate(blocks) if block.init is not None]
        if len(sums) != 1 or sums[0] > 1 or len(blocks) - sums[0] > 2:
            return None
        fill, result = [None, blocks[0]][sums[0]], [*blocks, None][sums[0] + 1]
        found = read_convolution(params, fill, blocks[sums[0]], result)
        if found is None or (rows and found.row is None):
            return None
        func = convolution_kernel(found, self.traits, self.parallel)
        return None if func is None else self._named(func)

    def product(self) -> tirx.PrimFunc | None:
        """As register tiles of a product; None for another form."""
        self._inline()
        return self._finished() if schedule_contraction(self.s, self.traits, self.parallel) else None

    def rows_and_lanes(self) -> tirx.PrimFunc:
        """In loops over rows of the output, vectors along their elements."""
        self._inline()
        self._rows_and_lanes()
        return self._finished()

    def _finished(self) -> tirx.PrimFunc:
        func = self.s.mod[self.symbol]
        if self.branches:
            # Ranges of a concatenation become constant before the vectoriser looks at them.
            func = tirx.transform.UnrollLoop()(tvm.IRModule({self.symbol: func}))[self.symbol]
        return self._named(func)

    def _named(self, func: tirx.PrimFunc) -> tirx.PrimFunc:
        if self.name is not None:
            return func.with_attr("global_symbol", self.name)
        return func.without_attr("global_symbol")

    def _rows_and_lanes(self) -> None:
        """Everything in one loop over rows of the output, vectors along their elements."""
        self._split_reductions()
        blocks = self._blocks()
        roots = [b for b in blocks if not self.s.get_consumers(b)]
        for root in roots:
            rows = self._rows(root)
            if rows is not None and len(roots) == 1:
                for block in reversed(blocks):
                    if self.s.get(block).name_hint != self.s.get(root).name_hint:
                        self._try(lambda block=block, rows=rows: self.s.compute_at(block, rows, True))
        self._threads()  # before reductions are decomposed, which the check of parallel loops does not accept
        for block in self._blocks():
            self._vectorize(block)

    def _try(self, step: Any) -> Any:
        try:
            return step()
        except Exception as error:  # a primitive that does not apply leaves the schedule unchanged
            _LOG.debug("schedule step skipped: %s", error)
            return None

    def _blocks(self) -> list[Any]:
        return list(self.s.get_child_blocks(self.s.get_sblock("root")))

    def _spatial(self, block: Any) -> bool:
        return all(v.iter_type == tirx.IterVar.DataPar for v in self.s.get(block).iter_vars)

    def _points(self, block: Any) -> tuple[int, int]:
        """Size of a block's domain, as (symbolic dimensions, product of the others)."""
        unknown, product = 0, 1
        for var in self.s.get(block).iter_vars:
            size = _static(var.dom.extent)
            unknown, product = (unknown + 1, product) if size is None else (unknown, product * size)
        return unknown, product

    def _inline(self, windows: bool = True) -> None:
        """Inline injective producers, unless that repeats costly work; `windows`: also what a sum pads."""
        for block in self._blocks():
            consumers = self.s.get_consumers(block)
            if not consumers or not self._spatial(block):
                continue
            repeats = len(consumers) > 1 or self._points(block) < max(self._points(c) for c in consumers)
            if repeats and _calls(self.s.get(block).body) & _COSTLY:
                continue
            pads = "if_then_else" in _calls(self.s.get(block).body)
            if pads and not windows and not all(map(self._spatial, consumers)):
                continue
            self._try(lambda block=block: self.s.compute_inline(block))

    def _split_reductions(self) -> None:
        """Give reductions over a static last axis one accumulator a lane."""
        for block in self._blocks():
            variables = self.s.get(block).iter_vars
            kinds = [v.iter_type == tirx.IterVar.CommReduce for v in variables]
            extent = _static(variables[-1].dom.extent) if variables else None
            if sum(kinds) != 1 or not kinds[-1] or extent is None or extent % self.traits.lanes:
                continue
            if extent < 2 * self.traits.lanes:
                continue
            _, lane = self.s.split(self.s.get_loops(block)[-1], [None, self.traits.lanes])
            axis = len(variables) - 1
            self._try(lambda lane=lane, axis=axis: self.s.rfactor(lane, axis))

    def _rows(self, root: Any) -> Any:
        """The fused outer loops of an output block; None when it has but one loop."""
        loops = self.s.get_loops(root)
        if len(loops) < 2:
            return None
        return self.s.fuse(*loops[:-1]) if len(loops) > 2 else loops[0]

    def _vectorize(self, block: Any) -> None:
        """Vectorise the last data-parallel loop of a block where its extent divides."""
        lanes = self.traits.lanes
        loops = self.s.get_loops(block)
        variables = self.s.get(block).iter_vars
        if not loops or not variables:
            return
        last = loops[-1]
        if not self._spatial(block):
            if str(self.s.get(block).name_hint).endswith("_rf"):
                self._try(lambda: self._vectorize_partial(block, loops))
            return
        extent = _static(self.s.get(last).extent)
        if extent is None or extent % lanes:
            return
        outer, inner = self.s.split(last, [None, lanes])
        self.s.vectorize(inner)
        if self.branches and extent // lanes <= _UNROLL:
            self.s.unroll(outer)

    def _vectorize_partial(self, block: Any, loops: list[Any]) -> None:
        lane = next(loop for loop in reversed(loops) if _static(self.s.get(loop).extent) == self.traits.lanes)
        steps = next(loop for loop in reversed(loops) if not loop.same_as(lane))
        self.s.reorder(steps, lane)
        self.s.vectorize(lane)
        self.s.decompose_reduction(block, steps)

    def _threads(self) -> None:
        """Spread the outermost loop of every nest over the threads where there is enough to do."""
        if not self.parallel:
            return
        seen: set[Any] = set()
        for block in self._blocks():
            loops = self.s.get_loops(block)
            if not loops:
                continue
            sizes = [_static(self.s.get(loop).extent) for loop in loops]
            large = None in sizes or math.prod(size or 1 for size in sizes) >= WORTH_THREADS
            outer = self.s.get(loops[0])
            if outer.loop_var in seen or outer.kind != tirx.ForKind.SERIAL:
                continue
            seen.add(outer.loop_var)
            if large:
                self._try(lambda loop=loops[0]: self.s.parallel(loop))
