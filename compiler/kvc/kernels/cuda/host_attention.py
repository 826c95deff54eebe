"""CUDA's attention as the passes ask for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tvm.tirx import PrimFunc

from kvc_passes.errors import PlanningError
from kvc_passes.markers import HeadProduct
from kvc_passes.sites import AttentionSite, Remade
from kvc_passes.weight_format import WeightFormat

from ..attention import AttentionShape
from ..emit import Emitter, Expr, argument, size_var
from ..shapes import attention_shape
from . import attention, remade, shared
from .knobs import Knobs
from .launches import Variants, parts
from .remade import Making

PAGE_SIZE = 64  # tokens; a block of keys of most kernels, and a tile that Hopper's copy engine can fetch
_LONG = 1 << 20
_WORTH = 128
"""Keys for which a block of threads is worth starting."""
FULL = 132 * 2
"""Blocks that fill a large GPU: two for each of an H100's processors."""


@dataclass(frozen=True)
class CudaAttention:
    """Implements kvc_passes.kernel_sets.AttentionKernels.

    Attributes:
        variants: what the functions launch, and how they are made.
        tile: query tokens of one prefill task.
        context: most tokens of a sequence.
        page_size: tokens a page.
        usual_tile: what `tile` is where nothing is tuned; 0 for the same.
    """

    variants: Variants = field(repr=False, compare=False)
    tile: int
    context: int
    page_size: int = PAGE_SIZE
    keys_transposed: bool = False
    usual_tile: int = 0

    @classmethod
    def for_sites(
        cls, sites: tuple[AttentionSite, ...], context: int | None, variants: Variants
    ) -> CudaAttention:
        """One tile size for all sites, the smallest that one of them takes."""
        usual = min(_tile(site) for site in sites)
        shapes = [attention_shape(site, PAGE_SIZE) for site in sites]
        tile = min(variants.knobs.prefill(variants.arch, s, usual).tile or usual for s in shapes)
        return cls(variants, tile, context or _LONG, usual_tile=usual)

    def rebuilds(self, key: int, value: int, dtype: str) -> bool:
        return remade.rebuilds(key, value, dtype)

    def rebuilt(
        self,
        site: AttentionSite,
        key: HeadProduct,
        value: HeadProduct,
        key_format: WeightFormat,
        value_format: WeightFormat,
        *,
        dtype: str,
    ) -> PrimFunc:
        heads = key.heads // key.group
        latent = attention_shape(site, self.page_size)
        shape, extra = remade.rebuilt_shape(latent, heads, key.width, value.width)
        kept = Remade(latent.value_dim, 0, fine=False)
        types = (key_format.dtype, value_format.dtype)
        making = Making(kept, *types, (False, False), absorbed=True, extra=extra)
        names = ("rebuilt", shape, making, dtype)
        return self.variants.function(names, partial(self._made, site, shape, making, False, dtype))

    def remade(
        self,
        site: AttentionSite,
        key_format: WeightFormat,
        value_format: WeightFormat,
        *,
        biases: tuple[bool, bool],
        decodes: bool,
        dtype: str,
    ) -> PrimFunc:
        assert site.remade is not None
        shape = attention_shape(site, self.page_size)
        making = Making(site.remade, key_format.dtype, value_format.dtype, biases)
        names = ("remade", shape, making, self.context, decodes, dtype)
        return self.variants.function(names, partial(self._made, site, shape, making, decodes, dtype))

    def _made(
        self,
        site: AttentionSite,
        shape: AttentionShape,
        making: Making,
        decodes: bool,
        dtype: str,
        arch: int,
        knobs: Knobs,
    ) -> PrimFunc:
        """Attention of `shape` over the pools of a site, of which keys and values are made."""
        e, splits = Emitter(), self.splits(site)
        n, pages, t, b, m = (size_var(s) for s in ("n", "pages", "t", "b", "m"))
        rows = b if decodes else n
        inputs = {
            "q": argument("q", (1, shape.heads, rows, shape.head_dim), dtype),
            **self._pools(site, pages),
            "positions": argument("positions", (rows,), "int64"),
            **({} if decodes else {"tiles": argument("tiles", (t, 3), "int32")}),
            "table": argument("block_table", (b, m), "int32"),
            **_extras(shape),
            **_made_of(shape, making, dtype),
        }
        out = argument("out", (1, rows, shape.heads, shape.value_dim), dtype)
        values = {**inputs, "out": out, "n": n, "b": b, "width": m}
        given = list(inputs.values())
        if not decodes:
            kernel = remade.prefill_kernel(shape, making, dtype, arch)
            self.variants.launch(e, kernel, values, (t, shape.kv_heads))
            return e.function([*given, out], given, [out])
        part = argument("part", (b, splits, shape.heads, shape.value_dim + 2))
        kernel = remade.decode_kernel(shape, making, dtype, arch)
        self.variants.launch(e, kernel, {**values, "part": part}, (b, shape.kv_heads, splits))
        self._merge(e, shape, splits, dtype, part, out)
        return e.function([*given, part, out], given, [part, out])

    def _merge(self, e: Emitter, shape: AttentionShape, splits: int, dtype: str, part: Any, out: Any) -> None:
        """The shares of a decode put together."""
        b, kernel = part.shape[0], attention.merge_kernel(shape, splits, dtype)
        grid = (b, shape.heads, attention.merge_blocks(shape, splits))
        self.variants.launch(e, kernel, {"part": part, "out": out, "b": b}, grid)

    def operations(self, site: AttentionSite, *, decodes: bool) -> int:
        shape, dtype = attention_shape(site, self.page_size), site.kv_dtype
        scores = shape.query_dim
        if shape.shared and site.remade is None:
            scores *= shared.scored(shape, dtype, decodes)
        return 2 * shape.heads * (scores + shape.value_dim)

    def together(self, site: AttentionSite, plain: AttentionSite) -> int:
        shape, dtype = attention_shape(plain, self.page_size), site.kv_dtype
        kept = site.remade or Remade(site.value_dim, 0, fine=False)
        making = Making(kept, dtype, dtype, (False, False))
        rows = remade.prefill_rows(shape, making, dtype, self.variants.arch)
        return max(1, min(rows // shape.group, self.tile))

    def rekeyed(self, site: AttentionSite, *, decodes: bool) -> PrimFunc:
        raise PlanningError("there is no kernel that makes keys of values on a GPU")

    def splits(self, site: AttentionSite) -> int:
        """Shares of a sequence's keys."""
        shape, usual = attention_shape(site, self.page_size), self.usual_splits(site)
        return self.variants.knobs.decode(self.variants.arch, shape, usual).splits or usual

    def usual_splits(self, site: AttentionSite) -> int:
        """Shares for one sequence to fill the GPU, as far as they have keys worth a block of threads."""
        rows = _LONG if site.mask.reach.memory else self.context  # of an encoder's output: any number
        seen = min(rows, site.mask.window or _LONG, site.mask.chunk or _LONG)
        return max(1, min(64, FULL // site.kv_heads, seen // _WORTH))

    def append(self, site: AttentionSite, dtype: str) -> PrimFunc:
        shape = self._kept(site)
        key = ("append", shape, self.tile, self.context, dtype)
        return self.variants.function(key, lambda arch, knobs: self._append(site, dtype))

    def _kept(self, site: AttentionSite) -> AttentionShape:
        """The shape of what pages hold."""
        shape = attention_shape(site, self.page_size)
        return shape if site.remade is None else remade.kept_shape(shape, site.remade)

    def _append(self, site: AttentionSite, dtype: str) -> PrimFunc:
        shape = self._kept(site)
        e, n, pages = Emitter(), size_var("n"), size_var("pages")
        k = argument("k", (1, shape.kv_heads, n, shape.head_dim), dtype)
        if shape.shared:
            return self._append_shared(site, shape, dtype, e, k)
        kernel = attention.append_kernel(shape, dtype)
        v = argument("v", (1, shape.kv_heads, n, shape.value_dim), dtype)
        slots = argument("slots", (n,), "int32")
        state = self._pools(site, pages)
        values = {"k": k, "v": v, "slots": slots, **state, "n": n}
        self.variants.launch(e, kernel, values, (parts(n, attention.APPEND_TOKENS), shape.kv_heads))
        return e.function([k, v, slots, *state.values()], [k, v, slots], list(state.values()))

    def _append_shared(
        self, site: AttentionSite, shape: AttentionShape, dtype: str, e: Emitter, x: Any
    ) -> PrimFunc:
        n, slots = x.shape[2], argument("slots", (x.shape[2],), "int32")
        state = self._pools(site, size_var("pages"))
        grid = (parts(n, shared.APPEND_TOKENS), -(-shape.head_dim // shared.APPEND_ELEMENTS))
        values = {"x": x, "slots": slots, **state, "n": n}
        self.variants.launch(e, shared.append_kernel(shape, dtype), values, grid)
        return e.function([x, slots, *state.values()], [x, slots], list(state.values()))

    def prefill(self, site: AttentionSite, dtype: str) -> PrimFunc:
        shape = attention_shape(site, self.page_size)
        key = ("prefill", shape, self.usual_tile or self.tile, self.tile, dtype)
        return self.variants.function(key, lambda arch, knobs: self._prefill(site, dtype, arch, knobs))

    def _prefill(self, site: AttentionSite, dtype: str, arch: int, knobs: Knobs) -> PrimFunc:
        shape = attention_shape(site, self.page_size)
        if shape.shared:
            kernel, programs = shared.prefill_kernel(shape, dtype, arch)
        else:
            tuned = knobs.prefill(arch, shape, self.usual_tile or self.tile)
            kernel, programs = attention.prefill_kernel(shape, self.tile, dtype, arch, tuned), shape.kv_heads
        e = Emitter()
        n, pages, t, b, m = (size_var(s) for s in ("n", "pages", "t", "b", "m"))
        inputs = {
            "q": argument("q", (1, shape.heads, n, shape.query_dim), dtype),
            **self._pools(site, pages),
            "positions": argument("positions", (n,), "int64"),
            "tiles": argument("tiles", (t, 3), "int32"),
            "table": argument("block_table", (b, m), "int32"),
            **_extras(shape),
        }
        kind = attention.out_dtype(shape, dtype)
        out = argument("out", (1, n, shape.heads, shape.value_dim), kind)
        self.variants.launch(e, kernel, {**inputs, "out": out, "n": n, "width": m}, (t, programs))
        return e.function([*inputs.values(), out], list(inputs.values()), [out])

    def decode(self, site: AttentionSite, dtype: str) -> PrimFunc:
        shape = attention_shape(site, self.page_size)
        key = ("decode", shape, self.usual_splits(site), self.context, dtype)
        return self.variants.function(key, lambda arch, knobs: self._decode(site, dtype, arch, knobs))

    def _decode(self, site: AttentionSite, dtype: str, arch: int, knobs: Knobs) -> PrimFunc:
        shape, splits = attention_shape(site, self.page_size), self.splits(site)
        if shape.shared:
            kernel, programs = shared.decode_kernel(shape, dtype)
        else:
            tuned = knobs.decode(arch, shape, self.usual_splits(site))
            kernel, programs = attention.decode_kernel(shape, splits, dtype, tuned), shape.kv_heads
        e = Emitter()
        pages, b, m = (size_var(s) for s in ("pages", "b", "m"))
        inputs = {
            "q": argument("q", (1, shape.heads, b, shape.query_dim), dtype),
            **self._pools(site, pages),
            "positions": argument("positions", (b,), "int64"),
            "table": argument("block_table", (b, m), "int32"),
            **_extras(shape),
        }
        part = argument("part", (b, splits, shape.heads, shape.value_dim + 2))
        out = argument("out", (1, b, shape.heads, shape.value_dim), attention.out_dtype(shape, dtype))
        values = {**inputs, "part": part, "out": out, "b": b, "width": m}
        self.variants.launch(e, kernel, values, (b, programs, splits))
        self._merge(e, shape, splits, dtype, part, out)
        return e.function([*inputs.values(), part, out], list(inputs.values()), [part, out])

    def _pools(self, site: AttentionSite, pages: Expr) -> dict[str, Any]:
        """The pools as arguments, by the names that kernels have for them."""
        names = {"x": "xpool", "k": "kpool", "v": "vpool", "k_scale": "kscale", "v_scale": "vscale"}
        # Those of another site are as this one's would be.
        state = replace(site, owner=None).state(self.page_size, self.keys_transposed)
        return {names[n]: argument(names[n], (pages, *shape), dtype) for n, (dtype, shape) in state.items()}


def _tile(site: AttentionSite) -> int:
    """Query tokens of a tile that a program does at once."""
    if site.sliced is not None:
        return shared.choose_tile(attention_shape(site, PAGE_SIZE))
    if site.shared and site.remade is None:  # keys and values are made again, for one KV head
        return attention.choose_tile(1)
    return attention.choose_tile(site.group, max(site.head_dim, site.value_dim))


def _extras(shape: AttentionShape) -> dict[str, Any]:
    """Further arguments, in the order of kernel_sets.AttentionKernels."""
    wanted = [("slopes", shape.slopes), ("sinks", shape.sink_scores)]
    return {name: argument(name, (shape.heads,)) for name, has in wanted if has}


def _made_of(shape: AttentionShape, making: Making, dtype: str) -> dict[str, Any]:
    """W_K, W_V and biases as arguments, by the names that kernels have for them."""
    depth, heads = making.kept.depth, shape.kv_heads
    columns = {"key": heads * (shape.head_dim - making.extra), "value": heads * shape.value_dim}
    key = (heads * depth, columns["key"] // heads) if making.absorbed else (columns["key"], depth)
    shapes = {"key": (key, making.key_dtype), "value": ((columns["value"], depth), making.value_dtype)}
    weights = {f"w{name}": argument(f"w_{name}", *each) for name, each in shapes.items()}
    has = zip(columns, making.biases)
    return weights | {
        f"b{name}": argument(f"b_{name}", (columns[name],), dtype) for name, there in has if there
    }
