"""Attention markers become kernels over pages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tvm import IRModule, relax, tirx

from .base import Result
from .facts import AttentionSite
from .graph import dims, op_name
from .kernel_sets import AttentionKernels
from .markers import ATTENTION
from .rebuild import insert_params, rebuild


@dataclass(frozen=True)
class PageAttention:
    """Keys and values live in pages that the function is given and updates in place.

    Before: `kvc.attention(q [1,h,n,e], k [1,g,n,e], v [1,g,n,f], site)`.
    After: k and v are appended to the site's pools at `slots`, then attention reads the pages of
        `block_table`. New parameters behind positions: slots [n], in prefill tiles [t,3], block_table [b,m];
        before the weights: k_i [pages, g, e, page] and v_i [pages, g, page, f] for every site.
        Pools are of the type that the graph keeps keys and values in.
    Needs: FlattenTokens.
    Refuses: nothing; every site's geometry was proved.
    """

    sites: tuple[AttentionSite, ...]
    kernels: AttentionKernels
    phase: Literal["prefill", "decode"]

    def run(self, mod: IRModule) -> Result:
        function = mod["main"]
        (n,) = dims(function.params[0])

        def int32(name: str, *shape: Any) -> relax.Var:
            return relax.Var(name, relax.TensorType(shape, "int32"))

        t, m = tirx.Var("t", "int64"), tirx.Var("m", "int64")
        sequences = n if self.phase == "decode" else tirx.Var("b", "int64")
        slots, tiles, table = int32("slots", n), int32("tiles", t, 3), int32("block_table", sequences, m)
        inputs = [slots, table] if self.phase == "decode" else [slots, tiles, table]
        positions = function.params[1]
        pools = self._pools()
        current = dict(pools)
        names: dict[Any, Any] = {}

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if op_name(value) != ATTENTION:
                return None
            query, key, new_value, index = value.args[1:]
            site = self.sites[int(index.value)]
            k_pool, v_pool = current[site.index]
            append = self._kernel(builder, names, "append_kv", site, _dtype(key))
            updated = builder.emit(
                relax.op.call_tir_inplace(
                    append, [key, new_value, slots, k_pool, v_pool], [3, 4], [k_pool.ty, v_pool.ty]
                )
            )
            pair = (
                builder.emit(relax.TupleGetItem(updated, 0)),
                builder.emit(relax.TupleGetItem(updated, 1)),
            )
            current[site.index] = pair
            numbers = (x for x in (site.slopes, site.sinks) if x is not None)
            extras = [relax.const(np.array(x, np.float32)) for x in numbers]
            out = relax.TensorType((1, n, site.heads, site.value_dim), _dtype(query))
            if self.phase == "prefill":
                attend = self._kernel(builder, names, "prefill_attention", site, _dtype(query))
                return relax.op.call_tir(attend, [query, *pair, positions, tiles, table, *extras], out)
            attend = self._kernel(builder, names, "decode_attention", site, _dtype(query))
            part = relax.TensorType((n, self.kernels.splits(site), site.heads, site.value_dim + 2), "float32")
            inputs = [query, *pair, positions, table, *extras]
            both = builder.emit(relax.op.call_tir(attend, inputs, [part, out]))
            return relax.TupleGetItem(both, 1)

        params = insert_params(function, "positions", inputs)
        last = next(p.name for p in reversed(params) if p.name in ("rows", "block_table"))
        ordered = [pools[s.index][i] for i in (0, 1) for s in self.sites]
        at = next(i for i, p in enumerate(params) if p.name == last) + 1
        module = rebuild(mod, [*params[:at], *ordered, *params[at:]], place)
        return Result(module, len(self.sites))

    def _pools(self) -> dict[int, tuple[relax.Var, relax.Var]]:
        pages, kernels = tirx.Var("pages", "int64"), self.kernels
        pools = {}
        for site in self.sites:
            k, v = (
                relax.TensorType((pages, *shape), site.kv_dtype)
                for shape in site.page_shapes(kernels.page_size, kernels.keys_transposed)
            )
            pools[site.index] = (relax.Var(f"k_{site.index}", k), relax.Var(f"v_{site.index}", v))
        return pools

    def _kernel(
        self, builder: relax.BlockBuilder, names: dict[Any, Any], kind: str, site: AttentionSite, dtype: str
    ) -> Any:
        """The kernel's global variable; sites of the same geometry share one."""
        geometry = (
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
        )
        key = (kind, dtype, site.kv_dtype, geometry[1:4] if kind == "append_kv" else geometry)
        if key not in names:
            make = {
                "append_kv": self.kernels.append,
                "prefill_attention": self.kernels.prefill,
                "decode_attention": self.kernels.decode,
            }
            names[key] = builder.add_func(make[kind](site, dtype), kind)
        return names[key]


def _dtype(value: relax.Expr) -> str:
    return str(value.ty.dtype.dtype)
