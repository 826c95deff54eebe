"""Attention markers become kernels over pages."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tvm import IRModule, relax, tirx

from .base import Result
from .graph import Graph, dims, graph_of, op_name
from .kernel_sets import AttentionKernels
from .markers import (
    ATTENTION,
    HEAD_PRODUCT,
    HEAD_WEIGHT,
    LATENT,
    REKEYED,
    REMADE,
    HeadProduct,
    Latent,
    attributes,
    marker,
    tensors,
)
from .paged_calls import PagedCalls, dtype_of
from .rebuild import drop_unused, insert_params, rebuild
from .sites import AttentionSite
from .weights import HeadWeight, head_weight_of

_INPUT = re.compile(r"tokens|positions|tiles|rows|memory_last|(slots|block_table)_\d+")


def is_input(name: str) -> bool:
    """Whether a parameter is an integer input of every call, and no pool or weight."""
    return _INPUT.fullmatch(name) is not None


@dataclass(frozen=True)
class PageAttention:
    """Keys and values live in pages that the function is given and updates in place.

    Before: `kvc.attention(q [1,h,n,e], k [1,g,n,e], v [1,g,n,f], site)`, perhaps as ReadInPlace leaves it,
        `kvc.latent_attention(q, x, W_K, W_V)`, `kvc.remade_attention(q, row, W_K, W_V, *biases)` or
        `kvc.rekeyed_attention(q, row, *factors)`.
    After: k and v are appended to the site's pools at `slots`, then attention reads the pages of a block
        table. Sites that keep other tokens have slots and a table of their own, numbered as `grouped` does.
        New parameters behind positions: slots_0 [n], ..., in prefill tiles [t,3], block_table_0 [b,m], ...;
        before the weights: k_i [pages_g, g, e, page] and v_i [pages_g, g, page, f] of every site i, or x_i
        [pages_g, 1, page, e] where key and value are one (k is v then).
        Pools are of the type that the graph keeps keys and values in.
        Cross-attention appends nothing (EncodeMemory does): it has no slots, and behind the tables
        memory_last i64 [n], the last row of the encoder's output of each token's sequence. That output, and
        weights that only it went through, are no parameters any more.
    Needs: FlattenTokens.
    Refuses: nothing; every site's geometry was proved.
    """

    sites: tuple[AttentionSite, ...]
    kernels: AttentionKernels
    phase: Literal["prefill", "decode"]

    def run(self, mod: IRModule) -> Result:
        function = mod["main"]
        graph = graph_of(function)
        calls = PagedCalls(self.sites, self.kernels)
        inputs = self._inputs(function, calls)

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if op_name(value) == ATTENTION:
                query, key, new_value, index, *angles = value.args[1:]
                site = self.sites[int(index.value)]
                return self._attend(builder, calls, inputs, site, query, key, new_value, angles)
            if op_name(value) == REKEYED:
                return self._rekeyed(builder, calls, inputs, value)
            if op_name(value) == REMADE:
                return self._remade(builder, calls, inputs, value, graph, graph.definitions[var])
            if op_name(value) != LATENT:
                return None
            attrs = attributes(value, Latent)
            query, x, *weights = tensors(value)
            site = self.sites[attrs.site]
            sizes = (attrs.key.width, attrs.value.width, dtype_of(query))
            rebuilds = not site.mask.reach.memory and self.kernels.rebuilds(*sizes)
            if self.phase == "prefill" and rebuilds:
                of_file = zip(tensors(graph.definitions[var])[2:], (attrs.key, attrs.value))
                formats = [head_weight_of(graph, weight, part) for weight, part in of_file]
                state = calls.append(builder, site, x, x, inputs.slots[calls.group_of[site.index]])
                given = [query, *state, *inputs.places(calls, site), *_extras(site)]
                return self._rebuilt(builder, calls, site, given, attrs, weights, formats)
            asked = _absorbed(builder, query, attrs.key, weights[0], site)
            mixed = builder.emit(self._attend(builder, calls, inputs, site, asked, x, x))
            return marker(HEAD_PRODUCT, [mixed, weights[1]], attrs.value, var.ty)

        params = insert_params(function, "positions", inputs.integers)
        ordered = [pool for site in self.sites for pool in calls.pools[site.index]]
        at = max(i for i, p in enumerate(params) if is_input(p.name)) + 1
        module = rebuild(mod, [*params[:at], *ordered, *params[at:]], place)
        if any(reach.memory for reach, _ in calls.groups):
            module = drop_unused(module, len(params[:at]) + len(ordered))
        return Result(module, len(self.sites))

    def _inputs(self, function: relax.Function, calls: PagedCalls) -> _Inputs:
        (n,) = dims(function.params[0])

        def integers(name: str, *shape: Any, dtype: str = "int32") -> relax.Var:
            return relax.Var(name, relax.TensorType(shape, dtype))

        t, m = tirx.Var("t", "int64"), tirx.Var("m", "int64")
        sequences = n if self.phase == "decode" else tirx.Var("b", "int64")
        of_memory = [g for g, (reach, _) in enumerate(calls.groups) if reach.memory]
        widths = {g: tirx.Var("rows_m", "int64") for g in of_memory}
        return _Inputs(
            positions=function.params[1],
            slots={g: integers(f"slots_{g}", n) for g in range(len(calls.groups)) if g not in of_memory},
            tiles=integers("tiles", t, 3) if self.phase == "prefill" else None,
            tables=[
                integers(f"block_table_{g}", sequences, widths.get(g, m)) for g in range(len(calls.groups))
            ],
            last=integers("memory_last", n, dtype="int64") if of_memory else None,
        )

    def _attend(
        self,
        builder: relax.BlockBuilder,
        calls: PagedCalls,
        inputs: _Inputs,
        site: AttentionSite,
        query: relax.Expr,
        key: relax.Expr,
        new_value: relax.Expr,
        angles: Sequence[relax.Expr] = (),
    ) -> relax.Expr:
        """Attention of a site over its pages, [1, n, heads, f]; angles: as ReadInPlace gives them."""
        view = site.views.query if site.views is not None else None
        turning = angles[: len(view.angles) if view is not None else 0]
        if site.mask.reach.memory:
            state: list[relax.Expr] = list(calls.state(site))
        else:
            slots = inputs.slots[calls.group_of[site.index]]
            state = calls.append(builder, site, key, new_value, slots, angles[len(turning) :])
        operands = [query, *turning, *state, *inputs.places(calls, site), *_extras(site)]
        kernel = calls.kernel(builder, f"{self.phase}_attention", site, dtype_of(query))
        return self._call(builder, kernel, site, operands)

    def _call(
        self, builder: relax.BlockBuilder, kernel: Any, site: AttentionSite, operands: list[relax.Expr]
    ) -> relax.Expr:
        """What the phase's kernel of a site makes of operands, of which the first is the query."""
        n, dtype = dims(operands[0])[-2], dtype_of(operands[0]) if site.sliced is None else "float32"
        out = relax.TensorType((1, n, site.heads, site.value_dim), dtype)
        if self.phase == "prefill":
            return relax.op.call_tir(kernel, operands, out)
        places = self.kernels.workspace(site, n)
        part = relax.TensorType((*places, site.heads, site.value_dim + 2), "float32")
        both = builder.emit(relax.op.call_tir(kernel, operands, [part, out]))
        return relax.TupleGetItem(both, 1)

    def _rebuilt(
        self,
        builder: relax.BlockBuilder,
        calls: PagedCalls,
        site: AttentionSite,
        inputs: list[relax.Expr],
        attrs: Latent,
        weights: Sequence[relax.Expr],
        found: Sequence[HeadWeight | None],
    ) -> relax.Expr:
        """Prefill that makes keys and values again from what is kept, block by block."""
        formats = tuple(weight.format for weight in found if weight is not None)
        parts = [dataclasses.replace(part, first=0, stride=0) for part in (attrs.key, attrs.value)]
        kernel = calls.named(
            builder,
            ("rebuilt", dtype_of(inputs[0]), *calls.geometry(site), *parts, formats),
            "prefill_rebuilt",
            lambda: self.kernels.rebuilt(site, attrs.key, attrs.value, *formats, dtype=dtype_of(inputs[0])),
        )
        packed = _packed(builder, weights, attrs, kernel.ty.params[len(inputs) :])
        n = dims(inputs[0])[2]
        out = relax.TensorType((1, n, site.heads, attrs.value.width), dtype_of(inputs[0]))
        return relax.op.call_tir(kernel, [*inputs, *packed], out)

    def _remade(
        self,
        builder: relax.BlockBuilder,
        calls: PagedCalls,
        inputs: _Inputs,
        value: relax.Call,
        graph: Graph,
        of_file: relax.Call,
    ) -> relax.Expr:
        """Attention that makes keys and values again from what is kept, in both phases."""
        attrs, (query, row, *others) = attributes(value, Latent), tensors(value)
        site, weights, biases = self.sites[attrs.site], others[:2], others[2:]
        found = zip(tensors(of_file)[2:4], (attrs.key, attrs.value))
        heads = [head_weight_of(graph, weight, part) for weight, part in found]
        formats = tuple(weight.format for weight in heads if weight is not None)
        decodes, dtype = self.phase == "decode", dtype_of(query)
        kernel = calls.named(
            builder,
            ("remade", dtype, *calls.geometry(site), attrs.biases, formats),
            f"{self.phase}_remade",
            lambda: self.kernels.remade(site, *formats, biases=attrs.biases, decodes=decodes, dtype=dtype),
        )
        state = calls.append(builder, site, row, row, inputs.slots[calls.group_of[site.index]])
        places = [*inputs.places(calls, site), *_extras(site)]
        before = [query, *state, *places]
        packed = _packed(builder, weights, attrs, kernel.ty.params[len(before) :])
        return self._call(builder, kernel, site, [*before, *packed, *biases])

    def _rekeyed(
        self, builder: relax.BlockBuilder, calls: PagedCalls, inputs: _Inputs, value: relax.Call
    ) -> relax.Expr:
        """Attention that makes keys of the values that are kept, in both phases."""
        (query, row, *factors), site = tensors(value), self.sites[int(value.args[-1].value)]
        decodes, dtype = self.phase == "decode", dtype_of(query)
        kernel = calls.named(
            builder,
            ("rekeyed", dtype, *calls.geometry(site)),
            f"{self.phase}_rekeyed",
            lambda: self.kernels.rekeyed(site, decodes=decodes, dtype=dtype),
        )
        state = calls.append(builder, site, row, row, inputs.slots[calls.group_of[site.index]])
        places = [*inputs.places(calls, site), *_extras(site)]
        return self._call(builder, kernel, site, [query, *state, *places, *factors])


