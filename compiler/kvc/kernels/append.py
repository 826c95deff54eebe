"""Writing a call's keys and values into their pages, as floats or as codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .attention import AttentionShape, pools
from .emit import Emitter, Expr, argument, chunks, copy_rows, i64, narrowed, size_var, vec
from .stored import inverse_of, row_of
from .traits import CpuTraits

_BLOCK = 16
"""Tokens that one task writes."""


def append_kv(shape: AttentionShape, traits: CpuTraits) -> tirx.PrimFunc:
    """Write the keys and values of a call's tokens into their pages.

    Arguments of the function: k f32[1, Hkv, n, D], v f32[1, Hkv, n, Dv] (not of a shared shape), slots
    i32[n], and `pools`, in place.
    """
    e, n = Emitter(), size_var("n")
    k = argument("k", (1, shape.kv_heads, n, shape.head_dim))
    v = argument("v", (1, shape.kv_heads, n, shape.value_dim))
    slots = argument("slots", (n,), "int32")
    state = pools(shape, size_var("pages"))
    writer = _Writer(e, shape, k, v, slots, state, traits.lanes)
    write = writer.codes if shape.stored else writer.rows if shape.shared else writer.floats
    with e.when(n < _BLOCK), e.loop("h", shape.kv_heads) as h:
        write(h, i64(0), n)
    with e.when(n >= _BLOCK):
        blocks = tirx.floordiv(n + (_BLOCK - 1), i64(_BLOCK))
        with e.loop("j", blocks * shape.kv_heads, parallel=True) as j:
            start = e.bind("start", tirx.floordiv(j, i64(shape.kv_heads)) * _BLOCK)
            write(tirx.floormod(j, i64(shape.kv_heads)), start, tirx.Min(n - start, i64(_BLOCK)))
    inputs = [k, slots] if shape.shared else [k, v, slots]
    return e.function([*inputs, *state.values()], inputs, list(state.values()))


@dataclass(frozen=True)
class _Writer:
    """Emits the writing of `count` tokens from `start` on, of one KV head."""

    e: Emitter
    shape: AttentionShape
    k: Any
    v: Any
    slots: Any
    state: Mapping[str, Any]
    lanes: int

    def floats(self, head: Expr, start: Expr, count: Expr) -> None:
        e, shape = self.e, self.shape
        # Token innermost: neighbours fill the same cache lines of a page.
        with e.loop("d", shape.head_dim) as d, e.loop("i", count) as i:
            page, offset = self._place(start + i)
            value = narrowed(self.k[i64(0), head, start + i, d], shape.kv_dtype)
            e.store(self.state["k"], value, page, head, d, offset)
        with e.loop("i", count) as i:
            page, offset = self._place(start + i)
            source, to = [i64(0), head, start + i], [page, head, offset]
            copy_rows(e, self.v, source, self.state["v"], to, shape.value_dim, self.lanes)

    def rows(self, head: Expr, start: Expr, count: Expr) -> None:
        with self.e.loop("i", count) as i:
            page, offset = self._place(start + i)
            source, to = [i64(0), head, start + i], [page, head, offset]
            copy_rows(self.e, self.k, source, self.state["x"], to, self.shape.head_dim, self.lanes)

    def codes(self, head: Expr, start: Expr, count: Expr) -> None:
        e, shape, form, state = self.e, self.shape, self.shape.form, self.state
        with e.loop("i", count) as i:
            page, offset = self._place(start + i)
            source = [i64(0), head, start + i]
            for name, x, dim in (("k", self.k, shape.head_dim), ("v", self.v, shape.value_dim)):
                width, row = dim // form.parts, row_of(x, source)
                scale = form.scale_of(e, row, chunks(dim, self.lanes))
                e.store(state[f"{name}_scale"], tirx.reinterpret("bfloat16", scale), page, head, offset)
                inverse = inverse_of(e, scale)
                if name == "k":
                    with e.loop("d", width) as d:
                        numbers = [x[(*source, d + part * width)] for part in range(form.parts)]
                        e.store(state["k"], form.code(numbers, inverse), page, head, d, offset)
                    continue
                for first, lanes in chunks(width, self.lanes):
                    numbers = [row(first + part * width, lanes) for part in range(form.parts)]
                    codes = form.code(numbers, inverse)
                    e.store(state["v"], codes, page, head, offset, vec(i64(first), lanes))

    def _place(self, token: Expr) -> tuple[Expr, Expr]:
        """The page and the offset of a token."""
        slot = self.e.bind("slot", tirx.Cast("int64", self.slots[token]))
        return tirx.floordiv(slot, i64(self.shape.page_size)), tirx.floormod(slot, i64(self.shape.page_size))
