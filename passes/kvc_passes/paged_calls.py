"""Pools of pages as parameters, and calls of the kernels that write and read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tvm import relax, tirx

from .kernel_sets import AttentionKernels
from .sites import AttentionSite, grouped
from .views import Views


class PagedCalls:
    """The pools of all sites, and kernels on them, for one function that is being built."""

    def __init__(self, sites: tuple[AttentionSite, ...], kernels: AttentionKernels) -> None:
        self.sites, self.kernels = sites, kernels
        self.groups = grouped(sites)
        self.group_of = {site.index: g for g, (_, members) in enumerate(self.groups) for site in members}
        self.pools: dict[int, list[relax.Var]] = {}
        """Of every site that keeps its own state: k_i, v_i or x_i [pages_g, ...]."""
        for group, (_, members) in enumerate(self.groups):
            pages = tirx.Var(f"pages_{group}", "int64")
            for site in members:
                state = site.state(kernels.page_size, kernels.keys_transposed)
                self.pools[site.index] = [
                    relax.Var(f"{name}_{site.index}", relax.TensorType((pages, *shape), dtype))
                    for name, (dtype, shape) in state.items()
                ]
        self._names: dict[Any, Any] = {}

    def state(self, site: AttentionSite) -> list[relax.Var]:
        """The pools that a site reads."""
        return self.pools[site.index if site.owner is None else site.owner]

    def append(
        self,
        builder: relax.BlockBuilder,
        site: AttentionSite,
        key: relax.Expr,
        value: relax.Expr,
        slots: relax.Expr,
        angles: Sequence[relax.Expr] = (),
    ) -> list[relax.Expr]:
        """The site's pools with new keys and values at `slots`; one that is both is given as the key.

        angles: cosines and sines of keys that are turned when they are written.
        """
        before = self.pools[site.index]
        kernel = self.kernel(builder, "append_kv", site, dtype_of(key))
        inputs = [key, *([] if site.shared else [value]), *angles, slots, *before]
        places = list(range(len(inputs) - len(before), len(inputs)))
        updated = builder.emit(relax.op.call_tir_inplace(kernel, inputs, places, [p.ty for p in before]))
        if len(before) == 1:  # one result is no tuple
            return [updated]
        return [builder.emit(relax.TupleGetItem(updated, i)) for i in range(len(before))]

    def kernel(self, builder: relax.BlockBuilder, kind: str, site: AttentionSite, dtype: str) -> Any:
        """The kernel's global variable; sites of the same geometry share one."""
        geometry = self.geometry(site)
        form = (site.kv_dtype, site.stored, site.shared)
        make = {
            "append_kv": self.kernels.append,
            "prefill_attention": self.kernels.prefill,
            "decode_attention": self.kernels.decode,
        }
        views = site.views or Views()
        kept, query = (*geometry[1:4], site.row, views.key, views.value), (*geometry, views.query)
        key = (kind, dtype, *form, kept if kind == "append_kv" else query)
        return self.named(builder, key, kind, lambda: make[kind](site, dtype))

    def named(self, builder: relax.BlockBuilder, key: Any, name: str, make: Any) -> Any:
        """The global variable of a kernel that is made once for `key`."""
        if key not in self._names:
            self._names[key] = builder.add_func(make(), name)
        return self._names[key]

    def geometry(self, site: AttentionSite) -> tuple[Any, ...]:
        """What a kernel is made for."""
        return (
            site.heads,
            site.kv_heads,
            site.head_dim,
            site.value_dim,
            site.scale,
            site.softcap,
            dataclasses.replace(site.mask, proof=""),
            site.slopes is not None,
            len(site.bias[0]) if site.bias else 0,
            site.sinks is not None,
            site.guarded,
            site.sliced,
            site.row,
            site.kv_dtype,
        )


def dtype_of(value: relax.Expr) -> str:
    """The element type of a tensor."""
    return str(value.ty.dtype.dtype)
