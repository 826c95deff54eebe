"""The targets that the kernel tests run on, and a way to compile and call kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import runtime
from tvm.target import Target, codegen

from kvc.kernels.emit import compiled
from kvc.kernels.traits import CpuTraits, default_target


def _targets() -> dict[str, Target]:
    """The machine's own target, and AVX2 where the machine can run that beside a wider one."""
    own = default_target()
    result = {"native": own}
    if CpuTraits.of(own).lanes > 8 and codegen.llvm_cpu_has_features("avx2", own):
        result["avx2"] = Target({**dict(own.export()), "mcpu": "x86-64-v3"})
    return result


@dataclass(frozen=True)
class Machine:
    """Compiles kernels for one target and calls them with numpy arrays."""

    target: Target
    traits: CpuTraits

    @functools.cache  # noqa: B019 - one compilation a kernel for the whole run
    def build(self, make: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return compiled(make(*args, self.traits, **options), self.target)

    @staticmethod
    def call(kernel: Any, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """The arrays after the call (kernels write to some of them)."""
        tensors = [runtime.tensor(np.ascontiguousarray(a)) for a in arrays]
        kernel(*tensors)
        return tuple(t.numpy() for t in tensors)


MACHINES = {name: Machine(target, CpuTraits.of(target)) for name, target in _targets().items()}


def baseline() -> Machine:
    """A machine of the same family without extensions: on x86-64 four lanes, and no 16-bit conversions."""
    own = default_target()
    x86 = str(own.attrs["mtriple"]).startswith("x86_64")
    target = Target({**dict(own.export()), "mcpu": "x86-64" if x86 else "generic"})
    return Machine(target, CpuTraits.of(target))
