"""Triton kernels with everything fixed that is compiled in, and their machine code.

Triton is needed to compile, not to plan: it is imported where the code of a kernel is asked for.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvc_passes.errors import PlanningError, TargetError

from . import boxes

_PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32"}
"""Types of parameters by Triton's names, as PTX spells them; pointers are u64, tensor maps bytes."""

_SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
"""Shared memory that a block can have, by architecture; 99 KiB is there on every one since sm_80."""


@dataclass(frozen=True)
class DeviceKernel:
    """A Triton function with everything fixed that is compiled in."""

    function: str
    """<module>.<name> of the function `name` in kvc.kernels.cuda.triton_<module>."""
    types: tuple[tuple[str, str], ...]
    """Run-time parameters in order, with Triton's types: *fp16, *bf16, *fp32, *i32, *i64, *u8, i32, fp32, and
    tensordesc<fp16[rows, columns]> (kvc.kernels.cuda.boxes)."""
    constants: tuple[tuple[str, Any], ...]
    """Parameters that are compiled in: ints, floats, bools, strings, None and tuples of them."""
    aligned: tuple[str, ...]
    """Parameters that are multiples of 16: a promise that callers must keep."""
    warps: int = 4
    stages: int = 3
    """Most blocks of data under way at once in a pipelined loop: it may be fewer where they don't fit."""

    @cached_property
    def name(self) -> str:
        """The symbol of the compiled function, which no other variant has."""
        fields = (self.function, self.types, self.constants, self.aligned, self.warps, self.stages)
        digest = hashlib.sha256(repr(fields).encode()).hexdigest()[:8]
        return f"kvc_{self.function.replace('.', '_')}_{digest}"

    def load(self) -> Any:
        """The Triton function; with TRITON_INTERPRET=1 in the environment one that numpy runs."""
        module, name = self.function.rsplit(".", 1)
        _triton()
        return getattr(importlib.import_module(f"{__package__}.triton_{module}"), name)


@dataclass(frozen=True)
class Compiled:
    """The machine code of a kernel for one architecture, and what it takes."""

    cubin: bytes
    ptx: str
    shared: int
    """Bytes of dynamic shared memory to launch it with."""
    registers: int
    """Registers of a thread."""
    local: int
    """Bytes of spilled registers of a thread."""
    warps: int


def compile_kernel(kernel: DeviceKernel, arch: int) -> Compiled:
    """Machine code of a kernel for sm_<arch> (80, 86, 89, 90, 100...); no GPU is needed.

    The function's parameters are `kernel.types` and two pointers after them, which may be null.
    Raises TargetError without Triton, and PlanningError for code that cannot be launched that way or would
    be slow: that spills registers, or takes more of them or of shared memory than the architecture has, even
    with one block of data under way.
    """
    _triton()
    problems: list[str] = []
    for stages in range(kernel.stages, 0, -1):
        code, problem = _compiled(kernel, arch, stages)
        if not problem:
            return code
        problems.append(problem)
    raise PlanningError(f"kernel {kernel.name} for sm_{arch} {problems[0]}")


def shared_bytes(arch: int) -> int:
    """Shared memory that a block can have."""
    return _SHARED_KIB.get(arch, 99) * 1024


def _compiled(kernel: DeviceKernel, arch: int, stages: int) -> tuple[Compiled, str]:
    """The code with so many blocks under way, and what about it is too much, if anything."""
    triton = _triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name = kernel.name
    function = triton.JITFunction(kernel.load().fn, repr=lambda _: name)
    parameters = list(function.arg_names)
    known = [*dict(kernel.types), *dict(kernel.constants)]
    if sorted(parameters) != sorted(known):
        raise PlanningError(f"{name}: parameters {known}, but its function has {parameters}")
    if [p for p in parameters if p in dict(kernel.types)] != [p for p, _ in kernel.types]:
        raise PlanningError(f"{name}: its run-time parameters are in another order than its function's")

    class Named(ASTSource):  # type: ignore[misc]
        """Triton's cache knows code by what is compiled in alone, and would give that of another name."""

        def hash(self) -> str:
            return hashlib.sha256(f"{super().hash()}-{name}".encode()).hexdigest()

    source = Named(
        fn=function,
        signature={p: dict(kernel.types).get(p, "constexpr") for p in parameters},
        constexprs=dict(kernel.constants),
        attrs={(parameters.index(p),): [["tt.divisibility", 16]] for p in kernel.aligned},
    )
    options = {"num_warps": kernel.warps, "num_stages": stages}
    code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, local = _resources(code.asm["cubin"])
    metadata = code.metadata
    compiled = Compiled(
        code.asm["cubin"], code.asm["ptx"], metadata.shared, registers, local, metadata.num_warps
    )
    _check_launch(kernel, arch, compiled, metadata)
    limit = shared_bytes(arch)
    excess = {
        f"spills {local} bytes of registers": local != 0,
        f"takes {registers} registers": registers > 255,
        f"takes {compiled.shared} bytes of shared memory of {limit}": compiled.shared > limit,
    }
    return compiled, next((problem for problem, there in excess.items() if there), "")


def _check_launch(kernel: DeviceKernel, arch: int, code: Compiled, metadata: Any) -> None:
    """Raises PlanningError for code that the launches kvc emits do not fit."""
    expected = [each for _, type in kernel.types for each in _parameters(type)]
    found = parameters_of(code.ptx)
    matrices = [boxes.copied(type) for _, type in kernel.types if boxes.is_matrix(type)]
    copied = [(*each["block_size"], each["swizzle"]) for each in metadata.tensordesc_meta or ()]
    problems = {
        f"takes {found}, not {expected} and two pointers": found != [*expected, "u64", "u64"],
        f"copies boxes {copied}, not {matrices}": copied != matrices,
        "needs global scratch memory": metadata.global_scratch_size != 0,
        "needs a cluster of blocks": metadata.num_ctas != 1,
        f"runs {code.warps} warps, not {kernel.warps}": code.warps != kernel.warps,
        f"is named {metadata.name}": metadata.name != kernel.name,
    }
    for problem, there in problems.items():
        if there:
            raise PlanningError(f"kernel {kernel.name} for sm_{arch} {problem}")


def _parameters(type: str) -> list[str]:
    """What PTX has for a parameter of one of Triton's types."""
    if boxes.is_matrix(type):
        return ["u8", *(_PTX_TYPES[kind] for kind in boxes.HIDDEN)]
    return ["u64" if type.startswith("*") else _PTX_TYPES[type]]


def parameters_of(ptx: str) -> list[str]:
    """The PTX types of the parameters of a module's only entry, signs left out."""
    header = ptx[ptx.index(".entry") :]
    found = re.findall(r"\.param (?:\.align \d+ )?\.(\w+)", header[: header.index("\n)")])
    return [re.sub("^[bs]", "u", kind) for kind in found]


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (spills and stack) of a thread."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["LOCAL"]) + int(usage["STACK"])


def _triton() -> Any:
    try:
        return importlib.import_module("triton")
    except ImportError as error:
        raise TargetError("code for CUDA needs Triton: pip install 'kvc[cuda]'") from error
