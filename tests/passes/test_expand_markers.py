"""Markers become ordinary operations that compute what their contract says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import IRModule, relax

from kvc_passes.expand_markers import ExpandMarkers
from kvc_passes.markers import DEQUANTIZE, ROTARY, SDPA, Dequantize, Rotary, Sdpa, marker
from support import Compiled, floats, module_of, ops, param, shape_of, symbol

ATOL = 2e-6  # float32 sums of at most 12 products, on values of up to 4
HEADS, GROUPS, SIZE, WIDTH = 4, 2, 8, 6


def sdpa_module(attrs: Sdpa, kind: str = "bool", dtype: str = "float32") -> IRModule:
    """q, k, v of any batch, with s queries and t keys; a mask has the type `kind`."""
    batch, rows, keys = symbol("batch"), symbol("s"), symbol("t")
    known = {"mask": ([batch, 1, rows, keys], kind), "lengths": ([batch], "int32"), "sinks": ([HEADS], dtype)}
    q = param("q", [batch, HEADS, rows, SIZE], dtype)
    k = param("k", [batch, GROUPS, keys, SIZE], dtype)
    v = param("v", [batch, GROUPS, keys, WIDTH], dtype)
    result = relax.TensorType([batch, HEADS, rows, WIDTH], dtype)
    params = [q, k, v, *(param(name, *known[name]) for name in attrs.extras)]
    return module_of(params, lambda emit, *given: emit(marker(SDPA, given, attrs, result), "attn"))[0]


def expand(mod: IRModule, sites: int = 1) -> IRModule:
    before = mod.script()
    result = ExpandMarkers().run(mod)
    assert result.sites == sites
    assert mod.script() == before
    assert not any(name.startswith("kvc.") for name in ops(result.module))
    return result.module


def reference(attrs: Sdpa, q: Any, k: Any, v: Any, *extras: Any) -> np.ndarray:
    """One query at a time, in float64, as `Sdpa` says it."""
    given = dict(zip(attrs.extras, extras))
    out = np.zeros((*q.shape[:3], v.shape[3]))
    rows, keys = q.shape[2], k.shape[2]
    offset = keys - rows if attrs.offset == "past" else 0
    mask = np.broadcast_to(given.get("mask", True), (q.shape[0], HEADS, rows, keys))
    for b, h, i in np.ndindex(*q.shape[:3]):
        scores, values = [], []
        for j in range(keys):
            position = i + offset
            seen = not attrs.causal or j <= position
            seen &= attrs.window is None or j >= position - attrs.window + 1
            seen &= "lengths" not in given or j <= int(np.ravel(given["lengths"])[b])
            if mask.dtype == bool:
                seen &= bool(mask[b, h, i, j])
            if not seen or (mask.dtype != bool and mask[b, h, i, j] == -np.inf):
                continue
            score = attrs.scale * float(q[b, h, i].astype(float) @ k[b, h // 2, j].astype(float))
            score = attrs.softcap * np.tanh(score / attrs.softcap) if attrs.softcap else score
            scores.append(score + (0 if mask.dtype == bool else mask[b, h, i, j]))
            values.append(v[b, h // 2, j].astype(float))
        if scores:
            weights = np.exp(scores)
            total = weights.sum() + (np.exp(float(given["sinks"][h])) if "sinks" in given else 0)
            out[b, h, i] = weights @ np.array(values) / total
    return out


def tensors(batch: int, rows: int, keys: int) -> list[np.ndarray]:
    return [
        floats(batch, HEADS, rows, SIZE),
        floats(batch, GROUPS, keys, SIZE),
        floats(batch, GROUPS, keys, WIDTH),
    ]


SHAPES = [(2, 5, 5), (1, 3, 7), (2, 1, 6), (1, 4, 2)]
"""(batch, queries, keys); in the last, most queries of "past" come before every key."""


@pytest.mark.parametrize(
    "attrs",
    [
        Sdpa(0.4),
        Sdpa(0.4, softcap=1.5, causal=True, offset="past"),
        Sdpa(0.4, causal=True, offset="zero", window=2),
        Sdpa(0.4, offset="past", window=3),
    ],
    ids=str,
)
def test_sdpa(attrs: Sdpa) -> None:
    compiled = Compiled(expand(sdpa_module(attrs)))
    for shape in SHAPES:
        given = tensors(*shape)
        np.testing.assert_allclose(compiled(*given)[0], reference(attrs, *given), rtol=0, atol=ATOL)


def test_sdpa_with_lengths_and_sinks() -> None:
    attrs = Sdpa(0.4, causal=True, offset="past", extras=("lengths", "sinks"))
    compiled = Compiled(expand(sdpa_module(attrs)))
    given = [*tensors(2, 5, 5), np.array([4, 1], np.int32), floats(HEADS)]
    np.testing.assert_allclose(compiled(*given)[0], reference(attrs, *given), rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_sdpa_with_a_mask_and_rows_that_see_nothing(kind: str) -> None:
    attrs = Sdpa(0.4, causal=True, extras=("mask",))
    shown = np.random.default_rng(0).random((2, 1, 5, 5)) < 0.6
    shown[1, 0, 3] = False
    mask = shown if kind == "bool" else np.where(shown, floats(2, 1, 5, 5), -np.inf).astype(np.float32)
    compiled = Compiled(expand(sdpa_module(attrs, kind)))
    given = [*tensors(2, 5, 5), mask]
    given[0][0, 0, 1, 0] = np.inf  # such a score must not come through a mask
    shown[0, 0, 1] = False
    if kind != "bool":
        mask[0, 0, 1] = -np.inf
    got = compiled(*given)[0]
    np.testing.assert_allclose(got, reference(attrs, *given), rtol=0, atol=ATOL)
    assert not got[1, :, 3].any()


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_sdpa_in_other_types(dtype: str) -> None:
    """Half precision rounds once, at the end: half a unit in the last place of values below 4."""
    attrs = Sdpa(0.4, causal=True)
    given = [x.astype(dtype) for x in tensors(2, 5, 5)]
    (got,) = Compiled(expand(sdpa_module(attrs, dtype=dtype)))(*given)
    assert got.dtype == dtype
    tolerance = 2**-10 if dtype == "float16" else 1e-14
    np.testing.assert_allclose(got.astype(float), reference(attrs, *given), rtol=0, atol=tolerance)


def test_sdpa_structure() -> None:
    found = ops(expand(sdpa_module(Sdpa(0.4))))
    assert found["matmul"] == 2
    assert found["arange"] == found["where"] == 0  # nothing is masked
    found = ops(expand(sdpa_module(Sdpa(0.4, causal=True))))
    assert found["arange"] == 2
    assert found["where"] == 1


def rotary_module(interleaved: bool, pairs: int, shared: bool = True) -> IRModule:
    """x of any batch and length; tables for all sequences, or shared by them."""
    rows, batch = symbol("s"), symbol("batch")
    x = param("x", [batch, HEADS, rows, SIZE])
    tables = [param(n, [1 if shared else batch, rows, pairs]) for n in ("cos", "sin")]

    def body(emit: Any, *given: relax.Var) -> relax.Expr:
        return emit(marker(ROTARY, given, Rotary(interleaved), given[0].ty), "rope")

    return module_of([x, *tables], body)[0]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [SIZE // 2, SIZE // 4])
@pytest.mark.parametrize("shared", [True, False])
def test_rotary_turns_pairs(interleaved: bool, pairs: int, shared: bool) -> None:
    mod = expand(rotary_module(interleaved, pairs, shared))
    x = floats(2, HEADS, 3, SIZE)
    angles = np.random.default_rng(1).uniform(-3, 3, (1 if shared else 2, 3, pairs))
    (got,) = Compiled(mod)(x, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    left = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    right = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    turned = (x[..., left] + 1j * x[..., right]) * np.exp(1j * angles)[:, None]
    expected = x.astype(float)
    expected[..., left], expected[..., right] = turned.real, turned.imag
    np.testing.assert_allclose(got, expected, rtol=0, atol=ATOL)


def test_rotary_structure() -> None:
    mod = expand(rotary_module(False, SIZE // 2))
    assert ops(mod) == {
        **{"expand_dims": 2, "strided_slice": 2, "negative": 1, "concat": 3},
        **{"multiply": 2, "add": 1},
    }
    assert shape_of(mod["main"].body.body) == ["batch", "4", "s", "8"]


def test_other_markers_and_modules_without_markers_stay() -> None:
    codes, scales = param("codes", [4, 4], "int8"), param("scales", [4, 1])
    attrs = Dequantize(4, 4, 8, True, 1, 4, 4)
    kind = relax.TensorType([4, 4], "float32")
    mod, _ = module_of([codes, scales], lambda emit, *given: emit(marker(DEQUANTIZE, given, attrs, kind)))
    result = ExpandMarkers().run(mod)
    assert result.sites == 0
    assert result.module is mod
