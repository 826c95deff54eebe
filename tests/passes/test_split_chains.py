"""SplitChains: large values between kernels are computed in slices, and every number stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import IRModule, relax
from tvm.relax import op

from kvc_passes.chains import Chain, Chains
from kvc_passes.graph import graph_of, op_name
from kvc_passes.overwrite_inputs import OverwriteInputs
from kvc_passes.place_arena import Arena
from kvc_passes.rematerialize import Operations, Rematerialize
from kvc_passes.split_chains import SplitChains
from support import Compiled, Draft, floats, module_of, ops, param, symbol


def kernels(mod: IRModule) -> IRModule:
    """Operators as calls of kernels, as they come to the pass."""
    passes = relax.transform
    for each in (
        passes.LegalizeOps(),
        passes.AnnotateTIROpPattern(),
        passes.FoldConstant(),
        passes.FuseOps(),
        passes.FuseTIR(),
        passes.DeadCodeElimination(),
        passes.RewriteDataflowReshape(),
    ):
        mod = each(mod)
    return mod


def module(body: Any, *params: relax.Var) -> IRModule:
    return kernels(module_of(list(params), body)[0])


def arena(mod: IRModule) -> int:
    for each in (relax.transform.ToNonDataflow(), relax.transform.RemovePurityChecking()):
        mod = each(mod)
    return Arena.of(relax.transform.CallTIRRewrite()(mod), "apart").size({})


def weight(*shape: int, seed: int = 0) -> relax.Expr:
    return relax.const(np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.3)


def feed_forward() -> IRModule:
    """[16, 8] -> [16, 64] -> [16, 8], and again what comes before and behind."""

    def body(emit: Draft, x: relax.Var) -> relax.Expr:
        x = emit(op.matmul(x, weight(8, 8)))
        wide = emit(op.nn.gelu(emit(op.matmul(x, weight(8, 64)))))
        return emit(op.nn.relu(emit(op.matmul(emit(op.matmul(wide, weight(64, 8))), weight(8, 8)))))

    return module(body, param("x", [16, 8]))


def attention() -> IRModule:
    """Scores [2, 16, 16] of heads, their softmax, and values; heads apart and together by reshapes."""

    def body(emit: Draft, x: relax.Var) -> relax.Expr:
        def heads(seed: int) -> relax.Expr:
            rows = emit(op.matmul(x, weight(8, 8, seed=seed)))
            return emit(op.permute_dims(emit(op.reshape(rows, [16, 2, 4])), [1, 0, 2]))

        q, k, v = heads(1), heads(2), heads(3)
        scores = emit(op.matmul(q, emit(op.permute_dims(k, [0, 2, 1]))))
        mixed = emit(op.matmul(emit(op.nn.softmax(scores, -1)), v))
        rows = emit(op.reshape(emit(op.permute_dims(mixed, [1, 0, 2])), [16, 8]))
        return emit(op.matmul(rows, weight(8, 8)))

    return module(body, param("x", [16, 8]))


def convolutions(stride: int = 1, kernel: int = 3, dilation: int = 1, size: int = 12) -> IRModule:
    """Three convolutions, the middle ones with many channels, and a larger image from a smaller one."""

    def body(emit: Draft, x: relax.Var) -> relax.Expr:
        y = emit(op.nn.relu(emit(op.nn.conv2d(x, weight(8, 2, 3, 3), padding=1))))
        y = emit(op.nn.conv2d(y, weight(8, 8, kernel, kernel), stride, kernel // 2, dilation))
        y = emit(op.concat([emit(op.nn.relu(y)), y], 1))
        y = emit(op.image.resize2d(y, (size, size), layout="NCHW", method="nearest_neighbor"))
        return emit(op.nn.conv2d(y, weight(2, 16, 3, 3), padding=1))

    return module(body, param("x", [1, 2, size, size]))


def same(a: IRModule, b: IRModule, *arrays: np.ndarray) -> None:
    for got, expected in zip(Compiled(a)(*arrays), Compiled(b)(*arrays), strict=True):
        np.testing.assert_array_equal(got, expected)


def natural(mod: IRModule) -> int:
    return Chains(Operations(mod, {}, {})).loads([]).peak


def test_a_wide_middle_is_computed_in_slices() -> None:
    mod = feed_forward()
    result = SplitChains(natural(mod) // 2).run(mod)
    assert result.sites == 1
    assert result.facts.peak <= natural(mod) // 2
    (chain,) = result.facts.chains
    assert ops(mod)["call_tir"] == 4
    assert ops(mod)["call_tir_inplace"] == 0
    found = ops(result.module)
    assert found["call_tir_inplace"] == chain.slices - 1
    outside = 4 - len(chain.members)
    assert found["call_tir"] == outside + chain.slices * len(chain.members) - (chain.slices - 1)
    assert found["concat"] == 0  # slices are written where they belong
    same(result.module, mod, floats(16, 8))


def test_the_last_of_a_chain_writes_into_one_output() -> None:
    mod = SplitChains(natural(feed_forward()) // 2).run(feed_forward()).module
    graph = graph_of(mod["main"])
    updates = [
        graph.definitions[v] for v in graph.order if op_name(graph.definitions[v]) == "call_tir_inplace"
    ]
    for update in updates:
        assert list(update.attrs.inplace_indices) == [len(update.args[1].fields) - 1]
    first = graph.definitions[updates[0].args[1].fields[-1]]
    assert op_name(first) == "call_tir"
    assert [int(d) for d in first.ty_args[0].shape.values] == [16, 8]


@pytest.mark.parametrize("make", [feed_forward, attention, convolutions])
@pytest.mark.parametrize("part", [0.8, 0.6])
def test_every_number_stays_and_what_is_promised_holds(make: Any, part: float) -> None:
    mod = make()
    before = natural(mod)
    result = SplitChains(int(before * part)).run(mod)
    assert result.sites
    assert result.facts.peak < before
    assert result.facts.peak <= max(before * part, 0.8 * before)
    over = OverwriteInputs().run(result.module).module
    assert arena(over) < arena(OverwriteInputs().run(mod).module)
    shape = [int(d) for d in mod["main"].params[0].ty.shape.values]
    same(over, mod, floats(*shape))


def test_a_schedule_for_less_keeps_the_slices_in_order() -> None:
    """Values outside the chain wait for it; computed later, they do not."""

    def body(emit: Draft, x: relax.Var) -> relax.Expr:
        early = emit(op.sin(emit(op.matmul(x, weight(8, 32, seed=5)))))
        wide = emit(op.nn.gelu(emit(op.matmul(x, weight(8, 64)))))
        narrow = emit(op.matmul(wide, weight(64, 8)))
        return emit(op.concat([emit(op.matmul(early, weight(32, 8))), emit(op.cos(narrow))], 1))

    mod = module(body, param("x", [16, 8]))
    split = SplitChains(3000).run(mod)
    assert split.sites == 1
    result = Rematerialize(split.facts.peak - 256, seconds=5).run(split.module)
    assert result.facts.peak < split.facts.peak
    same(result.module, mod, floats(16, 8))


def test_what_is_small_enough_or_read_elsewhere_stays() -> None:
    mod = feed_forward()
    assert SplitChains(natural(mod)).run(mod).module.same_as(mod)

    def body(emit: Draft, x: relax.Var) -> list[relax.Expr]:
        wide = emit(op.matmul(x, weight(8, 64)))
        narrow = emit(op.matmul(wide, weight(64, 8)))
        return [narrow, wide]

    mod = module(body, param("x", [16, 8]))
    assert SplitChains(0).run(mod).sites == 0


def test_a_slice_is_written_over_the_rows_that_it_was_made_of() -> None:
    """A sum around a feed-forward part lies in what it adds to."""

    def body(emit: Draft, x: relax.Var) -> relax.Expr:
        x = emit(op.matmul(x, weight(8, 8)))
        wide = emit(op.nn.gelu(emit(op.matmul(x, weight(8, 64)))))
        return emit(op.matmul(emit(op.add(emit(op.matmul(wide, weight(64, 8))), x)), weight(8, 8)))

    mod = module(body, param("x", [16, 8]))
    result = SplitChains(natural(mod) // 3).run(mod)
    (chain,) = result.facts.chains
    assert ops(result.module)["call_tir_inplace"] == chain.slices
    assert arena(result.module) == result.facts.peak <= natural(mod) // 3
    same(result.module, mod, floats(16, 8))


def test_what_slices_wrote_is_overwritten_as_other_values_are() -> None:
    """A sum lies in the output of a chain before it, which it adds to."""

    def body(emit: Draft, x: relax.Var) -> relax.Expr:
        wide = emit(op.nn.gelu(emit(op.matmul(x, weight(8, 128)))))
        kept = emit(op.matmul(wide, weight(128, 32)))
        narrow = emit(op.matmul(kept, weight(32, 8)))
        total = emit(op.add(emit(op.matmul(narrow, weight(8, 32))), kept))
        return emit(op.matmul(total, weight(32, 8)))

    mod = module(body, param("x", [16, 8]))
    both = 2 * 4 * 16 * 32
    result = SplitChains(both * 3 // 4).run(mod)
    assert result.sites == 1
    assert result.facts.peak <= both * 3 // 4
    over = OverwriteInputs().run(result.module).module
    assert arena(over) == result.facts.peak
    same(over, mod, floats(16, 8))


def skipping() -> IRModule:
    """A large image that is read at once and again at the end, and small ones between."""

    def body(emit: Draft, x: relax.Var) -> relax.Expr:
        kept = emit(op.nn.relu(emit(op.nn.conv2d(x, weight(8, 2, 3, 3), padding=1))))
        small = emit(op.nn.max_pool2d(kept, [4, 4], [4, 4]))
        for seed in range(3):
            small = emit(op.nn.relu(emit(op.nn.conv2d(small, weight(8, 8, 3, 3, seed=seed), padding=1))))
        large = emit(op.image.resize2d(small, (16, 16), layout="NCHW", method="nearest_neighbor"))
        both = emit(op.concat([large, kept], 1))
        return emit(op.nn.conv2d(both, weight(1, 16, 3, 3), padding=1))

    return module(body, param("x", [1, 2, 16, 16]))


def test_what_waits_for_a_chain_is_computed_again_in_it() -> None:
    mod = skipping()
    result = SplitChains(natural(mod) // 4).run(mod)
    assert any(chain.again for chain in result.facts.chains)
    assert result.facts.peak < 4 * 8 * 16 * 16 < natural(mod)  # never the whole large image
    over = OverwriteInputs().run(result.module).module
    assert arena(over) < 4 * 8 * 16 * 16
    same(over, mod, floats(1, 2, 16, 16))


def test_what_all_slices_need_whole_is_no_part_of_a_chain() -> None:
    """Keys and values, where the scores are computed by rows."""
    mod = attention()
    chains = Chains(Operations(mod, {}, {}))
    last = next(
        op_
        for op_ in range(len(chains.users))
        if chains.of.shape(op_) == (2, 16, 4) and len(chains._cone(op_)) > 6
    )
    members = tuple(chains._cone(last))
    pruned = chains.without_whole(Chain(members, 1, 2))
    assert pruned is not None
    assert set(pruned.members) < set(members)
    heads = chains.without_whole(Chain(members, 0, 2))
    assert heads is not None
    assert heads.members == members


def test_symbolic_shapes_stay() -> None:
    def body(emit: Draft, x: relax.Var) -> relax.Expr:
        return emit(op.matmul(emit(op.matmul(x, weight(8, 64))), weight(64, 8)))

    mod = module(body, param("x", [symbol("n"), 8]))
    assert SplitChains(0, {"n": 100}).run(mod).sites == 0


@settings(max_examples=6, deadline=None)
@given(
    stride=st.integers(1, 2),
    kernel=st.sampled_from([1, 3, 5]),
    dilation=st.integers(1, 2),
    size=st.integers(9, 16),
    part=st.sampled_from([0.6, 0.8]),
)
def test_any_convolutions(stride: int, kernel: int, dilation: int, size: int, part: float) -> None:
    mod = convolutions(stride, kernel, dilation, size)
    result = SplitChains(int(natural(mod) * part)).run(mod)
    over = OverwriteInputs().run(result.module).module
    same(over, mod, floats(1, 2, size, size))
