"""Builds an artifact whose functions have kvc's signature but are simple enough to be computed by hand.

    python tiny_model.py OUTPUT_FOLDER MCPU

K of token x is 2 x, V of position p is p; the logits of column c are shift[c] plus scale[c] times the sum of
K_j + V_j * (j + 1) over all positions j up to the token's own.
"""
# ruff: noqa: RET504  TVMScript

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import tvm
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from kvc.artifact_writer import ArtifactWriter
from kvc_passes.facts import ModelFacts
from kvc_passes.plans import Bytes, Plan, StateGroup, Workload
from kvc_passes.sites import AttentionSite, MaskFact, Reach

PAGES, PG, V = 6, 4, 10
EMBEDDING = (2 * np.arange(V, dtype=np.float32)).reshape(V, 1)
SCALE = np.arange(1, V + 1).astype(ml_dtypes.bfloat16)
SHIFT = np.arange(V, dtype=np.int8)


# fmt: off
@I.ir_module(s_tir=True)
class Tiny:
    @T.prim_func(private=True, s_tir=True)
    def append(tokens_: T.handle, positions_: T.handle, slots_: T.handle, e: T.Buffer((10, 1), "float32"),
               k: T.Buffer((6, 1, 1, 4), "float32"), v: T.Buffer((6, 1, 4, 1), "float32")):
        n = T.int64()
        tokens = T.match_buffer(tokens_, (n,), "int64")
        positions = T.match_buffer(positions_, (n,), "int64")
        slots = T.match_buffer(slots_, (n,), "int32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for i in range(n):
                k[slots[i] // 4, 0, 0, slots[i] % 4] = e[tokens[i], 0]
                v[slots[i] // 4, 0, slots[i] % 4, 0] = T.Cast("float32", positions[i])

    @T.prim_func(private=True, s_tir=True)
    def attend(positions_: T.handle, tiles_: T.handle, table_: T.handle, rows_: T.handle,
               k: T.Buffer((6, 1, 1, 4), "float32"), v: T.Buffer((6, 1, 4, 1), "float32"),
               scale: T.Buffer((10,), "bfloat16"), shift: T.Buffer((10,), "int8"), logits_: T.handle):
        n = T.int64()
        t = T.int64()
        b = T.int64()
        m = T.int64()
        r = T.int64()
        positions = T.match_buffer(positions_, (n,), "int64")
        tiles = T.match_buffer(tiles_, (t, 3), "int32")
        table = T.match_buffer(table_, (b, m), "int32")
        rows = T.match_buffer(rows_, (r,), "int32")
        logits = T.match_buffer(logits_, (r, 10), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for row in T.parallel(r):
                for c in range(10):
                    logits[row, c] = T.Cast("float32", shift[c])
                    for j in range(t):
                        if tiles[j, 1] <= rows[row] and rows[row] < tiles[j, 1] + tiles[j, 2]:
                            for p in range(positions[rows[row]] + T.int64(1)):
                                logits[row, c] = logits[row, c] + T.Cast("float32", scale[c]) * (
                                    k[table[tiles[j, 0], p // 4], 0, 0, p % 4]
                                    + v[table[tiles[j, 0], p // 4], 0, p % 4, 0]
                                    * T.Cast("float32", p + T.int64(1)))

    @T.prim_func(private=True, s_tir=True)
    def attend_one(positions_: T.handle, table_: T.handle,
                   k: T.Buffer((6, 1, 1, 4), "float32"), v: T.Buffer((6, 1, 4, 1), "float32"),
                   scale: T.Buffer((10,), "bfloat16"), shift: T.Buffer((10,), "int8"), logits_: T.handle):
        b = T.int64()
        m = T.int64()
        positions = T.match_buffer(positions_, (b,), "int64")
        table = T.match_buffer(table_, (b, m), "int32")
        logits = T.match_buffer(logits_, (b, 10), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for row in T.parallel(b):
                for c in range(10):
                    logits[row, c] = T.Cast("float32", shift[c])
                    for p in range(positions[row] + T.int64(1)):
                        logits[row, c] = logits[row, c] + T.Cast("float32", scale[c]) * (
                            k[table[row, p // 4], 0, 0, p % 4]
                            + v[table[row, p // 4], 0, p % 4, 0] * T.Cast("float32", p + T.int64(1)))

    @R.function
    def prefill(tokens: R.Tensor(("n",), "int64"), positions: R.Tensor(("n",), "int64"),
                slots: R.Tensor(("n",), "int32"), tiles: R.Tensor(("t", 3), "int32"),
                table: R.Tensor(("b", "m"), "int32"), rows: R.Tensor(("r",), "int32"),
                logits: R.Tensor(("r", 10), "float32"),
                k: R.Tensor((6, 1, 1, 4), "float32"), v: R.Tensor((6, 1, 4, 1), "float32"),
                e: R.Tensor((10, 1), "float32"), scale: R.Tensor((10,), "bfloat16"),
                shift: R.Tensor((10,), "int8")):
        cls = Tiny
        r = T.int64()
        kv = R.call_tir_inplace(cls.append, (tokens, positions, slots, e, k, v), inplace_indices=[4, 5],
            out_ty=[R.Tensor((6, 1, 1, 4), "float32"), R.Tensor((6, 1, 4, 1), "float32")])
        out = R.call_tir_inplace(cls.attend,
            (positions, tiles, table, rows, kv[0], kv[1], scale, shift, logits),
            inplace_indices=[8], out_ty=R.Tensor((r, 10), "float32"))
        return out

    @R.function
    def decode(tokens: R.Tensor(("b",), "int64"), positions: R.Tensor(("b",), "int64"),
               slots: R.Tensor(("b",), "int32"), table: R.Tensor(("b", "m"), "int32"),
               logits: R.Tensor(("b", 10), "float32"),
               k: R.Tensor((6, 1, 1, 4), "float32"), v: R.Tensor((6, 1, 4, 1), "float32"),
               e: R.Tensor((10, 1), "float32"), scale: R.Tensor((10,), "bfloat16"),
                shift: R.Tensor((10,), "int8")):
        cls = Tiny
        b = T.int64()
        kv = R.call_tir_inplace(cls.append, (tokens, positions, slots, e, k, v), inplace_indices=[4, 5],
            out_ty=[R.Tensor((6, 1, 1, 4), "float32"), R.Tensor((6, 1, 4, 1), "float32")])
        out = R.call_tir_inplace(cls.attend_one, (positions, table, kv[0], kv[1], scale, shift, logits),
            inplace_indices=[6], out_ty=R.Tensor((b, 10), "float32"))
        return out
# fmt: on


def build(folder: Path, mcpu: str) -> None:
    """Write the artifact `folder`, compiled for any x86-64 but marked as compiled for `mcpu`."""
    site = AttentionSite(0, "n", 1, 1, 1, 1, 1.0, None, MaskFact("causal", None, "test"), None)
    facts = ModelFacts("tiny", V, V, None, (site,), (), {}, 1)
    target = {"kind": "llvm", "mcpu": mcpu, "num-cores": 2}
    groups = (StateGroup((0,), Reach(), "test", 8 * PG, PAGES),)
    plan = Plan(1 << 20, (Workload(2, 12),), target, PG, groups, 8, 2, 3, 16, Bytes(1, 1, 1, 1, 1, 1))
    with ArtifactWriter(folder) as writer:
        executable = tvm.compile(Tiny, tvm.target.Target({"kind": "llvm"}))
        executable.export_library(str(writer.folder / "model.so"))
        writer.add("model.so")
        arrays = {"embedding": EMBEDDING, "scale": SCALE, "shift": SHIFT}
        writer.weights((name, a.shape, a.dtype.name, lambda a=a: a) for name, a in arrays.items())
        writer.facts(plan, facts)
        writer.commit()


if __name__ == "__main__":
    build(Path(sys.argv[1]), sys.argv[2])
