"""What the passes ask of a target: kernels as PrimFuncs. The compiler hands in an implementation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

from tvm.tirx import PrimFunc

from .markers import HeadProduct
from .sites import AttentionSite
from .weight_format import WeightFormat


class TensorType(NamedTuple):
    """A tensor that is stored: its dtype and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * (int("".join(c for c in self.dtype if c.isdigit())) // 8)


class AttentionKernels(Protocol):
    """Kernels over paged KV state, in pools of site.kv_dtype.

    For a shared site one x pool [pages, 1, page, e] stands in the place of the two, and v is not given: a
    token's value is the first f elements of its key.
    `dtype` is the type of q, k, v and out; the out of a site of sites.Sliced is float32. `extras` are, in
    this order and where the site has them: slopes f32 [h] (ALiBi, multiplied with key position - query
    position), sinks f32 [h] (learned scores) and bias f32 [h * distances] (T5, added by the distance).
    """

    @property
    def page_size(self) -> int:
        """Tokens a page."""

    @property
    def tile(self) -> int:
        """Query tokens that one task of prefill handles, at most."""

    def tile_of(self, chunk: int) -> int:
        """Query tokens that a task should have in calls of `chunk` tokens."""

    @property
    def keys_transposed(self) -> bool:
        """Whether a page holds its keys as [e, page]; else as [page, e]."""

    @property
    def reads_views(self) -> bool:
        """Whether q, k and v may be read and turned as views.Views say."""

    def rebuilds(self, key: int, value: int, dtype: str) -> bool:
        """Whether there is `rebuilt` for products that make keys and values of so many elements."""

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
        """Prefill of a shared site that makes keys and values again: attention with keys [x W_K, rest of x].

        (q [1,h,n,e], x pool, positions, tiles, table, *extras, W_K, W_V as MatmulKernels.head_packed, out
        [1,n,h,f]); e is the width of `key` and of what x has beside its first elements, f that of `value`.
        """

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
        """Attention of a site of sites.Remade: as `prefill` or, if it decodes, `decode`, but for W_K, W_V and
        biases [g*e], [g*f] behind the extras, W_K and W_V as MatmulKernels.head_packed.
        """

    def rekeyed(self, site: AttentionSite, *, decodes: bool, dtype: str) -> PrimFunc:
        """Attention of a site of sites.Rekeyed: as `prefill` or, if it decodes, `decode`, but for factors
        f32 [g*e] behind the extras where keys are scaled.
        """

    def operations(self, site: AttentionSite, *, decodes: bool) -> int:
        """Operations for a query token and a key that it sees, of all heads: with those that are repeated."""

    def together(self, site: AttentionSite, plain: AttentionSite) -> int | None:
        """Query tokens that share keys and values that prefill makes again; None for all of a call.

        plain: the site as it stands in the graph.
        """

    def workspace(self, site: AttentionSite, sequences: Any) -> tuple[Any, ...]:
        """Places for the parts that decode splits contexts into, one axis or more, for so many sequences."""

    def append(self, site: AttentionSite, dtype: str) -> PrimFunc:
        """(k [1,g,n,e], v [1,g,n,f], slots i32 [n], k pool, v pool): writes the pools in place."""

    def prefill(self, site: AttentionSite, dtype: str) -> PrimFunc:
        """(q [1,h,n,e], k pool, v pool, positions i64 [n], tiles i32 [t,3], table i32 [b,m], *extras, out).

        out is [1,n,h,f].
        """

    def decode(self, site: AttentionSite, dtype: str) -> PrimFunc:
        """(q [1,h,b,e], k pool, v pool, positions i64 [b], table i32 [b,m], *extras, part, out).

        part is f32 [*workspace,h,f+2], out [1,b,h,f].
        """


class MatmulKernels(Protocol):
    """Products with constant matrices, which are stored in a layout of the kernels' own."""

    @property
    def panel(self) -> int:
        """Columns of a weight that stand together; weights may be joined at multiples of it."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Types that x and y may have."""

    @property
    def adds(self) -> bool:
        """Whether a product can add a tensor of y's shape."""

    @property
    def overwrites(self) -> bool:
        """Whether y may lie over the tensor that is added: of that every element is read once, by what
        writes the same element of y, and before.
        """

    def packed(self, columns: int, depth: int, format: WeightFormat) -> tuple[TensorType, ...]:
        """The tensors of a packed weight [columns, depth]: the data; for codes then scales, then zeros."""

    def matmul(
        self,
        columns: int,
        depth: int,
        format: WeightFormat,
        *,
        bias: bool,
        flat: bool,
        dtype: str,
        residual: bool = False,
    ) -> PrimFunc:
        """(x [1,m,depth], *packed, [bias [columns]], [residual like y], y [1,m,columns]), all of `dtype`.

        A row of y depends on the same row of x and of the residual alone. Flat: y is f32 [m,columns].
        """

    def head_packed(self, heads: int, columns: int, depth: int, format: WeightFormat) -> TensorType:
        """The tensor of `heads` weights of floats [columns, depth], one behind the other."""

    def head_product(
        self,
        heads: int,
        group: int,
        columns: int,
        depth: int,
        format: WeightFormat,
        *,
        absorbed: bool,
        dtype: str,
    ) -> PrimFunc:
        """(x, packed, y) of `dtype`: y_h = x_h w_(h // group)^T for every one of `heads` heads.

        x is [1,m,heads,depth] and y [1,m,heads,columns]; absorbed: [1,heads,m,depth] and [1,heads,m,columns].
        """

    def embedding(self, columns: int, depth: int, format: WeightFormat, dtype: str) -> PrimFunc:
        """(*packed, ids i64 [1,n], y [1,n,depth] of `dtype`): rows of the unpacked weight."""
