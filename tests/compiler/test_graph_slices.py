"""Forward passes below what their largest kernel takes: chains of kernels in slices."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from kvc_passes.errors import BudgetError


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


class Encoder(nn.Module):
    """Two layers as BERT's: x [1, n, width] -> [1, n, width]."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        pairs = ((1, 1), (1, 1), (1, 1), (1, 1), (1, 4), (4, 1))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    *(nn.Linear(a * width, b * width) for a, b in pairs),
                    nn.LayerNorm(width),
                    nn.LayerNorm(width),
                ]
            )
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        for query, key, value, out, up, down, first, second in self.layers:  # type: ignore[misc]
            q, k, v = (
                layer(x).reshape(batch, length, self.heads, width // self.heads).permute(0, 2, 1, 3)
                for layer in (query, key, value)
            )
            weights = torch.softmax(torch.matmul(q, k.permute(0, 1, 3, 2)) * 0.35, -1)
            mixed = torch.matmul(weights, v).permute(0, 2, 1, 3).reshape(batch, length, width)
            x = first(x + out(mixed))
            x = second(x + down(functional.gelu(up(x))))
        return x


class Bottlenecks(nn.Module):
    """A stem and residual blocks of two resolutions: image [1, 3, s, s] -> [1, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 7, stride=2, padding=3)
        self.first, self.inner = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.last, self.beside, self.head = (
            nn.Conv2d(8, 32, 1),
            nn.Conv2d(16, 32, 1, stride=2),
            nn.Linear(32, 5),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(torch.relu(self.stem(x)), 3, stride=2, padding=1)
        inner = self.last(torch.relu(self.inner(torch.relu(self.first(x)))))
        return self.head(torch.relu(inner + self.beside(x)).mean(dim=(2, 3)))  # type: ignore[no-any-return]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "unet": (UNet, (1, 3, 64, 64)),
    "encoder": (Encoder, (1, 96, 32)),
    "bottlenecks": (Bottlenecks, (1, 3, 64, 64)),
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
    [("unet", 0.8), ("unet", 0.6), ("encoder", 0.8), ("encoder", 0.6), ("bottlenecks", 0.7)],
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
    # Sums of a slice may be vectorized in another way.
    np.testing.assert_allclose(got, result, rtol=0, atol=1e-6 * np.abs(result).max())
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_less_than_slices_reach_is_refused_with_what_they_do() -> None:
    mod, x, _ = network("unet")
    base, result = whole("unet")
    with pytest.raises(BudgetError, match="whatever is computed again; 9000 were given") as refused:
        compile_graph(mod, budget=9000, seconds=5)
    needed = refused.value.needed
    assert needed < 0.6 * base.peak
    compiled = compile_graph(mod, budget=needed, seconds=5)
    assert compiled.peak <= needed
    np.testing.assert_array_equal(run(compiled, x), result)


def test_a_fixed_order_is_not_split() -> None:
    mod, _, _ = network("unet")
    base, _ = whole("unet")
    with pytest.raises(BudgetError):
        compile_graph(mod, budget=int(base.peak * 0.6), fixed_order=True, seconds=5)


MEASURE = """
import json, sys
from pathlib import Path
import numpy as np, tvm
from tvm import relax
from kvc.runtime.peak import peak_bytes

def resident():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024

vm = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[1]), tvm.cpu())
x = tvm.runtime.tensor(np.load(sys.argv[2]))
before = resident()
Path("/proc/self/clear_refs").write_text("5")
vm["main"](x)
print(json.dumps(peak_bytes() - before))
"""


@pytest.mark.slow
def test_a_process_takes_no_more_than_was_promised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 256, 256)
    program = torch.onnx.export(UNet(16).eval(), (x,), dynamo=True, verbose=False)
    assert program is not None
    mod = import_graph(onnx.ModelProto.FromString(program.model_proto.SerializeToString()))
    peaks: dict[float, Any] = {}
    base = compile_graph(mod)
    for part, compiled in ((1.0, base), (0.5, compile_graph(mod, budget=base.peak // 2, seconds=20))):
        library, given = tmp_path / f"{part}.so", tmp_path / "x.npy"
        compiled.executable.export_library(str(library))
        np.save(given, x.numpy())
        command = [sys.executable, "-c", MEASURE, str(library), str(given)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[part] = json.loads(done.stdout.splitlines()[-1])
        assert peaks[part] <= compiled.peak + (1 << 17)  # code that runs for the first time
    assert peaks[0.5] < 0.6 * peaks[1.0]
