"""Forward passes below what their largest kernel takes: chains of kernels in slices."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import tvm
from torch import nn
from torch.nn import functional
from tvm import IRModule, relax

from kvc.frontend.importer import import_graph
from kvc.graphs import CompiledGraph, compile_graph


class UNet(nn.Module):
    """Two levels: image [1, 3, s, s] -> [1, 2, s, s]."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def twice(given: int, made: int) -> nn.Module:
            first, second = nn.Conv2d(given, made, 3, padding=1), nn.Conv2d(made, made, 3, padding=1)
            return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

        self.down, self.middle, self.up = twice(3, width), twice(width, 2 * width), twice(3 * width, width)
        self.last = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.down(x)
        x = self.middle(functional.max_pool2d(kept, 2))
        x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.last(self.up(torch.cat([x, kept], 1)))  # type: ignore[no-any-return]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "unet": (UNet, (1, 3, 64, 64)),
}


@functools.cache
def network(name: str) -> tuple[IRModule, np.ndarray, np.ndarray]:
    """The module, its input, and ONNX Runtime's result."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    x = torch.randn(*shape)
    program = torch.onnx.export(make().eval(), (x,), dynamo=True, verbose=False)
    assert program is not None
    model = program.model_proto
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return import_graph(onnx.ModelProto.FromString(model.SerializeToString())), x.numpy(), expected


@functools.cache
def whole(name: str) -> tuple[CompiledGraph, np.ndarray]:
    mod, x, _ = network(name)
    base = compile_graph(mod)
    return base, run(base, x)


def run(compiled: CompiledGraph, x: np.ndarray) -> np.ndarray:
    vm = relax.VirtualMachine(compiled.executable, tvm.cpu())
    result: np.ndarray = vm["main"](tvm.runtime.tensor(x)).numpy()
    return result


@pytest.mark.parametrize(
    ("name", "part"),
    [("unet", 0.8), ("unet", 0.6)],
)
def test_a_forward_pass_fits_a_part_of_it(name: str, part: float) -> None:
    mod, x, expected = network(name)
    base, result = whole(name)
    budget = int(base.peak * part)
    compiled = compile_graph(mod, budget=budget, seconds=20)
    assert compiled.splits
    assert compiled.peak <= budget
    assert compiled.natural == base.natural
    got = run(compiled, x)
    np.testing.assert_array_equal(got, result)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
