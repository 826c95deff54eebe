"""Markers of other forms of the state by their definitions, for modules whose weights are not packed yet."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from kvc_passes.markers import HEAD_PRODUCT, LATENT, REKEYED, REMADE, HeadProduct
from kvc_passes.sites import AttentionSite, Sliced
from support import attend, turned


@functools.cache
def define_head_product() -> None:
    @tvm_ffi.register_global_func(HEAD_PRODUCT)
    def product(x: Any, weight: Any, text: str) -> Any:
        a = HeadProduct(**json.loads(text))
        x, weight = x.numpy().astype(float), weight.numpy().astype(float)
        first = a.first + np.arange(a.heads) // a.group * a.stride
        w = weight[:, first[:, None] + np.arange(a.width)]  # [depth, heads, width]
        y = np.einsum("bhnw,dhw->bhnd", x, w) if a.absorbed else np.einsum("bnhd,dhw->bnhw", x, w)
        return tvm.runtime.tensor(y.astype(np.float32))


_SITES: list[AttentionSite] = []


@functools.cache
def _define_latent() -> None:
    @tvm_ffi.register_global_func(LATENT)
    def latent(q: Any, x: Any, w_key: Any, w_value: Any, text: str) -> Any:
        """Keys and values made of x, then attention over them."""
        a = json.loads(text)
        site, key, value = _SITES[a["site"]], HeadProduct(**a["key"]), HeadProduct(**a["value"])
        row = x.numpy()[:, 0].astype(float)
        depth, heads = site.value_dim, key.heads // key.group
        own, rest = row[..., :depth], row[..., depth:]

        def made(weight: Any, part: HeadProduct) -> np.ndarray:
            first = part.first + np.arange(heads) * part.stride
            return np.einsum("btd,dhw->bhtw", own, weight.numpy()[:, first[:, None] + np.arange(part.width)])

        shared = np.broadcast_to(rest[:, None], (len(rest), heads, *rest.shape[1:]))
        keys, values = np.concatenate([made(w_key, key), shared], axis=-1), made(w_value, value)
        plain = dataclasses.replace(
            site, kv_heads=heads, head_dim=keys.shape[-1], value_dim=value.width, kept="paged_kv"
        )
        return tvm.runtime.tensor(attend(q.numpy(), keys, values, plain).astype(np.float32))


def define_latent(sites: Sequence[AttentionSite]) -> None:
    """`kvc.latent_attention` by its definition, for these sites."""
    _define_latent()
    _SITES[:] = sites


@functools.cache
def _define_remade() -> None:
    @tvm_ffi.register_global_func(REMADE)
    def remade(q: Any, row: Any, w_key: Any, w_value: Any, *others: Any) -> Any:
        """Keys and values made of rows and turned, then attention over them."""
        a, biases = json.loads(others[-1]), list(others[:-1])
        site = _SITES[a["site"]]
        assert site.remade is not None
        rows, kept = row.numpy()[:, 0].astype(float), site.remade
        x, angles = rows[..., : kept.depth], rows[..., kept.depth :]
        made = []
        for weight, part, has in zip((w_key, w_value), (a["key"], a["value"]), a["biases"]):
            of = HeadProduct(**part)
            columns = (of.first + np.arange(site.kv_heads)[:, None] * of.stride + np.arange(of.width)).ravel()
            made.append(x @ weight.numpy()[:, columns] + (biases.pop(0).numpy() if has else 0.0))
        sliced = Sliced(site.kv_heads, site.head_dim, 0, kept.half, kept.fine)
        keys = turned(np.concatenate([made[0], angles], axis=-1), sliced)
        values = made[1].reshape(*made[1].shape[:2], site.kv_heads, -1).transpose(0, 2, 1, 3)
        return tvm.runtime.tensor(attend(q.numpy(), keys, values, site).astype(np.float32))


def define_remade(sites: Sequence[AttentionSite]) -> None:
    """`kvc.remade_attention` by its definition, for these sites."""
    _define_remade()
    _SITES[:] = sites


@functools.cache
def _define_rekeyed() -> None:
    @tvm_ffi.register_global_func(REKEYED)
    def rekeyed(q: Any, row: Any, *others: Any) -> Any:
        """Keys made of rows, by the definition of Rekeyed, then attention over them and the values."""
        site = _SITES[others[-1]]
        kept, rows = site.rekeyed, row.numpy()[:, 0].astype(float)
        assert kept is not None
        assert kept.scaled == (len(others) == 2)
        b, t, _ = rows.shape
        values, angles = rows[..., : kept.values], rows[..., kept.values :]
        keys = values * (others[0].numpy() if kept.scaled else 1.0)
        keys, values = (x.reshape(b, t, kept.count, kept.dim) for x in (keys, values))
        cosine, sine = (angles[..., None, i * kept.pairs : (i + 1) * kept.pairs] for i in range(2))
        if kept.fine:
            cosine, sine = (
                x + angles[..., None, i * kept.pairs : (i + 1) * kept.pairs] / 256
                for i, x in ((2, cosine), (3, sine))
            )
        low, high = slice(0, kept.pairs), slice(kept.half, kept.half + kept.pairs)
        made = keys.copy()
        made[..., low] = keys[..., low] * cosine - keys[..., high] * sine
        made[..., high] = keys[..., high] * cosine + keys[..., low] * sine
        given = (x.transpose(0, 2, 1, 3) for x in (made, values))
        return tvm.runtime.tensor(attend(q.numpy(), *given, site).astype(np.float32))


def define_rekeyed(sites: Sequence[AttentionSite]) -> None:
    """`kvc.rekeyed_attention` by its definition, for these sites."""
    _define_rekeyed()
    _SITES[:] = sites
