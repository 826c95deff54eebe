"""What is decided for a budget: the workload, every byte of it, the time it takes, the plan.

All are frozen and hold plain values, so that they can be compared, hashed and written as JSON.
Sizes are in bytes unless a name says tokens, rows or pages.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from .sites import FormName, Reach


@dataclass(frozen=True)
class Workload:
    """`batch` requests of `context` tokens (prompt and answer together) in flight at once."""

    batch: int
    context: int
    prefix: int = 0
    """Tokens at the beginning that all requests have in common, and keep once."""
    memory: int = 0
    """Rows of an encoder's output that each request comes with."""

    def __str__(self) -> str:
        memory, prefix = (f"{sign}{n}" if n else "" for sign, n in (("+", self.memory), ("/", self.prefix)))
        return f"{self.batch}x{self.context}{memory}{prefix}"


@dataclass(frozen=True)
class StateGroup:
    """Attention sites that keep the same tokens: they share a pool's page numbers and a block table."""

    sites: tuple[int, ...]
    reach: Reach
    form: str
    """How the sites keep their state; see AttentionSite.form."""
    page_bytes: int
    """Bytes that a page takes over the group's sites."""
    pages: int
    """Pages in the pools of its sites."""


@dataclass(frozen=True)
class Bytes:
    """Every byte of a running model, line by line; `total` is the promise."""

    weights: int
    pools: int
    """KV pages."""
    tables: int
    """The largest call's inputs (block tables, slots, positions, ...), records of pages, and the encoder
    outputs that requests came with."""
    arena: int
    """All temporaries of the larger of the compiled functions, a compile-time constant."""
    outputs: int
    """Logits of the most rows one call returns, and the sampler's copy."""
    runtime: int
    """The process itself: interpreter, libraries, tokenizer, threads."""
    workspaces: int = 0
    """Local buffers of kernels, of every thread."""
    encoder: int = 0
    """An encoder's inputs: of a call, and on a CPU those that requests came with."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Times:
    """What a workload takes, as predicted: all its requests at once, each a prompt and an answer."""

    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    """Tokens of all prompts, those in common once."""
    answer_tokens: int
    """Tokens of all answers."""

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds


@dataclass(frozen=True)
class EncoderPlan:
    """How the encoder runs: one request after another."""

    name: str
    longest: int
    """The largest extent that a request may choose; 0 where it has no choice."""
    arena: int
    """Bytes of its temporaries, within those of Bytes.arena."""
    natural: int
    """The same as its graph stands; more than `arena` where parts are computed later, again, or in slices."""
    weights: int
    """Bytes of its weights, a part of Bytes.weights."""


@dataclass(frozen=True)
class Plan:
    """What was decided for a budget; written to plan.json, read by the runtime."""

    budget: int
    workload: tuple[Workload, ...]
    target: dict[str, Any]
    page_size: int
    """Tokens a page."""
    groups: tuple[StateGroup, ...]
    chunk: int
    """Most tokens in one prefill call."""
    tile: int
    """Query tokens handled by one task of the prefill attention kernel."""
    max_batch: int
    """Most sequences in one call."""
    max_context: int
    """Most tokens of one sequence."""
    bytes: Bytes
    max_memory: int = 0
    """Most rows of an encoder's output of one sequence."""
    keys_transposed: bool = True
    """Whether a page holds its keys as [head_dim, page_size]; else as [page_size, head_dim]."""
    capacities: tuple[Workload, ...] = ()
    """What this budget could serve at most: one request, and requests of the workload's contexts."""
    forms: tuple[FormName, ...] = ()
    """What is kept of every site."""
    times: tuple[Times, ...] = ()
    """What each alternative of the workload is predicted to take."""
    rates: str = ""
    """Where the rates that these follow from come from."""
    ffn_chunk: int = 0
    """Tokens of a prefill call for which feed-forward parts are computed at once, 0 for all of them."""
    encoder: EncoderPlan | None = None
    """Of the encoder in the same artifact."""

    @property
    def seconds(self) -> float:
        """What all alternatives of the workload are predicted to take."""
        return sum(each.seconds for each in self.times)

    @property
    def table_width(self) -> int:
        """Columns of the block table."""
        return self.table_columns(False)

    def table_columns(self, memory: bool) -> int:
        """Columns of the block table of tokens, or of rows of an encoder's output."""
        return -(-(self.max_memory if memory else self.max_context) // self.page_size)

    @property
    def max_tiles(self) -> int:
        """Most tiles a prefill call can have: every sequence may end in a part tile."""
        return self.chunk // self.tile + self.max_batch


def chunk_text(chunk: int, ffn: int) -> str:
    """How a prefill call is cut, in words: the tokens of a chunk, and of a slice of feed-forward parts."""
    return f"{chunk}, feed-forward in slices of {ffn}" if ffn else str(chunk)


def plan_from_json(text: str) -> Plan:
    """The inverse of `to_json` for Plan. Raises KeyError or TypeError on other JSON."""
    data = json.loads(text)
    workload = tuple(Workload(**w) for w in data["workload"])
    groups, capacities = tuple(map(_group, data["groups"])), tuple(Workload(**w) for w in data["capacities"])
    times = tuple(Times(**t) for t in data.get("times", ()))
    lists = {"workload": workload, "groups": groups, "capacities": capacities, "times": times}
    lists["forms"] = tuple(data.get("forms", ()))
    encoder = data.get("encoder")
    parts = {"bytes": Bytes(**data["bytes"]), "encoder": None if encoder is None else EncoderPlan(**encoder)}
    return Plan(**{**data, **lists, **parts})


def _group(data: dict[str, Any]) -> StateGroup:
    return StateGroup(**{**data, "sites": tuple(data["sites"]), "reach": Reach(**data["reach"])})
