"""Kernels of decoders that write over what they read: what that takes, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tvm import IRModule

import kvc
from kvc.planning.decide import Planner
from kvc_passes.base import Result
from kvc_passes.loop_nests import OVERWRITTEN
from kvc_passes.plans import Workload

pytestmark = pytest.mark.usefixtures("fixed_rates")
ModelFile = Callable[..., Path]
WORK = Workload(2, 200)


class Nothing:
    """In the place of OverwriteInputs."""

    def run(self, mod: IRModule) -> Result:
        return Result(mod, 0)


@pytest.fixture
def planners(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Planner, Planner]]:
    """`planners(file, target)`: one with kernels that write over what they read, one without."""

    def make(file: Path, target: str) -> tuple[Planner, Planner]:
        over = kvc.planner(file, target=target)
        over.variant(over.usual()[0])
        apart = kvc.planner(file, target=target)
        with monkeypatch.context() as patch:
            patch.setattr("kvc.codegen.lower.OverwriteInputs", Nothing)
            apart.variant(apart.usual()[0])
        return over, apart

    return make


@pytest.mark.parametrize(("target", "dtype"), [("cpu", "float32"), ("cuda:sm_90", "float16")])
def test_an_activation_lies_over_its_input(
    planners: Callable[..., tuple[Planner, Planner]], model_file: ModelFile, target: str, dtype: str
) -> None:
    """Of a GPT-2: what is widest is there once. Predicted times are those of the same kernels apart."""
    planner, other = planners(model_file("gpt2", dtype=dtype), target)
    over, apart = (p.variant(p.usual()[0]) for p in (planner, other))
    for chunk in planner.machine.chunks:
        assert over.costs.arena(chunk, 1, 0) < 0.9 * apart.costs.arena(chunk, 1, 0)
        times, others = (variant.clock.times(WORK, chunk) for variant in (over, apart))
        assert times.prefill_seconds == pytest.approx(others.prefill_seconds)
        assert times.decode_seconds == pytest.approx(others.decode_seconds)
    for mod in over.lowered.functions.values():
        names = [v.name_hint for v, f in mod.functions_items() if OVERWRITTEN in (f.attrs or {})]
        activation = [name for name in names if "tanh" in name]
        sums = [name for name in names if "add" in name or name.startswith("packed_matmul")]
        assert activation
        assert set(sums) - set(activation)


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
def test_nothing_takes_more(
    planners: Callable[..., tuple[Planner, Planner]], model_file: ModelFile, target: str
) -> None:
    """Though lives are longer, and so harder to place: for every chunk, batch and slice."""
    planner, other = planners(model_file("llama"), target)
    over, apart = (p.variant(p.usual()[0]).costs for p in (planner, other))
    for chunk in planner.machine.chunks:
        for batch in (1, 8, 64):
            for ffn in (0, *apart.slices(chunk, batch)):
                assert over.arena(chunk, batch, ffn) <= apart.arena(chunk, batch, ffn)
