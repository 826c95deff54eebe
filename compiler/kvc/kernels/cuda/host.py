"""CUDA's kernels as the passes ask for them: functions of the host that launch what Triton compiles.

A launch is `call_packed(name, *arguments, null, null, threads, grid x, y, z, shared)`, the form in which
TVM's CUDA modules are called; the two pointers are Triton's scratch memory, which kvc's kernels do not use.
How much shared memory a kernel takes is known when it is compiled: until then SHARED stands there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tvm import tirx
from tvm.tirx import PrimFunc

from kvc_passes.facts import AttentionSite, WeightFormat
from kvc_passes.kernel_sets import TensorType

from ..attention import AttentionShape
from ..emit import Emitter, Expr, argument, i64, size_var
from ..shapes import attention_shape
from . import attention, products, rows
from .device import DeviceKernel

PAGE_SIZE = 64  # tokens; a block of keys of most kernels, and a tile that Hopper's copy engine can fetch
SHARED = -1
"""Stands for the bytes of shared memory of a launch until its kernel is compiled."""
_LONG = 1 << 20
_WORTH = 128
"""Keys for which a block of threads is worth starting."""
FULL = 132 * 2
"""Blocks that fill a large GPU: two for each of an H100's processors."""

Kernels = dict[str, DeviceKernel]


