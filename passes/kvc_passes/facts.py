"""What is proved about a model, independent of budget and target.

All is frozen and holds plain values, so that it can be compared, hashed and written as JSON.
Sizes are in bytes unless a name says tokens or rows.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from .sites import AttentionSite, FloatName, FormName, MaskFact, Reach, Rekeyed, Remade, Sliced, grouped


@dataclass(frozen=True)
class Roles:
    """Names of the model's inputs by what they are for."""

    tokens: str
    """Token ids [batch, sequence]."""
    attention_mask: str | None = None
    positions: str | None = None
    past: tuple[str, ...] = ()
    """Past keys and values [batch, kv heads, past, head dim]."""
    memory: str | None = None
    """An encoder's output [batch, rows, width], which cross-attention reads."""
    memory_mask: str | None = None
    """Which of its rows are no padding [batch, rows]."""


@dataclass(frozen=True)
class StateForm:
    """A form that a layer's state could be kept in."""

    name: FormName
    token_bytes: int
    """Bytes of a token; 0 where the form is not legal and the size not known."""
    detail: str
    """What is kept, or why the form is not legal."""
    legal: bool = True
    rest: int = 0
    """Of k_plus_r: directions that are kept beside the keys."""


@dataclass(frozen=True)
class EncoderInput:
    """An input of the encoder, as a request comes with it."""

    name: str
    """In the ONNX file."""
    dtype: str
    """What it is computed with; 16-bit floats of the file are given as float32."""
    shape: tuple[int | None, ...]
    """Behind the batch; None: the extent that requests may choose."""
    ids: int | None = None
    """Token ids are 0 .. ids - 1; None for other numbers."""
    mask: bool = False
    """Says which elements are no padding. Requests are not padded: all ones, and it may be left out."""


@dataclass(frozen=True)
class EncoderFacts:
    """The encoder that is compiled with a decoder."""

    name: str
    inputs: tuple[EncoderInput, ...]
    least: int
    """The smallest extent that a request may choose; 0 where it has no choice."""
    parameter_bytes: dict[str, int]
    """As of the decoder."""
    nodes: int


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
    forms: tuple[tuple[StateForm, ...], ...] = ()
    """For every site, the forms of its state, legal or not."""
    memory: tuple[int, FloatName] | None = None
    """Elements and type of a row of the encoder's output that the decoder reads."""
    encoder: EncoderFacts | None = None
    """The encoder in the same artifact, if there is one."""

    @property
    def choices(self) -> int:
        """Tokens that can be chosen, the first ones: embedding tables can have rows that no logit is for."""
        return min(self.vocab, self.logits)

    @property
    def reads_memory(self) -> bool:
        """Whether requests come with an encoder's output."""
        return any(s.mask.reach.memory for s in self.sites)

    def kv_token_bytes(self) -> int:
        """Bytes of KV state that one token of context takes over all layers."""
        return sum(s.token_bytes() for s in self.sites if not s.mask.reach.memory)

    def memory_row_bytes(self) -> int:
        """Bytes that a row of the encoder's output takes over all layers."""
        return sum(s.token_bytes() for s in self.sites if s.mask.reach.memory)

    def groups(self) -> tuple[tuple[Reach, tuple[AttentionSite, ...]], ...]:
        """The sites by which tokens they keep."""
        return grouped(self.sites)


def to_json(value: Any) -> str:
    """A fact or a plan as indented JSON text."""
    return json.dumps(dataclasses.asdict(value), indent=2) + "\n"


def facts_from_json(text: str) -> ModelFacts:
    """The inverse of `to_json` for ModelFacts. Raises KeyError or TypeError on other JSON."""
    data = json.loads(text)
    sites = tuple(_site(s) for s in data["sites"])
    lists = {name: tuple(data[name]) for name in ("positions", "warnings", "allowed")}
    forms = tuple(tuple(StateForm(**form) for form in site) for site in data["forms"])
    memory = None if data["memory"] is None else tuple(data["memory"])
    parts = {"sites": sites, "forms": forms, "memory": memory, "encoder": _encoder(data.get("encoder"))}
    return ModelFacts(**{**data, **lists, **parts})


def _encoder(data: dict[str, Any] | None) -> EncoderFacts | None:
    if data is None:
        return None
    inputs = tuple(EncoderInput(**{**each, "shape": tuple(each["shape"])}) for each in data["inputs"])
    return EncoderFacts(**{**data, "inputs": inputs})


def _site(data: dict[str, Any]) -> AttentionSite:
    lists = {k: tuple(v) for k, v in data.items() if isinstance(v, list)}
    if data.get("bias") is not None:
        lists["bias"] = tuple(map(tuple, data["bias"]))
    sliced = None if data["sliced"] is None else Sliced(**data["sliced"])
    remade = None if data.get("remade") is None else Remade(**data["remade"])
    rekeyed = None if data.get("rekeyed") is None else Rekeyed(**data["rekeyed"])
    parts = {"mask": MaskFact(**data["mask"]), "sliced": sliced, "remade": remade, "rekeyed": rekeyed}
    return AttentionSite(**{**data, **lists, **parts})
