"""Naming what code is generated for."""

from __future__ import annotations

from tvm.target import Target, codegen

from kvc_passes.errors import TargetError

from .kernels.traits import default_target


def parse_target(text: str) -> Target:
    """ "cpu" for this machine, "cpu:NAME" for another x86-64 CPU that LLVM knows.

    Raises:
        TargetError: anything else.
    """
    kind, _, cpu = text.partition(":")
    if kind != "cpu":
        raise TargetError(
            f"unknown target '{text}'; this version generates code for: cpu, cpu:NAME (such as cpu:x86-64-v3)"
        )
    target = default_target()
    if not cpu:
        return target
    known = [str(name) for name in codegen.llvm_get_cpu_archlist(target)]
    if cpu not in known:
        raise TargetError(f"LLVM knows no CPU '{cpu}'; names that work: {', '.join(known[-12:])}, ...")
    attrs = {key: target.attrs[key] for key in ("mtriple", "num-cores")}
    return Target(
        {"kind": "llvm", "mcpu": cpu, **{k: v if isinstance(v, int) else str(v) for k, v in attrs.items()}}
    )
