"""Pages on a GPU: what is written into them, and into how many shares a sequence's are split."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tvm import tirx
from tvm.tirx import PrimFunc

from kvc_passes.sites import AttentionSite
from kvc_passes.views import View, Views

from ..attention import AttentionShape
from ..emit import Emitter, Expr, argument, i64, size_var
from ..rekeyed import row_of
from ..shapes import attention_shape
from . import attention, remade, shared
from .device import DeviceKernel
from .launches import Variants, parts

PAGE_SIZE = 64  # tokens; a block of keys of most kernels, and a tile that Hopper's copy engine can fetch
LONGEST = 1 << 20
_WORTH = 128
"""Keys for which a block of threads is worth starting."""
FULL = 132 * 2
"""Blocks that fill a large GPU: two for each of an H100's processors."""
_FEW = 4
"""Shares up to which they are put together by a kernel of their own."""


@dataclass(frozen=True)
class CudaPages:
    """A part of CudaAttention: everything but attention itself.

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
    reads_views = True

    def tile_of(self, chunk: int) -> int:
        return self.tile

    def workspace(self, site: AttentionSite, sequences: Expr) -> tuple[Expr, ...]:
        return (most_parts(self.splits(site), sequences),)

    def splits(self, site: AttentionSite) -> int:
        """Shares of the keys of a sequence that is alone."""
        shape, usual = attention_shape(site, self.page_size), self.usual_splits(site)
        return self.variants.knobs.decode(self.variants.arch, shape, usual).splits or usual

    def usual_splits(self, site: AttentionSite) -> int:
        """Shares for a sequence alone to fill the GPU, as far as they have keys worth a block of threads."""
        rows = LONGEST if site.mask.reach.memory else self.context  # of an encoder's output: any number
        seen = min(rows, site.mask.window or LONGEST, site.mask.chunk or LONGEST)
        return max(1, min(64, FULL // site.kv_heads, seen // _WORTH))

    def append(self, site: AttentionSite, dtype: str) -> PrimFunc:
        shape, views = self._kept(site), site.views or Views()
        key = ("append", shape, views.key, views.value, self.tile, self.context, dtype)
        return self.variants.function(key, lambda arch, knobs: self._append(site, dtype))

    def _kept(self, site: AttentionSite) -> AttentionShape:
        """The shape of what pages hold."""
        shape = attention_shape(site, self.page_size)
        if site.rekeyed is not None:
            return row_of(shape, site.rekeyed)
        return shape if site.remade is None else remade.kept_shape(shape, site.remade)

    def _append(self, site: AttentionSite, dtype: str) -> PrimFunc:
        shape, views = self._kept(site), site.views or Views()
        e, n, pages = Emitter(), size_var("n"), size_var("pages")
        k = operand("k", (shape.kv_heads, n, shape.head_dim), dtype, views.key)
        if shape.shared:
            return self._append_shared(site, shape, dtype, e, k["k"])
        v = operand("v", (shape.kv_heads, n, shape.value_dim), dtype, views.value)
        given = {"k": k.pop("k"), **v, **k, "slots": argument("slots", (n,), "int32")}
        kernel = attention.append_kernel(shape, dtype, views.key, views.value)
        state = self._pools(site, pages)
        grid = (parts(n, attention.APPEND_TOKENS), shape.kv_heads)
        self.variants.launch(e, kernel, {**given, **state, "n": n}, grid)
        return e.function([*given.values(), *state.values()], [*given.values()], list(state.values()))

    def _append_shared(
        self, site: AttentionSite, shape: AttentionShape, dtype: str, e: Emitter, x: Any
    ) -> PrimFunc:
        n, slots = x.shape[2], argument("slots", (x.shape[2],), "int32")
        state = self._pools(site, size_var("pages"))
        grid = (parts(n, shared.APPEND_TOKENS), -(-shape.head_dim // shared.APPEND_ELEMENTS))
        values = {"x": x, "slots": slots, **state, "n": n}
        self.variants.launch(e, shared.append_kernel(shape, dtype), values, grid)
        return e.function([x, slots, *state.values()], [x, slots], list(state.values()))

    def _in_shares(
        self,
        e: Emitter,
        shape: AttentionShape,
        splits: int,
        dtype: str,
        kernel: DeviceKernel,
        programs: int,
        values: dict[str, Any],
    ) -> None:
        """Launch a decode kernel of so many programs a share, and what puts the shares together."""
        b, shares = values["b"], shares_of(splits, values["b"])
        self.variants.launch(e, kernel, values, (b, programs, shares))

        def merge(most: int) -> None:
            grid = (b, shape.heads, attention.merge_blocks(shape, most))
            merging = attention.merge_kernel(shape, most, dtype)
            self.variants.launch(e, merging, {**values, "shares": shares}, grid)

        if splits <= _FEW:
            merge(splits)
        else:
            with e.when(shares <= _FEW):
                merge(_FEW)
            with e.when(shares > _FEW):
                merge(splits)

    def _pools(self, site: AttentionSite, pages: Expr) -> dict[str, Any]:
        """The pools as arguments, by the names that kernels have for them."""
        names = {"x": "xpool", "k": "kpool", "v": "vpool", "k_scale": "kscale", "v_scale": "vscale"}
        # Those of another site are as this one's would be.
        state = replace(site, owner=None).state(self.page_size, self.keys_transposed)
        return {names[n]: argument(names[n], (pages, *shape), dtype) for n, (dtype, shape) in state.items()}


def operand(name: str, shape: tuple[Any, ...], dtype: str, view: View | None) -> dict[str, Any]:
    """What an attention is given as [1, *shape], shape being (heads, n, elements), and cosines and sines."""
    view = view or View()
    rows = shape[1]
    own = (1, *shape) if view.columns is None else (1, rows, view.columns)
    turned = zip(attention.ANGLES, view.angles)
    return {
        name: argument(name, own, dtype),
        **{name: argument(name, (1, rows, angle.columns), angle.dtype) for name, angle in turned},
    }


def shares_of(splits: int, sequences: Expr) -> Expr:
    """Shares of every sequence's keys in a decode, where one sequence alone has `splits`.

    In all as many as fill the GPU twice, since sequences differ in length, and no fewer than one each.
    """
    return tirx.min(i64(splits), tirx.floordiv(sequences + (2 * splits - 1), sequences))


def most_parts(splits: int, sequences: Any) -> Any:
    """What the shares of all sequences are together at most: a sum that grows with their number."""
    return sequences + (2 * splits - 1)


def parts_of(shape: AttentionShape, splits: int, sequences: Expr) -> Any:
    """The workspace of a decode."""
    return argument("part", (most_parts(splits, sequences), shape.heads, shape.value_dim + 2))
