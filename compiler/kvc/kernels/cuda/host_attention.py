"""CUDA's attention as the passes ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm.tirx import PrimFunc

from kvc_passes.markers import HeadProduct
from kvc_passes.sites import AttentionSite, Remade
from kvc_passes.views import View
from kvc_passes.weight_format import WeightFormat

from ..attention import AttentionShape, extras
from ..emit import Emitter, argument, size_var
from ..shapes import attention_shape
from . import attention, rekeyed, remade, shared
from .device import DeviceKernel
from .host_pages import LONGEST, PAGE_SIZE, CudaPages, operand, parts_of
from .knobs import Knobs
from .launches import Matrix, Variants
from .remade import Making


@dataclass(frozen=True)
class CudaAttention(CudaPages):
    """Implements kvc_passes.kernel_sets.AttentionKernels."""

    @classmethod
    def for_sites(
        cls, sites: tuple[AttentionSite, ...], context: int | None, variants: Variants
    ) -> CudaAttention:
        """One tile size for all sites, the smallest that one of them takes."""
        usual = min(_tile(site, variants.arch) for site in sites)
        shapes = [attention_shape(site, PAGE_SIZE) for site in sites]
        tile = min(variants.knobs.prefill(variants.arch, s, usual).tile or usual for s in shapes)
        return cls(variants, tile, context or LONGEST, usual_tile=usual)

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
        makes = remade.decode_kernel if decodes else remade.prefill_kernel
        kernel, made = makes(shape, making, dtype, arch), _made_of(shape, making, dtype)
        return self._over_rows(site, shape, kernel, shape.kv_heads, made, decodes, dtype)

    def _over_rows(
        self,
        site: AttentionSite,
        shape: AttentionShape,
        kernel: DeviceKernel,
        programs: int,
        made: Mapping[str, Any],
        decodes: bool,
        dtype: str,
    ) -> PrimFunc:
        """Attention of `shape` by a kernel over the pools of a site, with arguments that say what is made."""
        e, splits = Emitter(), self.splits(site)
        n, pages, t, b, m = (size_var(s) for s in ("n", "pages", "t", "b", "m"))
        rows = b if decodes else n
        inputs = {
            "q": argument("q", (1, shape.heads, rows, shape.head_dim), dtype),
            **self._pools(site, pages),
            "positions": argument("positions", (rows,), "int64"),
            **({} if decodes else {"tiles": argument("tiles", (t, 3), "int32")}),
            "table": argument("block_table", (b, m), "int32"),
            **extras(shape),
            **made,
        }
        out = argument("out", (1, rows, shape.heads, shape.value_dim), dtype)
        values = {**inputs, "out": out, "n": n, "b": b, "width": m}
        given = list(inputs.values())
        if not decodes:
            self.variants.launch(e, kernel, values, (t, programs))
            return e.function([*given, out], given, [out])
        values["part"] = part = parts_of(shape, splits, b)
        self._in_shares(e, shape, splits, dtype, kernel, programs, values)
        return e.function([*given, part, out], given, [part, out])

    def operations(self, site: AttentionSite, *, decodes: bool) -> int:
        shape, dtype = attention_shape(site, self.page_size), site.kv_dtype
        scores = shape.query_dim
        if site.rekeyed is not None:
            scores *= rekeyed.scored(shape, dtype, decodes=decodes, arch=self.variants.arch)
        elif shape.shared and site.remade is None:
            scores *= shared.scored(shape, dtype, decodes)
        return 2 * shape.heads * (scores + shape.value_dim)

    def together(self, site: AttentionSite, plain: AttentionSite) -> int:
        shape, dtype = attention_shape(plain, self.page_size), site.kv_dtype
        kept = site.remade or Remade(site.value_dim, 0, fine=False)
        making = Making(kept, dtype, dtype, (False, False))
        rows = remade.prefill_rows(shape, making, dtype, self.variants.arch)
        return max(1, min(rows // shape.group, self.tile))

    def rekeyed(self, site: AttentionSite, *, decodes: bool, dtype: str) -> PrimFunc:
        shape = attention_shape(site, self.page_size)
        names = ("rekeyed", shape, site.rekeyed, self.context, decodes, dtype)
        return self.variants.function(names, partial(self._rekeyed, site, shape, decodes, dtype))

    def _rekeyed(
        self, site: AttentionSite, shape: AttentionShape, decodes: bool, dtype: str, arch: int, knobs: Knobs
    ) -> PrimFunc:
        assert site.rekeyed is not None
        made = {"factors": argument("factors", (site.rekeyed.values,))} if site.rekeyed.scaled else {}
        if decodes:
            kernel, programs = rekeyed.decode_kernel(shape, site.rekeyed, dtype)
        else:
            kernel, programs = rekeyed.prefill_kernel(shape, site.rekeyed, dtype, arch)
        return self._over_rows(site, shape, kernel, programs, made, decodes, dtype)

    def prefill(self, site: AttentionSite, dtype: str) -> PrimFunc:
        shape, view = attention_shape(site, self.page_size), _view(site)
        key = ("prefill", shape, view, self.usual_tile or self.tile, self.tile, dtype)
        return self.variants.function(key, lambda arch, knobs: self._prefill(site, dtype, arch, knobs))

    def _prefill(self, site: AttentionSite, dtype: str, arch: int, knobs: Knobs) -> PrimFunc:
        shape, view, programs = attention_shape(site, self.page_size), _view(site), site.kv_heads
        if shape.shared:
            kernel, programs = shared.prefill_kernel(shape, dtype, arch)
        else:
            tuned = knobs.prefill(arch, shape, self.usual_tile or self.tile)
            kernel = attention.prefill_kernel(shape, self.tile, dtype, arch, tuned, view)
        e = Emitter()
        n, pages, t, b, m = (size_var(s) for s in ("n", "pages", "t", "b", "m"))
        inputs = {
            **operand("q", (shape.heads, n, shape.query_dim), dtype, view),
            **self._pools(site, pages),
            "positions": argument("positions", (n,), "int64"),
            "tiles": argument("tiles", (t, 3), "int32"),
            "table": argument("block_table", (b, m), "int32"),
            **extras(shape),
        }
        kind = attention.out_dtype(shape, dtype)
        out = argument("out", (1, n, shape.heads, shape.value_dim), kind)
        values = {**inputs, "out": out, "n": n, "width": m}
        if not shape.shared:
            tokens = pages * (shape.kv_heads * shape.page_size)
            widths = attention.matrices(shape).items()
            values |= {name: Matrix(inputs[f"{name[0]}pool"], tokens, width) for name, width in widths}
        self.variants.launch(e, kernel, values, (t, programs))
        return e.function([*inputs.values(), out], list(inputs.values()), [out])

    def decode(self, site: AttentionSite, dtype: str) -> PrimFunc:
        shape, view = attention_shape(site, self.page_size), _view(site)
        key = ("decode", shape, view, self.usual_splits(site), self.context, dtype)
        return self.variants.function(key, lambda arch, knobs: self._decode(site, dtype, arch, knobs))

    def _decode(self, site: AttentionSite, dtype: str, arch: int, knobs: Knobs) -> PrimFunc:
        shape, splits = attention_shape(site, self.page_size), self.splits(site)
        view, programs = _view(site), shape.kv_heads
        if shape.shared:
            kernel, programs = shared.decode_kernel(shape, dtype)
        else:
            tuned = knobs.decode(arch, shape, self.usual_splits(site))
            kernel = attention.decode_kernel(shape, splits, dtype, tuned, view)
        e = Emitter()
        pages, b, m = (size_var(s) for s in ("pages", "b", "m"))
        inputs = {
            **operand("q", (shape.heads, b, shape.query_dim), dtype, view),
            **self._pools(site, pages),
            "positions": argument("positions", (b,), "int64"),
            "table": argument("block_table", (b, m), "int32"),
            **extras(shape),
        }
        part = parts_of(shape, splits, b)
        out = argument("out", (1, b, shape.heads, shape.value_dim), attention.out_dtype(shape, dtype))
        values = {**inputs, "part": part, "out": out, "b": b, "width": m}
        self._in_shares(e, shape, splits, dtype, kernel, programs, values)
        return e.function([*inputs.values(), part, out], list(inputs.values()), [part, out])


def _view(site: AttentionSite) -> View | None:
    """How queries are read."""
    return None if site.views is None else site.views.query


def _tile(site: AttentionSite, arch: int) -> int:
    """Query tokens of a tile that a program does at once."""
    if site.sliced is not None:
        return shared.choose_tile(attention_shape(site, PAGE_SIZE))
    if site.rekeyed is not None:
        return rekeyed.choose_tile(attention_shape(site, PAGE_SIZE), arch)
    if site.shared and site.remade is None:  # keys and values are made again, for one KV head
        return attention.choose_tile(1)
    return attention.choose_tile(site.group, max(site.head_dim, site.value_dim))


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
