"""What the kernel templates need to know about a CPU: vector width, registers, threads."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tvm.target import Target, codegen


@dataclass(frozen=True)
class CpuTraits:
    """The properties of a CPU that tile sizes and layouts are derived from."""

    lanes: int
    """float32 elements in a vector register."""
    registers: int
    """Vector registers."""
    threads: int
    """Workers that parallel loops are balanced for."""

    @staticmethod
    def of(target: Target) -> CpuTraits:
        """Traits of an LLVM CPU target; `num-cores` gives the threads (1 when absent)."""
        threads = max(int(target.attrs.get("num-cores", 1)), 1)
        triple = str(target.attrs.get("mtriple", "") or codegen.llvm_get_system_triple())
        if not triple.startswith(("x86_64", "i686")):
            return CpuTraits(lanes=4, registers=32, threads=threads)
        if codegen.llvm_cpu_has_features("avx512f", target):
            return CpuTraits(lanes=16, registers=32, threads=threads)
        if codegen.llvm_cpu_has_features("avx", target):
            return CpuTraits(lanes=8, registers=16, threads=threads)
        return CpuTraits(lanes=4, registers=16, threads=threads)

    @property
    def tile_rows(self) -> int:
        """Rows of a register tile two vectors wide: two weight vectors and a broadcast stay free."""
        return (self.registers - 4) // 2


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_target() -> Target:
    """The LLVM target of this machine, with its CPU name and the cores this process may use."""
    return Target(
        {
            "kind": "llvm",
            "mcpu": codegen.llvm_get_system_cpu(),
            "mtriple": codegen.llvm_get_system_triple(),
            "num-cores": _cores(),
        }
    )
