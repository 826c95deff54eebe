"""Naming what code is generated for."""

from __future__ import annotations

from typing import Any

from tvm.target import Target, codegen

from kvc_passes.errors import TargetError

from .cuda_machine import ARCHS, CudaMachine, parse_archs
from .kernels.traits import default_target
from .machine import CpuMachine, Machine


def parse_target(text: str) -> Machine:
    """ "cpu" for this machine, "cpu:NAME" for another x86-64 CPU that LLVM knows, "cuda[:ARCH,...]" for GPUs.

    Raises:
        TargetError: anything else.
    """
    kind, _, cpu = text.partition(":")
    if kind == "cuda":
        return CudaMachine(parse_archs(cpu))
    if kind != "cpu":
        raise TargetError(
            f"unknown target '{text}'; this version generates code for: cpu, cpu:NAME (such as "
            f"cpu:x86-64-v3), cuda, cuda:ARCH,... ({', '.join(ARCHS)})"
        )
    target = default_target()
    if not cpu:
        return CpuMachine(target)
    known = [str(name) for name in codegen.llvm_get_cpu_archlist(target)]
    if cpu not in known:
        raise TargetError(f"LLVM knows no CPU '{cpu}'; names that work: {', '.join(known[-12:])}, ...")
    attrs = {key: target.attrs[key] for key in ("mtriple", "num-cores")}
    named = {k: v if isinstance(v, int) else str(v) for k, v in attrs.items()}
    return CpuMachine(Target({"kind": "llvm", "mcpu": cpu, **named}))


def described(description: dict[str, Any]) -> Machine:
    """The machine that calls itself so, in this or another process."""
    if description["kind"] == "cuda":
        return CudaMachine(tuple(description["archs"]))
    return CpuMachine(Target(description))
