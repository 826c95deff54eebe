"""Whole graphs that are no decoders, compiled below the memory that they take as they stand."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm import IRModule, relax
from tvm.relax.frontend.torch import from_exported_program

from kvc.graphs import CompiledGraph, compile_graph
from kvc_passes.errors import BudgetError, InputError, TargetError


class Residual(torch.nn.Module):
    """Blocks with a connection around them, for training."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layers = (torch.nn.Conv2d(width, width, 3, padding=1) for _ in range(2 * depth))
        self.layers = torch.nn.ModuleList(layers)
        self.head = torch.nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for first, second in zip(self.layers[::2], self.layers[1::2]):
            x = x + torch.relu(second(torch.relu(first(x))))
        scores: torch.Tensor = self.head(x.mean(dim=(2, 3)))
        return scores


@functools.cache
def training() -> tuple[IRModule, tuple[np.ndarray, ...], list[np.ndarray]]:
    """A step of training: the module, its arguments, and torch's loss and gradients."""
    torch.manual_seed(0)
    model, x = Residual(8, 4), torch.randn(2, 8, 12, 12)
    exported = from_exported_program(
        torch.export.export(model, (x,)), keep_params_as_input=True, unwrap_unit_return_tuple=True
    )
    mod, params = relax.frontend.detach_params(exported)
    result = mod["main"].ret_ty
    from tvm.relax.training.loss import MSELoss
    from tvm.relax.training.utils import AppendLoss

    loss = MSELoss(reduction="sum")(relax.Var("result", result), relax.Var("wanted", result))
    mod = AppendLoss("main", loss, num_backbone_outputs=1, new_func_name="loss")(mod)
    weights = list(mod["loss"].params[1:-1])
    main = relax.transform.Gradient("loss", require_grads=weights)(mod)["loss_adjoint"]
    arguments = (x.numpy(), *(p.numpy() for p in params["main"]), np.zeros((2, 4), np.float32))
    expected = (model(x) ** 2).sum()
    expected.backward()
    wanted = [expected.detach().numpy(), *(p.grad.numpy() for p in model.parameters() if p.grad is not None)]
    return IRModule({"main": main.with_attr("global_symbol", "main")}), arguments, wanted


def run(compiled: CompiledGraph, arguments: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    vm = relax.VirtualMachine(compiled.executable, tvm.cpu())
    return _flat(vm["main"](*map(tvm.runtime.tensor, arguments)))


def _flat(result: Any) -> list[np.ndarray]:
    if hasattr(result, "numpy"):
        return [result.numpy()]
    return [array for each in result for array in _flat(each)]


@functools.cache
def plain() -> tuple[CompiledGraph, list[np.ndarray]]:
    mod, arguments, _ = training()
    base = compile_graph(mod)
    return base, run(base, arguments)


def test_as_it_stands_it_takes_its_natural_peak() -> None:
    base, results = plain()
    assert (base.arena, base.solution) == (base.natural, None)
    assert base.outputs >= sum(result.nbytes for result in results)
    for got, expected in zip(results, training()[2], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("part", [0.8, 0.65])
def test_a_step_of_training_fits_a_part_of_it(part: float) -> None:
    mod, arguments, _ = training()
    base, expected = plain()
    budget = int(base.peak * part)
    compiled = compile_graph(mod, budget=budget)
    assert compiled.arena + base.workspace + base.outputs <= compiled.peak <= budget
    assert compiled.solution is not None
    assert 0 <= compiled.solution.overhead < 0.5
    for got, wanted in zip(run(compiled, arguments), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_budget_that_nothing_fits_is_refused_with_one_that_works() -> None:
    mod, _, _ = training()
    base, _ = plain()
    with pytest.raises(BudgetError, match="whatever is computed again; 20000 were given") as refused:
        compile_graph(mod, budget=20000, seconds=5)
    needed = refused.value.needed
    assert 20000 < needed < base.peak
    assert compile_graph(mod, budget=needed, seconds=5).peak <= needed


def test_what_is_no_budget_and_no_cpu_is_refused() -> None:
    mod, _, _ = training()
    with pytest.raises(InputError, match="'much' is not a size"):
        compile_graph(mod, budget="much")
    with pytest.raises(TargetError, match="for CPUs alone, not for the target cuda"):
        compile_graph(mod, target="cuda")


class Wide(torch.nn.Module):
    """A residual block whose middle is narrow: what is added and its sum take the most."""

    def __init__(self) -> None:
        super().__init__()
        convolution = torch.nn.Conv2d
        self.first, self.down, self.up = (convolution(a, b, 1) for a, b in ((4, 16), (16, 4), (4, 16)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        for _ in range(2):
            x = torch.relu(x + self.up(torch.relu(self.down(x))))
        return x.mean(dim=(2, 3))


def test_sums_lie_in_what_they_add() -> None:
    """Two thirds of the natural peak without another order and without anything computed again."""
    torch.manual_seed(0)
    model, x = Wide().eval(), torch.randn(1, 4, 97, 99)  # sizes that no vector and no tile divides
    mod = from_exported_program(torch.export.export(model, (x,)), unwrap_unit_return_tuple=True)
    base = compile_graph(mod)
    compiled = compile_graph(mod, budget=int(base.peak * 0.67))
    assert compiled.solution is None
    assert compiled.peak <= 0.67 * base.peak
    (got,), (expected,) = (run(c, (x.numpy(),)) for c in (compiled, base))
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)
