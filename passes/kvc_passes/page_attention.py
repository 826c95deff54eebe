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
from .facts import AttentionSite, grouped
from .graph import dims, graph_of, op_name
from .kernel_sets import AttentionKernels
from .markers import (
    ATTENTION,
    HEAD_PRODUCT,
    HEAD_WEIGHT,
    LATENT,
    HeadProduct,
    Latent,
    attributes,
    marker,
    tensors,
)
from .rebuild import insert_params, rebuild
from .weights import HeadWeight, head_weight_of

_Rebuilt = tuple[Latent, Sequence[relax.Expr], Sequence[HeadWeight | None]]
"""What to make keys and values again of: the weights, and how they are stored."""
_INPUT = re.compile(r"tokens|positions|tiles|rows|(slots|block_table)_\d+")


def is_input(name: str) -> bool:
    """Whether a parameter is an integer input of every call, and no pool or weight."""
    return _INPUT.fullmatch(name) is not None


@dataclass(frozen=True)
class PageAttention:
    """Keys and values live in pages that the function is given and updates in place.

    Before: `kvc.attention(q [1,h,n,e], k [1,g,n,e], v [1,g,n,f], site)`, or
        `kvc.latent_attention(q, x, W_K, W_V)`.
    After: k and v are appended to the site's pools at `slots`, then attention reads the pages of a block
        table. Sites that keep other tokens have slots and a table of their own, numbered as `grouped` does.
        New parameters behind positions: slots_0 [n], ..., in prefill tiles [t,3], block_table_0 [b,m], ...;
        before the weights: k_i [pages_g, g, e, page] and v_i [pages_g, g, page, f] of every site i, or x_i
        [pages_g, 1, page, e] where key and value are one (k is v then).
        Pools are of the type that the graph keeps keys and values in.
    Needs: FlattenTokens.
    Refuses: nothing; every site's geometry was proved.
    """

    sites: tuple[AttentionSite, ...]
    kernels: AttentionKernels
    phase: Literal["prefill", "decode"]

    def run(self, mod: IRModule) -> Result:
        function = mod["main"]
        graph = graph_of(function)
        (n,) = dims(function.params[0])

        def int32(name: str, *shape: Any) -> relax.Var:
            return relax.Var(name, relax.TensorType(shape, "int32"))

        t, m = tirx.Var("t", "int64"), tirx.Var("m", "int64")
        sequences = n if self.phase == "decode" else tirx.Var("b", "int64")
        groups = grouped(self.sites)
        slots = [int32(f"slots_{g}", n) for g in range(len(groups))]
        tables = [int32(f"block_table_{g}", sequences, m) for g in range(len(groups))]
        tiles = int32("tiles", t, 3)
        integers = [*slots, *([] if self.phase == "decode" else [tiles]), *tables]
        group_of = {site.index: g for g, (_, members) in enumerate(groups) for site in members}
        positions = function.params[1]
        pools = self._pools()
        names: dict[Any, Any] = {}

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if op_name(value) == ATTENTION:
                query, key, new_value, index = value.args[1:]
                return attend(builder, self.sites[int(index.value)], query, key, new_value)
            if op_name(value) != LATENT:
                return None
            attrs = attributes(value, Latent)
            query, x, *weights = tensors(value)
            site = self.sites[attrs.site]
            if self.phase == "prefill" and self.kernels.rebuilds:
                of_file = zip(tensors(graph.definitions[var])[2:], (attrs.key, attrs.value))
                formats = [head_weight_of(graph, weight, part) for weight, part in of_file]
                return attend(builder, site, query, x, x, (attrs, weights, formats))
            asked = _absorbed(builder, query, attrs.key, weights[0], site)
            mixed = builder.emit(attend(builder, site, asked, x, x))
            return marker(HEAD_PRODUCT, [mixed, weights[1]], attrs.value, var.ty)

        def attend(
            builder: relax.BlockBuilder,
            site: AttentionSite,
            query: relax.Expr,
            key: relax.Expr,
            new_value: relax.Expr,
            rebuilt: _Rebuilt | None = None,
        ) -> relax.Expr:
            before, group = pools[site.index], group_of[site.index]
            append = self._kernel(builder, names, "append_kv", site, _dtype(key))
            inputs = [key, *([] if site.shared else [new_value]), slots[group], *before]
            places = list(range(len(inputs) - len(before), len(inputs)))
            updated = builder.emit(
                relax.op.call_tir_inplace(append, inputs, places, [pool.ty for pool in before])
            )
            several = len(before) > 1  # one result is no tuple
            state = [builder.emit(relax.TupleGetItem(updated, i)) for i in range(len(before) * several)]
            state = state or [updated]
            numbers = (x for x in (site.slopes, site.sinks) if x is not None)
            extras = [relax.const(np.array(x, np.float32)) for x in numbers]
            out = relax.TensorType((1, n, site.heads, site.value_dim), _dtype(query))
            if rebuilt is not None:
                return self._rebuilt(
                    builder, names, site, [query, *state, positions, tiles, tables[group], *extras], *rebuilt
                )
            if self.phase == "prefill":
                kernel = self._kernel(builder, names, "prefill_attention", site, _dtype(query))
                return relax.op.call_tir(
                    kernel, [query, *state, positions, tiles, tables[group], *extras], out
                )
            kernel = self._kernel(builder, names, "decode_attention", site, _dtype(query))
            part = relax.TensorType((n, self.kernels.splits(site), site.heads, site.value_dim + 2), "float32")
            operands = [query, *state, positions, tables[group], *extras]
            both = builder.emit(relax.op.call_tir(kernel, operands, [part, out]))
            return relax.TupleGetItem(both, 1)

        params = insert_params(function, "positions", integers)
        ordered = [pool for site in self.sites for pool in pools[site.index]]
        at = max(i for i, p in enumerate(params) if is_input(p.name)) + 1
        module = rebuild(mod, [*params[:at], *ordered, *params[at:]], place)
        return Result(module, len(self.sites))

    def _rebuilt(
        self,
        builder: relax.BlockBuilder,
        names: dict[Any, Any],
        site: AttentionSite,
        inputs: list[relax.Expr],
        attrs: Latent,
        weights: Sequence[relax.Expr],
        found: Sequence[HeadWeight | None],
    ) -> relax.Expr:
        """Prefill that makes keys and values again from what is kept, block by block."""
        formats = tuple(weight.format for weight in found if weight is not None)
        parts = [dataclasses.replace(part, first=0, stride=0) for part in (attrs.key, attrs.value)]
        key = ("rebuilt", *self._geometry(site), *parts, formats)
        if key not in names:
            kernel = self.kernels.rebuilt(site, attrs.key, attrs.value, *formats)
            names[key] = builder.add_func(kernel, "prefill_rebuilt")
        packed = [
            builder.emit(marker(HEAD_WEIGHT, [weight], part, relax.TensorType(ndim=3, dtype=format.dtype)))
            for weight, part, format in zip(weights, (attrs.key, attrs.value), formats, strict=True)
        ]
        n = dims(inputs[0])[2]
        out = relax.TensorType((1, n, site.heads, attrs.value.width), _dtype(inputs[0]))
        return relax.op.call_tir(names[key], [*inputs, *packed], out)

    def _pools(self) -> dict[int, list[relax.Var]]:
        kernels = self.kernels
        pools = {}
        for group, (_, members) in enumerate(grouped(self.sites)):
            pages = tirx.Var(f"pages_{group}", "int64")
            for site in members:
                state = site.state(kernels.page_size, kernels.keys_transposed)
                pools[site.index] = [
                    relax.Var(f"{name}_{site.index}", relax.TensorType((pages, *shape), dtype))
                    for name, (dtype, shape) in state.items()
                ]
        return pools

    def _kernel(
        self, builder: relax.BlockBuilder, names: dict[Any, Any], kind: str, site: AttentionSite, dtype: str
    ) -> Any:
        """The kernel's global variable; sites of the same geometry share one."""
        geometry = self._geometry(site)
        form = (site.kv_dtype, site.stored, site.shared)
        key = (kind, dtype, *form, geometry[1:4] if kind == "append_kv" else geometry)
        if key not in names:
            make = {
                "append_kv": self.kernels.append,
                "prefill_attention": self.kernels.prefill,
                "decode_attention": self.kernels.decode,
            }
            names[key] = builder.add_func(make[kind](site, dtype), kind)
        return names[key]

    def _geometry(self, site: AttentionSite) -> tuple[Any, ...]:
        return (
            site.heads,
            site.kv_heads,
            site.head_dim,
            site.value_dim,
            site.scale,
            site.softcap,
            dataclasses.replace(site.mask, proof=""),
            site.slopes is not None,
            site.sinks is not None,
            site.guarded,
            site.sliced,
            site.kv_dtype,
        )


def _absorbed(
    builder: relax.BlockBuilder,
    query: relax.Expr,
    attrs: HeadProduct,
    weight: relax.Expr,
    site: AttentionSite,
) -> relax.Expr:
    """q W_K^T, and the elements of the query that meet the rest of what is kept."""
    dtype, n = _dtype(query), dims(query)[2]
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


def _dtype(value: relax.Expr) -> str:
    return str(value.ty.dtype.dtype)
