"""What is known of an attention layer: its mask, its scores, and what it keeps of a token.

All are frozen and hold plain values, so that they can be compared, hashed and written as JSON.
Sizes are in bytes unless a name says tokens, rows or pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .views import Views

FloatName = Literal["float32", "float16", "bfloat16"]
StoredName = Literal["int8", "fp8", "int4"]
FormName = Literal[
    "paged_kv",
    "x_absorbed",
    "mla_latent",
    "v_only",
    "k_only",
    "k_plus_r",
    "x_gemm",
    "encoder_output",
    "kv-int8",
    "kv-fp8",
    "kv-int4",
]
STATE_FORMS: tuple[FormName, ...] = get_args(FormName)
CODES: dict[FormName, StoredName] = {"kv-int8": "int8", "kv-fp8": "fp8", "kv-int4": "int4"}
"""Forms that change results beyond rounding, each named as the permission that it needs."""
FLOAT_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPE_BYTES: dict[str, int] = {**FLOAT_BYTES, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class Reach:
    """Which keys the query at a position, and all later ones, may still see: what else is there can go.

    window: keys above position - window. chunk: keys of the position's chunk. Neither: every key.
    memory: the keys are not those of tokens but of the rows of an encoder's output, all of which are seen.
    """

    window: int | None = None
    chunk: int | None = None
    sinks: int = 0
    """Keys from 0 on that every query sees, whatever else it does."""
    memory: bool = False

    @property
    def bounded(self) -> bool:
        """Whether a long sequence keeps less than all its tokens."""
        return self.window is not None or self.chunk is not None

    def oldest(self, position: int) -> int:
        """The first key behind the sinks that a query at `position` or later may see."""
        if self.window is not None:
            return max(0, position - self.window + 1)
        return position // self.chunk * self.chunk if self.chunk is not None else 0

    def most_pages(self, page: int, context: int, step: int) -> int:
        """Most pages of `page` tokens that a sequence of at most `context` tokens holds while a call
        computes `step` of them."""
        whole = -(-context // page)
        if not self.bounded:
            return whole
        span = (self.window or self.chunk or 1) - 1 + step
        begins_on_page = self.chunk is not None and self.chunk % page == 0
        kept = -(-span // page) if begins_on_page or span < 2 else (span - 2) // page + 2
        return min(whole, kept + -(-self.sinks // page))


@dataclass(frozen=True)
class MaskFact:
    """The proved predicate m(q, k) of an attention site: whether the query at position q sees the key at k.

    causal: k <= q.
    window: q - window < k <= q.
    chunk: k <= q and q // chunk == k // chunk.
    sinks: k <= q and (k < sinks or q - window < k).
    predicate: anything else that implies k <= q.
    memory: every row of the encoder's output that a request has.
    """

    kind: Literal["causal", "window", "chunk", "sinks", "predicate", "memory"]
    window: int | None
    """Of a predicate: a window that it is proved to stay within, if one was found."""
    proof: str
    """How it was proved, in words, for `kvc inspect`."""
    chunk: int | None = None
    sinks: int | None = None
    predicate: str = "k <= q"
    """m as a Python expression over the ints q (position), k (position) and h (query head)."""

    @property
    def reach(self) -> Reach:
        """Which keys have to be kept."""
        return Reach(self.window, self.chunk, self.sinks or 0, self.kind == "memory")


@dataclass(frozen=True)
class Sliced:
    """Kept keys of several heads, one behind the other, that are turned when they are read.

    What is kept of a token: the keys of `count` heads, `rest` other elements, `half` cosines and `half`
    sines; if `fine`, as many elements again, a 256th of which is added to the cosines and sines.
    Element d < half of a key becomes x[d] cos[d] - x[d + half] sin[d], and element d + half becomes
    x[d + half] cos[d] + x[d] sin[d].
    """

    count: int
    dim: int
    """Elements of a key."""
    rest: int
    half: int
    fine: bool

    @property
    def value_dim(self) -> int:
        """Elements that are the value."""
        return self.count * self.dim + self.rest

    @property
    def width(self) -> int:
        """Elements that are kept of a token."""
        return self.value_dim + 2 * self.half * (2 if self.fine else 1)


@dataclass(frozen=True)
class Remade:
    """A kept value of a token that its keys and values are made from again when they are read.

    What is kept: `depth` elements, then `half` cosines and `half` sines; if `fine`, as many of these again, a
    256th of which is added. The first 2 * half elements of every key are turned as Sliced says; none if 0.
    """

    depth: int
    half: int
    fine: bool

    @property
    def width(self) -> int:
        """Elements that are kept of a token."""
        return self.depth + 2 * self.half * (2 if self.fine else 1)


@dataclass(frozen=True)
class Rekeyed:
    """Kept values of `count` KV heads, one behind the other, that keys are made of when they are read.

    What is kept of a token: the values, then `pairs` cosines and as many sines; if `fine`, as many of these
    again, a 256th of which is added. A key is the value of its head, times a factor for each element if
    `scaled`. Of that, elements d and d + half are turned as Sliced says for d < pairs, and no others.
    """

    count: int
    dim: int
    """Elements of a value and of a key."""
    half: int
    pairs: int
    fine: bool
    scaled: bool

    @property
    def values(self) -> int:
        """Elements of the values of a token."""
        return self.count * self.dim

    @property
    def width(self) -> int:
        """Elements that are kept of a token."""
        return self.values + 2 * self.pairs * (2 if self.fine else 1)


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer: softmax(softcap(scale * q k^T) masked) v, as found in the graph."""

    index: int
    node: str
    """Name of the ONNX node that computes the softmax (or the whole attention)."""
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float | None
    mask: MaskFact
    rope: str | None
    """How q and k are rotated before the scores: "rotate_half", or "rotary" for other forms; None if not."""
    slopes: tuple[float, ...] | None = None
    """ALiBi: slopes[h] * (k - q) is added to the scores of head h, after the softcap; None for no bias."""
    bias: tuple[tuple[float, ...], ...] | None = None
    """bias[h][min(q - k, last)] is added to the scores of head h, after the softcap (T5); None for none."""
    sinks: tuple[float, ...] | None = None
    """A learned score for every head that takes part in the softmax and has no value; None for none."""
    guarded: bool = False
    """Whether a row of the softmax that is NaN counts as zeros: PyTorch's where(isnan(p), 0, p)."""
    kv_dtype: FloatName = "float32"
    """The type that the graph computes keys and values in, and that they are kept in."""
    stored: StoredName | None = None
    """Codes that they are kept in instead, with a scale for every token and KV head; fp8 is e4m3."""
    kept: FormName = "paged_kv"
    """What is kept of a token. paged_kv: its keys and values. x_absorbed: the value that both are projections
    of, which then is the one key of all heads, and its value. mla_latent: that, and elements of the keys that
    all heads share; the value is the first value_dim elements. v_only: the values of all heads, cosines
    and sines; keys are made of them. k_only: the keys of all heads, before they are turned, and their cosines
    and sines; all but those are the value. k_plus_r: that, and some directions of what keys are projections
    of. x_gemm: the value that both are projections of, and cosines and sines; they are made again.
    encoder_output: of cross-attention, as x_absorbed, for several layers."""
    sliced: Sliced | None = None
    """How a query meets its own part of what is kept, where that is keys; else it meets all of it."""
    owner: int | None = None
    """The site that keeps the state for this one; None for its own."""
    remade: Remade | None = None
    """What is kept in the place of keys and values that are made again; they are as the site says."""
    rekeyed: Rekeyed | None = None
    """The same for values that keys are made of."""
    views: Views | None = None
    """Of a function that is being compiled: where queries, keys and values are read, and how turned."""

    @property
    def shared(self) -> bool:
        """Whether what is kept of a token is its key and its value in one."""
        return self.kept != "paged_kv"

    @property
    def row(self) -> Remade | Rekeyed | None:
        """What is kept of a token once for all heads, whose keys are made of it head by head."""
        return self.remade or self.rekeyed

    @property
    def query_dim(self) -> int:
        """Elements of a query."""
        return self.head_dim if self.sliced is None else self.sliced.dim

    @property
    def group(self) -> int:
        """Query heads that share one KV head (GQA)."""
        return self.heads // self.kv_heads

    def state(self, page: int, transposed: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of what is kept of `page` tokens; `transposed` keys stand as [head_dim, page].

        A byte of int4 holds elements i and i + dim / 2. What is key and value in one is never transposed.
        Nothing where another site keeps it.
        """
        if self.owner is not None:
            return {}
        if self.row is not None:
            return {"x": (self.kv_dtype, (1, page, self.row.width))}
        if self.shared:
            return {"x": (self.kv_dtype, (self.kv_heads, page, self.head_dim))}
        dtypes: dict[str | None, str] = {None: self.kv_dtype, "int8": "int8", "fp8": "uint8", "int4": "uint8"}
        parts = 2 if self.stored == "int4" else 1
        keys = (self.head_dim // parts, page) if transposed else (page, self.head_dim // parts)
        kept = {
            "k": (dtypes[self.stored], (self.kv_heads, *keys)),
            "v": (dtypes[self.stored], (self.kv_heads, page, self.value_dim // parts)),
        }
        scales = ("bfloat16", (self.kv_heads, page))
        return kept | ({"k_scale": scales, "v_scale": scales} if self.stored else {})

    @property
    def form(self) -> str:
        """How keys and values are kept, in words."""
        names = {"paged_kv": "K and V", "x_absorbed": f"X [{self.head_dim}]"}
        names["mla_latent"] = f"latent [{self.head_dim}]"
        names["encoder_output"] = f"encoder output [{self.head_dim}]"
        if self.sliced is not None:
            keys, angles = self.sliced.count * self.sliced.dim, self.head_dim - self.value_dim
            rest = f" + {self.sliced.rest}" if self.sliced.rest else ""
            names[self.kept] = f"K [{keys}{rest} + {angles} of angles]"
        if self.remade is not None:
            depth, angles = self.remade.depth, self.remade.width - self.remade.depth
            names[self.kept] = f"X [{depth} + {angles} of angles] for K and V"
        if self.rekeyed is not None:
            angles = self.rekeyed.width - self.rekeyed.values
            names[self.kept] = f"V [{self.rekeyed.values} + {angles} of angles] for K and V"
        return f"paged {names[self.kept]}, {self.stored or self.kv_dtype}"

    def token_bytes(self) -> int:
        """Bytes kept for one token."""
        return sum(math.prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in self.state(1, False).values())


def grouped(sites: Sequence[AttentionSite]) -> tuple[tuple[Reach, tuple[AttentionSite, ...]], ...]:
    """Sites by their reach, in the order of the first of each."""
    found: dict[Reach, list[AttentionSite]] = {}
    for site in sites:
        found.setdefault(site.mask.reach, []).append(site)
    return tuple((reach, tuple(members)) for reach, members in found.items())
