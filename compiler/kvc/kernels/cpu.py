"""The CPU's kernels, as the passes ask for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tvm.target import Target
from tvm.tirx import PrimFunc

from kvc_passes.kernel_sets import TensorType
from kvc_passes.markers import HeadProduct
from kvc_passes.sites import AttentionSite
from kvc_passes.weight_format import WeightFormat

from . import append, attention, head_product, matmul, rebuilt, rekeyed, remade
from .knobs import DEFAULTS, Knobs
from .packing import packed_tensors
from .shapes import attention_shape
from .traits import CpuTraits

# Prefill and decode ask for the same kernels; building one takes tens of milliseconds.
_append_kv = lru_cache(maxsize=64)(append.append_kv)
_packed_matmul = lru_cache(maxsize=64)(matmul.packed_matmul)
_head_product = lru_cache(maxsize=64)(head_product.head_product)
_packed_embedding = lru_cache(maxsize=64)(matmul.packed_embedding)

PAGE_SIZE = 16  # tokens; one AVX-512 or two AVX2 vectors of keys


@dataclass(frozen=True)
class CpuAttention:
    """Implements kvc_passes.kernel_sets.AttentionKernels.

    Attributes:
        traits: vector width and threads.
        tile: query tokens of one prefill task, at most.
        page_size: tokens a page.
        knobs: what was tuned.
        shared: query heads of a KV head, and KV heads, of every site; none where the tile is a tuned one.
    """

    traits: CpuTraits
    tile: int
    page_size: int = PAGE_SIZE
    knobs: Knobs = DEFAULTS
    shared: tuple[tuple[int, int], ...] = ()
    keys_transposed = True
    reads_views = False

    @classmethod
    def for_sites(
        cls, target: Target, sites: tuple[AttentionSite, ...], knobs: Knobs = DEFAULTS
    ) -> CpuAttention:
        """One tile size for all sites: the smallest that one of them is best with."""
        traits = CpuTraits.of(target)
        shapes = [attention_shape(site, PAGE_SIZE) for site in sites]
        tile = min(
            knobs.prefill(s).tile or attention.choose_tile(s.group, traits, s.head_dim) for s in shapes
        )
        tuned = any(knobs.prefill(s).tile for s in shapes)
        shared = () if tuned else tuple((s.group, s.kv_heads) for s in shapes)
        return cls(traits, tile, knobs=knobs, shared=shared)

    def tile_of(self, chunk: int) -> int:
        return attention.call_tile(self.tile, chunk, self.shared, self.traits)

    def rebuilds(self, key: int, value: int, dtype: str = "float32") -> bool:
        return True

    def rebuilt(
        self,
        site: AttentionSite,
        key: HeadProduct,
        value: HeadProduct,
        key_format: WeightFormat,
        value_format: WeightFormat,
        *,
        dtype: str = "float32",
    ) -> PrimFunc:
        latent = attention_shape(site, self.page_size)
        made = rebuilt.Made(
            heads=key.heads // key.group,
            key=key.width,
            value=value.width,
            depth=site.value_dim,
            rest=site.head_dim - site.value_dim,
            key_format=key_format,
            value_format=value_format,
        )
        return rebuilt.prefill_rebuilt(latent, made, self.traits)

    def remade(
        self,
        site: AttentionSite,
        key_format: WeightFormat,
        value_format: WeightFormat,
        *,
        biases: tuple[bool, bool],
        decodes: bool,
        dtype: str = "float32",
    ) -> PrimFunc:
        assert site.remade is not None
        shape = attention_shape(site, self.page_size)
        remaking = remade.Remake(site.remade, key_format, value_format, biases)
        if decodes:
            return remade.decode_remade(shape, remaking, self.traits, self.splits(site))
        return remade.prefill_remade(shape, remaking, self.traits)

    def rekeyed(self, site: AttentionSite, *, decodes: bool, dtype: str = "float32") -> PrimFunc:
        assert site.rekeyed is not None
        shape = attention_shape(site, self.page_size)
        if decodes:
            return rekeyed.decode_rekeyed(shape, site.rekeyed, self.traits, self.splits(site))
        return rekeyed.prefill_rekeyed(shape, site.rekeyed, self.tile, self.traits)

    def operations(self, site: AttentionSite, *, decodes: bool) -> int:
        return 2 * site.heads * (site.query_dim + site.value_dim)

    def together(self, site: AttentionSite, plain: AttentionSite) -> int | None:
        return None

    def workspace(self, site: AttentionSite, sequences: Any) -> tuple[Any, ...]:
        return sequences, self.splits(site)

    def splits(self, site: AttentionSite) -> int:
        """Shares of a sequence's keys."""
        chosen = self.knobs.decode(attention_shape(site, self.page_size)).splits
        return chosen or attention.decode_splits(site.kv_heads, self.traits)

    def append(self, site: AttentionSite, dtype: str = "float32") -> PrimFunc:
        sizes = (site.kv_heads, site.head_dim, site.value_dim)
        if site.row is not None:
            sizes = (1, site.row.width, site.row.width)
        plain = attention.AttentionShape(  # what the mask and the scores are does not matter here
            site.heads,
            *sizes,
            scale=1.0,
            kv_dtype=site.kv_dtype,
            stored=site.stored,
            shared=site.shared,
            page_size=self.page_size,
        )
        return _append_kv(plain, self.traits)

    def prefill(self, site: AttentionSite, dtype: str = "float32") -> PrimFunc:
        shape = attention_shape(site, self.page_size)
        return attention.prefill_attention(shape, self.tile, self.traits, self.knobs.prefill(shape).keys)

    def decode(self, site: AttentionSite, dtype: str = "float32") -> PrimFunc:
        shape = attention_shape(site, self.page_size)
        return attention.decode_attention(shape, self.traits, self.knobs.decode(shape))


@dataclass(frozen=True)
class CpuProducts:
    """Implements kvc_passes.kernel_sets.MatmulKernels."""

    traits: CpuTraits
    dtypes: tuple[str, ...] = ("float32",)
    adds: bool = False
    overwrites: bool = False
    knobs: Knobs = DEFAULTS

    @property
    def panel(self) -> int:
        return matmul.panel(self.traits)

    def packed(self, columns: int, depth: int, format: WeightFormat) -> tuple[TensorType, ...]:
        return packed_tensors(columns, depth, format, self.traits.lanes)

    def matmul(
        self,
        columns: int,
        depth: int,
        format: WeightFormat,
        *,
        bias: bool,
        flat: bool,
        dtype: str = "float32",
        residual: bool = False,
    ) -> PrimFunc:
        knobs = self.knobs.product(columns, depth, format)
        return _packed_matmul(columns, depth, self.traits, bias=bias, flat=flat, format=format, knobs=knobs)

    def head_packed(self, heads: int, columns: int, depth: int, format: WeightFormat) -> TensorType:
        return head_product.packed_tensor(heads, columns, depth, format, self.traits)

    def head_product(
        self,
        heads: int,
        group: int,
        columns: int,
        depth: int,
        format: WeightFormat,
        *,
        absorbed: bool,
        dtype: str = "float32",
    ) -> PrimFunc:
        return _head_product(heads, group, columns, depth, self.traits, absorbed=absorbed, format=format)

    def embedding(self, columns: int, depth: int, format: WeightFormat, dtype: str = "float32") -> PrimFunc:
        return _packed_embedding(columns, depth, self.traits, format=format)
