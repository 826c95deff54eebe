"""Kernels that compute a box of what another one computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import s_tir, tirx
from tvm.ir import Range as TvmRange
from tvm.ir import TensorLoad, TensorRegion
from tvm.sym import Analyzer
from tvm_ffi import structural_map

from .boxes import Access, Box, Step, extents, whole
from .graph import static


def sliced(access: Access, box: Box, held: Sequence[Box | None], into_whole: bool) -> tirx.PrimFunc:
    """The kernel that computes the elements of `box` of the output, each as the given kernel does.

    Args:
        access: the kernel.
        box: of the output.
        held: for every input the box of it that is passed in its place, None for all of it.
        into_whole: write the box into a buffer of the whole output, the rest of which stays; otherwise the
            output has the extents of the box.

    Conditions such as those of padding keep the coordinates of the whole, so loops count from 0 and their
    variables are shifted; places in buffers that are parts are shifted back.
    """
    kernel, needed = access.kernel, access.needed(box)
    parts = {buffer: needed.buffers[buffer] for buffer in kernel.locals if buffer in needed.buffers}
    parts |= {buffer: part for buffer, part in zip(kernel.inputs, held, strict=True) if part is not None}
    if not into_whole:
        parts[kernel.output] = box
    new = {
        buffer: _Part(buffer, parts.get(buffer))
        for buffer in (*kernel.inputs, *kernel.locals, kernel.output)
        if buffer in needed.buffers or buffer not in kernel.locals
    }
    nests = [
        _nest(step, domain, new)
        for step, domain in zip(access.steps, needed.domains, strict=True)
        if domain is not None
    ]
    body = nests[0] if len(nests) == 1 else tirx.SeqStmt(nests)
    own = [new[buffer].buffer for buffer in kernel.locals if buffer in new]
    root = s_tir.SBlock([], [], [], "root", body, alloc_buffers=own)
    function = kernel.function
    params = [new[buffer].buffer for buffer in (*kernel.inputs, kernel.output)]
    return tirx.PrimFunc(
        params, s_tir.SBlockRealize([], True, root), function.ret_type, attrs=function.attrs
    ).without_attr("global_symbol")


class _Part:
    """A buffer of a kernel, or the box of it that takes its place."""

    def __init__(self, buffer: Any, box: Box | None) -> None:
        shape = tuple(static(dim) or 0 for dim in buffer.shape)
        self.offsets = [low for low, _ in box or whole(shape)]
        sizes = [tirx.IntImm("int64", size) for size in (extents(box) if box else shape)]
        self.buffer = tirx.decl_buffer(sizes, str(buffer.dtype), str(buffer.name))

    def places(self, indices: Sequence[Any], analyzer: Analyzer) -> list[Any]:
        return [
            analyzer.simplify(index - offset if offset else index)
            for index, offset in zip(indices, self.offsets, strict=True)
        ]


def _nest(step: Step, domain: Box, parts: dict[Any, _Part]) -> Any:
    """The loops of a nest over a part of its domain."""
    block = step.nest.block
    analyzer = Analyzer()
    iterators, loops, values = [], [], {}
    for variable, (low, high) in zip(block.iter_vars, domain, strict=True):
        dtype = str(variable.var.ty.dtype)
        over = TvmRange.from_min_extent(tirx.IntImm(dtype, 0), tirx.IntImm(dtype, high - low))
        own = tirx.Var(variable.var.name, dtype)
        analyzer.bind(own, over)
        iterators.append(tirx.IterVar(over, own, variable.iter_type))
        loops.append(tirx.Var(f"i_{variable.var.name}", dtype))
        values[variable.var] = own + tirx.IntImm(dtype, low) if low else own

    def load(old: Any) -> Any:
        part = parts.get(old.source)
        return old if part is None else tirx.BufferLoad(part.buffer, part.places(old.indices, analyzer))

    def moved(value: Any) -> Any:
        return structural_map(value, [(TensorLoad, load), (tirx.Var, lambda v: values.get(v, v))])

    def region(old: Any) -> Any:
        part = parts[old.source]
        firsts = part.places([moved(r.min) for r in old.region], analyzer)
        ranges = [TvmRange.from_min_extent(at, r.extent) for at, r in zip(firsts, old.region)]
        return TensorRegion(part.buffer, ranges, old.ty)

    def store(old: Any) -> Any:
        part = parts[old.buffer]
        places = part.places([moved(index) for index in old.indices], analyzer)
        return tirx.BufferStore(part.buffer, moved(old.value), places)

    new = s_tir.SBlock(
        iterators,
        [region(r) for r in block.reads],
        [region(r) for r in block.writes],
        block.name_hint,
        store(step.nest.store),
        None if block.init is None else store(block.init),
        annotations=block.annotations,
    )
    body: Any = s_tir.SBlockRealize(loops, True, new)
    for loop, variable in zip(reversed(loops), reversed(iterators), strict=True):
        body = tirx.For(loop, variable.dom.min, variable.dom.extent, tirx.ForKind.SERIAL, body)
    return body
