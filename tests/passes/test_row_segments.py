"""Segments that run slice by slice: which they are, what they take, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from tvm import IRModule, relax
from tvm.ir import GlobalVar
from tvm.relax import op
from tvm.target import Target

from kvc.codegen.lower import allocated, fused, to_vm
from kvc.pipeline import Runner
from kvc_passes.graph import Graph
from kvc_passes.overwrite_inputs import OverwriteInputs
from kvc_passes.place_arena import Arena, PlaceArena
from kvc_passes.prove_rows import ProveRows
from kvc_passes.row_segments import segments_of
from kvc_passes.row_slices import Segment
from support import Draft, floats, module_of, param, symbol

N = symbol("n")
WIDTH, INNER, VOCAB, BOUND, ROWS = 16, 128, 40, 200, 64
QUICK = Target({"kind": "llvm", "opt-level": 0})
PARAMS = [
    param("tokens", [N], "int64"),
    param("table", [VOCAB, WIDTH]),
    param("up", [WIDTH, INNER]),
    param("down", [INNER, WIDTH]),
]
WEIGHTS = [floats(VOCAB, WIDTH, seed=1), floats(WIDTH, INNER, seed=2), floats(INNER, WIDTH, seed=3)]
Part = Callable[[Draft, relax.Var, relax.Var, relax.Var], relax.Expr]


def feed_forward(emit: Draft, x: relax.Var, up: relax.Var, down: relax.Var) -> relax.Expr:
    wide = emit(op.nn.relu(emit(op.matmul(x, up))))
    return emit(op.add(x, emit(op.matmul(wide, down))))


def experts(emit: Draft, x: relax.Var, up: relax.Var, down: relax.Var) -> relax.Expr:
    """Two rows for every token, one with the opposite sign."""
    pair = emit(op.broadcast_to(emit(op.reshape(x, [N, 1, WIDTH])), [N, 2, WIDTH]))
    signs = emit(op.multiply(pair, relax.const(np.float32([[[1.0], [-1.0]]]))))
    rows = emit(op.reshape(signs, [2 * N, WIDTH]))
    wide = emit(op.nn.relu(emit(op.matmul(rows, up))))
    each = emit(op.reshape(emit(op.matmul(wide, down)), [N, 2, WIDTH]))
    return emit(op.add(x, emit(op.reshape(emit(op.sum(each, axis=1)), [1, N, WIDTH]))))


def centred(emit: Draft, x: relax.Var, up: relax.Var, down: relax.Var) -> relax.Expr:
    """A near miss: the mean over all tokens is taken away inside."""
    wide = emit(op.matmul(x, up))
    wide = emit(op.nn.relu(emit(op.subtract(wide, emit(op.mean(wide, axis=1, keepdims=True))))))
    return emit(op.add(x, emit(op.matmul(wide, down))))


def expected(part: Part, tokens: np.ndarray) -> np.ndarray:
    table, up, down = (w.astype(np.float64) for w in WEIGHTS)
    x = table[tokens]
    if part is experts:
        x = x + (np.maximum(x @ up, 0) + np.maximum(-x @ up, 0)) @ down
    else:
        x = x + np.maximum(x @ up, 0) @ down
    return x - x.mean(axis=0)


@dataclass(frozen=True)
class Built:
    """A function whose end needs all tokens, down to kernel calls, and its segments."""

    mod: IRModule
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, part: Part, over: bool = False, params: Sequence[relax.Var] = PARAMS) -> Built:
        """over: kernels write over what they read."""

        def body(emit: Draft, tokens: relax.Var, table: relax.Var, *weights: relax.Var) -> relax.Expr:
            x = emit(op.take(table, emit(op.reshape(tokens, [1, N])), axis=0))
            y = emit(part(emit, x, *weights))
            return emit(op.subtract(y, emit(op.mean(y, axis=1, keepdims=True))))

        mod, _ = module_of(list(params), body)
        mod = ProveRows().run(fused(mod, QUICK, Runner())).module
        mod = allocated(OverwriteInputs().run(mod).module if over else mod, Runner())
        return cls(mod, segments_of(mod))

    def calls(self) -> list[list[str]]:
        """The kernels of each segment."""
        graph = Graph(self.mod["main"])
        values = [graph.definitions[v] for v in graph.order]
        found = []
        for segment in self.segments:
            part = values[segment.first : segment.last + 1]
            found.append([v.op.name_hint for v in part if isinstance(getattr(v, "op", None), GlobalVar)])
        return found

    def placed(self, rows: int) -> tuple[IRModule, int]:
        place = PlaceArena({"n": BOUND}, segments=self.segments, rows=rows, returned="apart")
        result = place.run(self.mod)
        return result.module, result.facts

    def compiled(self, rows: int) -> Callable[[np.ndarray], np.ndarray]:
        mod = relax.transform.AttachGlobalSymbol()(to_vm(self.placed(rows)[0], Runner()))
        built = tvm.compile(mod, QUICK, relax_pipeline=tvm.transform.Sequential([]), tir_pipeline="default")
        machine = relax.VirtualMachine(built, tvm.cpu())
        weights = [tvm.runtime.tensor(w) for w in WEIGHTS]
        return lambda tokens: machine["main"](tvm.runtime.tensor(tokens), *weights).numpy()


def test_the_wide_part_is_a_segment() -> None:
    built = Built.of(feed_forward)
    assert built.calls() == [["fused_matmul_relu", "fused_matmul1_add"]]
    arena = Arena.of(built.mod, "apart", segments=built.segments)
    shapes = {str(t.alloc.args[0].values[-1].value): t.inner for t in arena.temporaries}
    assert shapes[str(INNER)]
    assert not shapes[str(WIDTH)]


@pytest.mark.parametrize(("part", "rows_a_token"), [(feed_forward, 1), (experts, 2)])
def test_only_rows_of_a_slice_have_room(part: Part, rows_a_token: int) -> None:
    built = Built.of(part)
    whole, sliced = built.placed(0)[1], built.placed(ROWS)[1]
    wide = rows_a_token * INNER * 4
    assert whole >= BOUND * wide
    assert whole - sliced >= (BOUND - ROWS) * wide - 64 * ROWS
    alive = Arena.of(built.mod, "apart", segments=built.segments).alive({"n": BOUND}, ROWS)
    assert max(alive) <= sliced


@pytest.mark.parametrize("rows", [32, 64, 128])
def test_a_slice_behind_the_last_token_is_skipped(rows: int) -> None:
    """Before: two calls. After: the same, and in a branch for every further slice, on its rows."""
    module, _ = Built.of(feed_forward).placed(rows)
    bindings = [b for block in module["main"].body.blocks for b in block.bindings]
    branches = [b.value for b in bindings if isinstance(b.value, relax.If)]
    assert len(branches) == -(-BOUND // rows) - 1
    conditions = {b.var: b.value for b in bindings}
    for number, branch in enumerate(branches, 1):
        condition = conditions[branch.cond]
        assert (condition.a.name, int(condition.b.value)) == ("n", rows * number)
        called = [b.value for block in branch.true_branch.blocks for b in block.bindings]
        names = [c.op.name_hint for c in called if isinstance(c, relax.Call)]
        assert names == ["fused_matmul_relu", "fused_matmul1_add"]
        assert not [
            b for k in branch.false_branch.blocks for b in k.bindings if isinstance(b.value, relax.Call)
        ]


@pytest.mark.parametrize(
    ("part", "over"), [(feed_forward, False), (feed_forward, True), (experts, False), (experts, True)]
)
def test_results_are_those_of_the_whole(part: Part, over: bool) -> None:
    """Bit by bit: a kernel computes a row by the same operations wherever it stands.

    over: the sum lies over x, of which each slice reads its rows before it writes them.
    """
    built = Built.of(part, over)
    assert any("over" in name for calls in built.calls() for name in calls) == over
    assert built.segments
    whole, sliced = built.compiled(0), built.compiled(ROWS)
    for count in (1, 63, 64, 65, 128, 129, 199, BOUND):
        tokens = np.random.default_rng(count).integers(0, VOCAB, count)
        result = sliced(tokens)
        np.testing.assert_array_equal(result, whole(tokens))
        # sums of 128 products of about 1 in float32
        np.testing.assert_allclose(result[0], expected(part, tokens), rtol=0, atol=2e-4)


def test_a_segment_does_not_end_where_little_is_gained() -> None:
    """Another part takes as much as is left with the second product outside; slices would add to that."""

    def gated(emit: Draft, x: relax.Var, up: relax.Var, down: relax.Var) -> relax.Expr:
        wide = emit(op.concat([emit(op.flip(x, axis=1))] * (INNER // WIDTH), axis=-1))
        centre = emit(op.subtract(wide, emit(op.mean(wide, axis=1, keepdims=True))))
        x = emit(op.strided_slice(centre, axes=[2], begin=[0], end=[WIDTH]))
        both = emit(op.matmul(x, up))
        gate, value = (
            emit(op.strided_slice(both, axes=[2], begin=[at], end=[at + INNER])) for at in (0, INNER)
        )
        return feed_forward_end(emit, x, emit(op.multiply(emit(op.nn.relu(gate)), value)), down)

    def feed_forward_end(emit: Draft, x: relax.Var, inner: relax.Var, down: relax.Var) -> relax.Expr:
        return emit(op.add(x, emit(op.matmul(inner, down))))

    built = Built.of(gated, over=True, params=[*PARAMS[:2], param("up", [WIDTH, 2 * INNER]), PARAMS[3]])
    (calls,) = built.calls()
    assert [name for name in calls if "matmul" in name] == ["matmul", "fused_matmul1_add_over"]


def test_what_mixes_tokens_inside_stays_whole() -> None:
    built = Built.of(centred)
    arena = Arena.of(built.mod, "apart", segments=built.segments)
    assert not any(t.inner and str(t.alloc.args[0].values[-1].value) == str(INNER) for t in arena.temporaries)


def test_nothing_is_sliced_where_attention_takes_more() -> None:
    """The least that can be reached is what the kernel that needs all tokens takes."""

    def wide_end(emit: Draft, x: relax.Var, up: relax.Var, down: relax.Var) -> relax.Expr:
        wide = emit(op.matmul(x, up))
        several = emit(op.concat([wide, wide, wide, wide], axis=-1))
        centre = emit(op.subtract(several, emit(op.mean(several, axis=1, keepdims=True))))
        narrow = emit(op.strided_slice(centre, axes=[2], begin=[0], end=[WIDTH]))
        return feed_forward(emit, emit(op.add(x, narrow)), up, down)

    assert not any("relu" in name for calls in Built.of(wide_end).calls() for name in calls)
