"""Markers: calls that stand for a whole operator with its attributes, until a pass replaces them.

A marker is `relax.op.call_pure_packed(NAME, *tensors, attrs, ty_args=type)`; `attrs` is JSON in a StringImm.
`kvc.sdpa`, `kvc.rotary` and `kvc.dequantize` come from the importer, where the file has one operator for
what others spell out; `kvc.attention` is what RecognizeAttention puts in the place of every attention,
`kvc.head_product`, `kvc.latent_attention`, `kvc.remade_attention` and `kvc.rekeyed_attention` what other
forms of the state put there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from tvm import relax
from tvm.ir import StringImm

ATTENTION = "kvc.attention"
SDPA = "kvc.sdpa"
ROTARY = "kvc.rotary"
DEQUANTIZE = "kvc.dequantize"
HEAD_PRODUCT = "kvc.head_product"
LATENT = "kvc.latent_attention"
REMADE = "kvc.remade_attention"
REKEYED = "kvc.rekeyed_attention"
"""(q [1,h,n,e], row [1,1,n,w], [factors f32 [g*e]], site) -> [1,n,h,e]: sites.Rekeyed says what a row is."""
ATTENTIONS = (ATTENTION, LATENT, REMADE, REKEYED)
HEAD_WEIGHT = "kvc.head_weight"

Extra = Literal["mask", "lengths", "sinks"]


@dataclass(frozen=True)
class Sdpa:
    """Attributes of `kvc.sdpa(q [b,h,s,e], k [b,g,t,e], v [b,g,t,f], *extras) -> [b,h,s,f]`.

    softmax(softcap(scale * q k^T) + mask) v, in the order of ONNX's Attention: the scores are scaled, bounded
    by the softcap, masked. Query head i reads KV head i // (h // g). Rows that see no key give zeros.
    """

    scale: float
    softcap: float | None = None
    causal: bool = False
    """Query i sees keys up to i + offset."""
    offset: Literal["zero", "past"] = "zero"
    """The offset of causal and window: 0, or t - s (the keys of a past come first)."""
    window: int | None = None
    """Query i sees keys from i + offset - window + 1 on."""
    extras: tuple[Extra, ...] = ()
    """Further operands, in order. mask: bool (true shows) or float (added), broadcast to [b,h,s,t].
    lengths: int [b] or [b,1], the number of keys of each sequence, less one, that are no padding.
    sinks: float [h], a score a head that takes part in the softmax and has no value."""


@dataclass(frozen=True)
class Rotary:
    """Attributes of `kvc.rotary(x [b,h,s,e], cos [b or 1,s,r], sin [b or 1,s,r]) -> [b,h,s,e]`.

    The first 2 r elements of a head are rotated: pairs are (i, i + r), or (2 i, 2 i + 1) if interleaved.
    """

    interleaved: bool = False


@dataclass(frozen=True)
class Dequantize:
    """Attributes of `kvc.dequantize(codes, scales, [zeros]) -> float [rows, columns]`.

    Element [i, j] is (code - zero) * scale. The codes' bytes, row by row, hold `stored` codes a row, of which
    the first `columns` count; 4-bit codes stand two in a byte, the lower four bits first. Blocks of `block`
    elements along `axis` share a scale: scales [rows, ceil(columns / block)] for axis 1,
    [ceil(rows / block), columns] for axis 0, of any shape with that many elements; one scale alone is that
    of all. Zeros have the shape of the scales and are stored like the codes, `zeros_stored` a row, 0 for one
    zero for all; without them the zero is `middle`.
    """

    rows: int
    columns: int
    bits: Literal[4, 8]
    signed: bool
    axis: Literal[0, 1]
    block: int
    stored: int
    zeros_stored: int = 0
    middle: int = 0


@dataclass(frozen=True)
class HeadProduct:
    """Attributes of `kvc.head_product(x, weight [depth, columns]) -> y`: a product a head.

    Head h has columns first + (h // group) * stride .. + width - 1 of the weight, W_h [depth, width].
    x [1,n,h,depth] -> y [1,n,h,width] = x W_h; absorbed: x [1,h,n,width] -> y [1,h,n,depth] = x W_h^T.
    """

    heads: int
    """Heads of x."""
    group: int
    """Heads that share columns."""
    width: int
    first: int
    stride: int
    absorbed: bool = False


@dataclass(frozen=True)
class Latent:
    """Attributes of `kvc.latent_attention(q [1,h,n,e], x [1,1,n,w], W_K, W_V, site) -> [1,n,h,f]`.

    Attention with keys [x W_K, the rest of x] and values x W_V: W_K [d, ..] and W_V [d, ..] as HeadProduct
    takes them, the first d elements of x. `kvc.head_weight(W)` with the attributes of a HeadProduct is the
    weight as its kernels take it.

    Also of `kvc.remade_attention(q, row [1,1,n,w], W_K, W_V, *biases, site)`: keys x W_K + b_K, which are
    then turned, and values x W_V + b_V, row being x and angles as sites.Remade says; biases [heads * width].
    """

    site: int
    key: HeadProduct
    value: HeadProduct
    biases: tuple[bool, bool] = (False, False)
    """Whether keys and values have a bias, which is then an operand."""


Attrs = TypeVar("Attrs", Sdpa, Rotary, Dequantize, HeadProduct, Latent)


def marker(name: str, operands: Sequence[relax.Expr], attrs: Any, type_: relax.Type) -> relax.Call:
    """A call of the marker `name`."""
    text = StringImm(json.dumps(dataclasses.asdict(attrs)))
    call: relax.Call = relax.op.call_pure_packed(name, *operands, text, ty_args=type_)
    return call


def attributes(call: relax.Call, kind: type[Attrs]) -> Attrs:
    """The attributes of a marker call."""
    values: dict[str, Any] = json.loads(call.args[-1].value)
    make: Any = kind
    if kind is Latent:
        values |= {name: HeadProduct(**values[name]) for name in ("key", "value")}
    return cast(Attrs, make(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}))


def tensors(call: relax.Call) -> list[relax.Expr]:
    """The operands of a marker call, without its name and attributes."""
    return list(call.args[1:-1])
