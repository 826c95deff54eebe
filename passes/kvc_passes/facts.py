"""Nouns shared by the passes, the planner, the artifact and the runtime.

All are frozen and hold plain values, so that they can be compared, hashed and written as JSON.
Sizes are in bytes unless a name says tokens, rows or pages.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

FloatName = Literal["float32", "float16", "bfloat16"]
FLOAT_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Roles:
    """Names of the model's inputs by what they are for."""

    tokens: str
    """Token ids [batch, sequence]."""
    attention_mask: str | None = None
    positions: str | None = None
    past: tuple[str, ...] = ()
    """Past keys and values [batch, kv heads, past, head dim]."""


@dataclass(frozen=True)
class MaskFact:
    """The proved predicate m(q, k) of an attention site: whether the query at position q sees the key at k.

    causal: k <= q.
    window: q - window < k <= q.
    chunk: k <= q and q // chunk == k // chunk.
    sinks: k <= q and (k < sinks or q - window < k).
    predicate: anything else that implies k <= q.
    """

    kind: Literal["causal", "window", "chunk", "sinks", "predicate"]
    window: int | None
    proof: str
    """How it was proved, in words, for `kvc inspect`."""
    chunk: int | None = None
    sinks: int | None = None
    predicate: str = "k <= q"
    """m as a Python expression over the ints q (position), k (position) and h (query head)."""


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
    sinks: tuple[float, ...] | None = None
    """A learned score for every head that takes part in the softmax and has no value; None for none."""
    guarded: bool = False
    """Whether a row of the softmax that is NaN counts as zeros: PyTorch's where(isnan(p), 0, p)."""
    kv_dtype: FloatName = "float32"
    """The type that the graph computes keys and values in, and that they are stored in."""

    @property
    def group(self) -> int:
        """Query heads that share one KV head (GQA)."""
        return self.heads // self.kv_heads

    def page_shapes(self, page: int, transposed: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a page of keys and of one of values; `transposed` keys stand as [head_dim, page]."""
        keys = (self.head_dim, page) if transposed else (page, self.head_dim)
        return (self.kv_heads, *keys), (self.kv_heads, page, self.value_dim)

    def token_bytes(self) -> int:
        """Bytes of K and V kept for one token."""
        return self.kv_heads * (self.head_dim + self.value_dim) * FLOAT_BYTES[self.kv_dtype]


@dataclass(frozen=True)
class ModelFacts:
    """What was proved about a model, independent of budget and target."""

    name: str
    vocab: int
    """Rows of the embedding table: token ids are 0 .. vocab - 1."""
    logits: int
    """Columns of the logits (at least vocab in most exports, sometimes padded)."""
    context: int | None
    """Most positions that the model has (table size, or max_position_embeddings), None if unbounded."""
    sites: tuple[AttentionSite, ...]
    positions: tuple[str, ...]
    """ONNX names of the values that were proved to be token positions."""
    parameter_bytes: dict[str, int]
    """Bytes of the parameters by dtype, as they stand in the ONNX file."""
    nodes: int
    """ONNX nodes in the graph."""
    warnings: tuple[str, ...] = ()
    """What files beside the model say otherwise."""
    allowed: tuple[str, ...] = ()
    """Permissions that were used: results differ beyond rounding."""

    def kv_token_bytes(self) -> int:
        """Bytes of KV state that one token of context takes over all layers."""
        return sum(s.token_bytes() for s in self.sites)


@dataclass(frozen=True)
class WeightFormat:
    """How the numbers of a constant matrix are stored.

    Floats stand for themselves. Codes are unsigned: the weight is (code - zero) * scale, where `block`
    consecutive inputs of one output share a scale and a zero point.
    """

    dtype: Literal["float32", "float16", "bfloat16", "uint4", "uint8"] = "float32"
    block: int = 0
    """Inputs that share a scale, for codes; the last block of a row may be shorter. 0 for floats."""
    scales: FloatName = "float32"
    zeros: bool = False
    """Whether every block has a zero point of its own; else it is 8 (uint4) or 128 (uint8)."""

    @property
    def coded(self) -> bool:
        return self.dtype in ("uint4", "uint8")


FLOAT32 = WeightFormat()


@dataclass(frozen=True)
class Workload:
    """`batch` requests of `context` tokens (prompt and answer together) in flight at once."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}"


@dataclass(frozen=True)
class Bytes:
    """Every byte of a running model, line by line; `total` is the promise."""

    weights: int
    pools: int
    """KV pages."""
    tables: int
    """Block table, slots, positions, tokens, tiles, rows: the largest call's integer inputs."""
    arena: int
    """All temporaries of the larger of the compiled functions, a compile-time constant."""
    outputs: int
    """Logits of the most rows one call returns, and the sampler's copy."""
    runtime: int
    """The process itself: interpreter, libraries, tokenizer, threads."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Plan:
    """What was decided for a budget; written to plan.json, read by the runtime."""

    budget: int
    workload: tuple[Workload, ...]
    target: dict[str, Any]
    page_size: int
    """Tokens a page."""
    page_bytes: int
    """Bytes a page takes over all sites."""
    pages: int
    """Pages in the pools."""
    chunk: int
    """Most tokens in one prefill call."""
    tile: int
    """Query tokens handled by one task of the prefill attention kernel."""
    max_batch: int
    """Most sequences in one call."""
    max_context: int
    """Most tokens of one sequence (a multiple of page_size unless the model's context is not)."""
    bytes: Bytes
    keys_transposed: bool = True
    """Whether a page holds its keys as [head_dim, page_size]; else as [page_size, head_dim]."""

    @property
    def table_width(self) -> int:
        """Columns of the block table."""
        return -(-self.max_context // self.page_size)

    @property
    def max_tiles(self) -> int:
        """Most tiles a prefill call can have: every sequence may end in a part tile."""
        return self.chunk // self.tile + self.max_batch


def to_json(value: Any) -> str:
    """A fact or a plan as indented JSON text."""
    return json.dumps(dataclasses.asdict(value), indent=2) + "\n"


def facts_from_json(text: str) -> ModelFacts:
    """The inverse of `to_json` for ModelFacts. Raises KeyError or TypeError on other JSON."""
    data = json.loads(text)
    sites = tuple(_site(s) for s in data["sites"])
    lists = {name: tuple(data[name]) for name in ("positions", "warnings", "allowed")}
    return ModelFacts(**{**data, **lists, "sites": sites})


def _site(data: dict[str, Any]) -> AttentionSite:
    lists = {k: tuple(v) for k, v in data.items() if isinstance(v, list)}
    return AttentionSite(**{**data, **lists, "mask": MaskFact(**data["mask"])})


def plan_from_json(text: str) -> Plan:
    """The inverse of `to_json` for Plan. Raises KeyError or TypeError on other JSON."""
    data = json.loads(text)
    workload = tuple(Workload(**w) for w in data["workload"])
    return Plan(**{**data, "workload": workload, "bytes": Bytes(**data["bytes"])})