@dataclass(frozen=True)
class CudaAttention:
    """Implements kvc_passes.kernel_sets.AttentionKernels.

    Attributes:
        kernels: filled with the kernels that the functions launch, by name.
        tile: query tokens of one prefill task.
        context: most tokens of a sequence.
        arch: the architecture that blocks are chosen for, such as 90; others run them, too.
        page_size: tokens a page.
    """

    kernels: Kernels = field(repr=False, compare=False)
    tile: int
    context: int
    arch: int
    page_size: int = PAGE_SIZE
    keys_transposed: bool = False

    @classmethod
    def for_sites(
        cls, sites: tuple[AttentionSite, ...], context: int | None, arch: int, kernels: Kernels
    ) -> CudaAttention:
        """One tile size for all sites, the smallest that one of them takes."""
        tile = min(attention.choose_tile(s.group, max(s.head_dim, s.value_dim)) for s in sites)
        return cls(kernels, tile, context or _LONG, arch)

    def splits(self, site: AttentionSite) -> int:
        """Shares for one sequence to fill the GPU, as far as they have keys worth a block of threads."""
        seen = min(self.context, site.mask.window or _LONG, site.mask.chunk or _LONG)
        return max(1, min(64, FULL // site.kv_heads, seen // _WORTH))

    def append(self, site: AttentionSite, dtype: str) -> PrimFunc:
        shape = replace(
            attention_shape(site, self.page_size), scale=1.0, softcap=None, window=None, chunk=None
        )
        kernel = attention.append_kernel(shape, dtype)
        e, n, pages = Emitter(), size_var("n"), size_var("pages")
        k = argument("k", (1, shape.kv_heads, n, shape.head_dim), dtype)
        v = argument("v", (1, shape.kv_heads, n, shape.value_dim), dtype)
        slots = argument("slots", (n,), "int32")
        kpool, vpool = self._pools(site, pages)
        values = {"k": k, "v": v, "slots": slots, "kpool": kpool, "vpool": vpool, "n": n}
        self._launch(e, kernel, values, (_parts(n, attention.APPEND_TOKENS), shape.kv_heads))
        return e.function([k, v, slots, kpool, vpool], [k, v, slots], [kpool, vpool])

    def prefill(self, site: AttentionSite, dtype: str) -> PrimFunc:
        shape = attention_shape(site, self.page_size)
        kernel = attention.prefill_kernel(shape, self.tile, dtype, self.arch)
        e = Emitter()
        n, pages, t, b, m = (size_var(s) for s in ("n", "pages", "t", "b", "m"))
        kpool, vpool = self._pools(site, pages)
        inputs = {
            "q": argument("q", (1, shape.heads, n, shape.head_dim), dtype),
            "kpool": kpool,
            "vpool": vpool,
            "positions": argument("positions", (n,), "int64"),
            "tiles": argument("tiles", (t, 3), "int32"),
            "table": argument("block_table", (b, m), "int32"),
            **_extras(shape),
        }
        out = argument("out", (1, n, shape.heads, shape.value_dim), dtype)
        self._launch(e, kernel, {**inputs, "out": out, "n": n, "width": m}, (t, shape.kv_heads))
        return e.function([*inputs.values(), out], list(inputs.values()), [out])

    def decode(self, site: AttentionSite, dtype: str) -> PrimFunc:
        shape, splits = attention_shape(site, self.page_size), self.splits(site)
        kernel = attention.decode_kernel(shape, splits, dtype)
        merge = attention.merge_kernel(shape, splits, dtype)
        e = Emitter()
        pages, b, m = (size_var(s) for s in ("pages", "b", "m"))
        kpool, vpool = self._pools(site, pages)
        inputs = {
            "q": argument("q", (1, shape.heads, b, shape.head_dim), dtype),
            "kpool": kpool,
            "vpool": vpool,
            "positions": argument("positions", (b,), "int64"),
            "table": argument("block_table", (b, m), "int32"),
            **_extras(shape),
        }
        part = argument("part", (b, splits, shape.heads, shape.value_dim + 2))
        out = argument("out", (1, b, shape.heads, shape.value_dim), dtype)
        values = {**inputs, "part": part, "out": out, "b": b, "width": m}
        self._launch(e, kernel, values, (b, shape.kv_heads, splits))
        self._launch(e, merge, values, (b, shape.heads))
        return e.function([*inputs.values(), part, out], list(inputs.values()), [part, out])

    def _pools(self, site: AttentionSite, pages: Expr) -> tuple[Any, Any]:
        k, v = site.page_shapes(self.page_size, self.keys_transposed)
        return argument("kpool", (pages, *k), site.kv_dtype), argument("vpool", (pages, *v), site.kv_dtype)

    def _launch(self, e: Emitter, kernel: DeviceKernel, values: Mapping[str, Any], grid: Any) -> None:
        self.kernels[kernel.name] = kernel
        launch(e, kernel, values, grid)


@dataclass(frozen=True)
class CudaProducts:
    """Implements kvc_passes.kernel_sets.MatmulKernels.

    Attributes:
        kernels: filled with the kernels that the functions launch, by name.
        arch: the architecture that blocks are chosen for.
    """

    kernels: Kernels = field(repr=False, compare=False)
    arch: int
    panel: int = 16
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")

    def packed(self, columns: int, depth: int, format: WeightFormat) -> tuple[TensorType, ...]:
        return rows.packed_tensors(columns, depth, format)

    def matmul(
        self, columns: int, depth: int, format: WeightFormat, *, bias: bool, flat: bool, dtype: str
    ) -> PrimFunc:
        e, m = Emitter(), size_var("m")
        out_dtype = "float32" if flat else dtype
        x = argument("x", (1, m, depth), dtype)
        weight = self._weight(columns, depth, format)
        shift = {"bias": argument("bias", (columns,), dtype)} if bias else {}
        y = argument("y", (m, columns) if flat else (1, m, columns), out_dtype)
        inputs = {"x": x, **weight, **shift}
        values = {**inputs, "y": y, "m": m, "columns": i64(columns), "depth": i64(depth)}
        least = 0
        for most, kernel, tall, wide in products.product_kernels(
            columns, depth, format, dtype, out_dtype, bias, self.arch
        ):
            self.kernels[kernel.name] = kernel
            grid = (_parts(m, tall) * -(-columns // wide),)
            fits = m > least if most is None else tirx.And(m > least, m <= most)
            with e.when(fits):
                launch(e, kernel, values, grid)
            least = most or least
        return e.function([*inputs.values(), y], list(inputs.values()), [y])

    def embedding(self, columns: int, depth: int, format: WeightFormat, dtype: str) -> PrimFunc:
        e, n = Emitter(), size_var("n")
        weight = self._weight(columns, depth, format)
        ids = argument("ids", (1, n), "int64")
        y = argument("y", (1, n, depth), dtype)
        kernel, wide = products.embedding_kernel(depth, format, dtype)
        self.kernels[kernel.name] = kernel
        inputs = {**weight, "ids": ids}
        values = {**inputs, "y": y, "n": n, "depth": i64(depth)}
        launch(e, kernel, values, (n, -(-depth // wide)))
        return e.function([*inputs.values(), y], list(inputs.values()), [y])

    def _weight(self, columns: int, depth: int, format: WeightFormat) -> dict[str, Any]:
        names = ("w", "scales", "zeros")
        tensors = self.packed(columns, depth, format)
        return {name: argument(name, t.shape, t.dtype) for name, t in zip(names, tensors)}


def launch(e: Emitter, kernel: DeviceKernel, values: Mapping[str, Any], grid: tuple[Any, ...]) -> None:
    """Emit the launch of a kernel with the values that its parameters name: buffers and int64 numbers."""
    arguments = [
        values[name].data if kind.startswith("*") else tirx.Cast("int32", values[name])
        for name, kind in kernel.types
    ]
    null = tirx.reinterpret("handle", tirx.const(0, "uint64"))
    blocks = [i64(g) if isinstance(g, int) else g for g in (*grid, 1, 1, 1)[:3]]
    call = tirx.call_packed(kernel.name, *arguments, null, null, i64(32 * kernel.warps), *blocks, i64(SHARED))
    e.add(tirx.Evaluate(call))


def _extras(shape: AttentionShape) -> dict[str, Any]:
    """Further arguments, in the order of kernel_sets.AttentionKernels."""
    wanted = [("slopes", shape.slopes), ("sinks", shape.sink_scores)]
    return {name: argument(name, (shape.heads,)) for name, has in wanted if has}


def _parts(count: Expr, size: int) -> Expr:
    return tirx.floordiv(count + (size - 1), i64(size))