@dataclass(frozen=True)
class _Inputs:
    """The integer inputs of a function."""

    positions: relax.Var
    slots: dict[int, relax.Var]
    """By group."""
    tiles: relax.Var | None
    tables: list[relax.Var]
    last: relax.Var | None

    @property
    def integers(self) -> list[relax.Var]:
        """Those that are new, in their order."""
        tiles, last = ([v] if v is not None else [] for v in (self.tiles, self.last))
        return [*self.slots.values(), *tiles, *self.tables, *last]

    def places(self, calls: PagedCalls, site: AttentionSite) -> list[relax.Expr]:
        """What tells a kernel which pages a site's queries see."""
        of = self.last if site.mask.reach.memory else self.positions
        assert of is not None
        tiles = [] if self.tiles is None else [self.tiles]
        return [of, *tiles, self.tables[calls.group_of[site.index]]]


def _packed(
    builder: relax.BlockBuilder,
    weights: Sequence[relax.Expr],
    attrs: Latent,
    types: Sequence[relax.Type],
) -> list[relax.Expr]:
    """W_K and W_V as a kernel takes them, which has parameters of `types` from them on."""
    parts = (attrs.key, attrs.value)
    return [
        builder.emit(marker(HEAD_WEIGHT, [weight], part, type))
        for weight, part, type in zip(weights, parts, types)
    ]


def _extras(site: AttentionSite) -> list[relax.Expr]:
    found = (site.slopes, site.sinks, site.bias)
    return [relax.const(np.array(x, np.float32).reshape(-1)) for x in found if x is not None]


def _absorbed(
    builder: relax.BlockBuilder,
    query: relax.Expr,
    attrs: HeadProduct,
    weight: relax.Expr,
    site: AttentionSite,
) -> relax.Expr:
    """q W_K^T, and the elements of the query that meet the rest of what is kept."""
    dtype, n = dtype_of(query), dims(query)[2]
    width = int(dims(query)[3].value)

    def part(low: int, high: int) -> relax.Expr:
        if (low, high) == (0, width):
            return query
        return builder.emit(relax.op.strided_slice(query, [3], [low], [high], assume_inbound=True))

    out = relax.TensorType((1, site.heads, n, site.value_dim), dtype)
    product = builder.emit(marker(HEAD_PRODUCT, [part(0, attrs.width), weight], attrs, out))
    if attrs.width == width:
        return product
    return builder.emit(relax.op.concat([product, part(attrs.width, width)], axis=3))
