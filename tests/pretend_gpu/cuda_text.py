"""Runs CUDA text on the CPU: compiled by g++ over shim.h, a call for each kernel.

It takes what TVM generates for element-wise kernels, reductions and transpositions: static and dynamic shared
memory, barriers, shuffles, half and bfloat16. It doesn't take inline assembly or matrix instructions.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from pretend_gpu.launches import Grid, Params

HERE = Path(__file__).parent
FLAGS = ["-std=gnu++17", "-O2", "-w", "-shared", "-fPIC", "-fexcess-precision=16", "-fno-strict-aliasing"]
FLAGS += ["-ffp-contract=off", "-fno-exceptions"]
_KERNEL = re.compile(
    r'extern "C" __global__ void\s+(?:__launch_bounds__\((\d+)[^)]*\)\s*)?(\w+)\(([^)]*)\)\s*\{', re.S
)
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:(?:__align__|alignas)\(\d+\)\s*)?([\w ]+?)\s*(\w+)\[\];")
_VOLATILE = re.compile(r"\(\(volatile (\w+)\s*\*\)\s*(\w+)\)\[")
_WAITS = re.compile(r"__sync|__shfl|__activemask|__ballot|__any_sync|__all_sync|\btvm_")
_SIZES = {"int": 4, "uint": 4, "unsigned": 4, "float": 4, "int64_t": 8, "uint64_t": 8, "double": 8}
_SIZES |= {"bool": 1, "signed char": 1, "uchar": 1, "short": 2, "half": 2, "nv_bfloat16": 2}


class _Signature(NamedTuple):
    name: str
    types: list[str]
    most_threads: int
    waits: bool
    lockstep: bool


class TextKernel:
    """A kernel of a text, ready for `Launches.add`."""

    def __init__(self, library: ctypes.CDLL, signature: _Signature) -> None:
        self.name, self.types, self.most_threads, self.waits, self.lockstep = signature
        """`lockstep`: the lanes of a warp exchange values by volatile shared memory, without __syncwarp()."""
        strange = [kind for kind in self.types if not kind.endswith("*") and kind not in _SIZES]
        if strange:
            raise TypeError(f"{self.name} takes {strange[0]}, which doesn't run on the CPU")
        self.sizes = [8 if kind.endswith("*") else _SIZES[kind] for kind in self.types]
        self._run = library[f"shim_run_{self.name}"]
        self._run.restype = ctypes.c_char_p
        dims = ctypes.POINTER(ctypes.c_uint)
        self._run.argtypes = [dims, dims, ctypes.c_uint, ctypes.c_void_p]

    def __call__(self, grid: Grid, block: Grid, shared: int, params: Params) -> None:
        """Runs all blocks, one after the other."""
        if block[0] * block[1] * block[2] > self.most_threads:
            raise ValueError(f"{self.name}: a block of {block} is compiled for {self.most_threads} threads")
        for index, kind in enumerate(self.types):
            if kind.endswith("*") and params.address(index):
                params.extent(index)
        three = ctypes.c_uint * 3
        problem = self._run(three(*grid), three(*block), shared, params.base)
        if problem:
            raise RuntimeError(f"{self.name}: {problem.decode()}")


def compile_text(source: str, folder: Path) -> dict[str, TextKernel]:
    """The kernels of the text by name. The compiled library stays in `folder` and is found again there."""
    signatures = [_signature(source, found) for found in _KERNEL.finditer(source)]
    text = re.sub(r"#\s*include <(cuda|math_constants|mma)[^>]*>", "", source)
    text = _VOLATILE.sub(r"shim::lockstep((\1*)\2)[", text)
    text = _DYNAMIC.sub(r"\1* \2 = (\1*)shim_dynamic;", text)
    parts = ['#include "shim.h"', text, *(_wrapper(signature) for signature in signatures)]
    text = "\n".join(parts)
    digest = hashlib.sha256((repr(FLAGS) + text).encode())
    for header in ("shim.h", "fibers.h"):
        digest.update((HERE / header).read_bytes())
    library = Path(folder) / f"cuda-text-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        code, part = (library.with_suffix(f".{os.getpid()}{suffix}") for suffix in (".cpp", ".part"))
        code.write_text(text)
        command = ["g++", *FLAGS, f"-I{HERE}", "-o", str(part), str(code)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"g++ doesn't take the CUDA text in {code}:\n{done.stderr[:4000]}")
        code.unlink()
        part.replace(library)
    loaded = ctypes.CDLL(str(library))
    return {signature.name: TextKernel(loaded, signature) for signature in signatures}


def _signature(source: str, found: re.Match[str]) -> _Signature:
    bound, name, parameters = found.groups()
    types = []
    for parameter in filter(None, (part.strip() for part in parameters.split(","))):
        kind = re.sub(r"\b(__restrict__|const|volatile)\b", "", parameter.rsplit(" ", 1)[0])
        types.append(" ".join(kind.split()).replace(" *", "*"))
    body = source[found.end() : source.index("\n}", found.end())]
    # Not where only one lane writes, for all to read behind a barrier.
    lockstep = bool(re.search(r"\(volatile \w+\s*\*\)\s*\w+\)\[[^\]]*threadIdx", body))
    return _Signature(name, types, int(bound or 1024), bool(_WAITS.search(body)), lockstep)


def _wrapper(signature: _Signature) -> str:
    name, types = signature.name, signature.types
    values = ", ".join(f"*({kind}*)params[{index}]" for index, kind in enumerate(types))
    waits = str(signature.waits).lower()
    return f"""
static void shim_call_{name}(void **params) {{ {name}({values}); }}
extern "C" const char *shim_run_{name}(const unsigned *grid, const unsigned *block, unsigned shared,
                                       void **params) {{
    return shim::launch(grid, block, shared, shim_call_{name}, params, {waits});
}}"""
