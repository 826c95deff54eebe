"""TVM's runtime library, without its compiler.

A process that runs a model needs libtvm_runtime.so (5 MB), not the tvm package with libtvm_compiler.so
(200 MB). Loading the one first does not hinder a later `import tvm`, and the other way round.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from kvc_passes.errors import InputError, TargetError

# CPU flags as /proc/cpuinfo names them, of the extensions that LLVM may use in code for an mcpu.
_V2: Final = frozenset({"cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"})
_V3: Final = _V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
_V4: Final = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_CASCADE: Final = _V4 | {"avx512_vnni"}
_ICE_VECTORS: Final = {"avx512vbmi", "avx512_vbmi2", "avx512ifma", "avx512_bitalg", "avx512_vpopcntdq"}
_ICE: Final = _CASCADE | _ICE_VECTORS | {"gfni", "vaes", "vpclmulqdq"}
_RAPIDS: Final = _ICE | {"avx512_bf16", "avx512_fp16", "avx_vnni"}

_FEATURES: Final[dict[str, frozenset[str]]] = {
    **dict.fromkeys(["x86-64", "generic"], frozenset()),
    **dict.fromkeys(["x86-64-v2", "nehalem", "westmere", "silvermont", "goldmont", "tremont"], _V2),
    **dict.fromkeys(["x86-64-v3", "haswell", "broadwell", "skylake", "znver1", "znver2", "znver3"], _V3),
    **dict.fromkeys(
        ["alderlake", "raptorlake", "meteorlake", "gracemont", "sierraforest"], _V3 | {"avx_vnni"}
    ),
    **dict.fromkeys(["x86-64-v4", "skylake-avx512"], _V4),
    "cascadelake": _CASCADE,
    "cooperlake": _CASCADE | {"avx512_bf16"},
    **dict.fromkeys(["icelake-client", "icelake-server", "tigerlake", "rocketlake"], _ICE),
    **dict.fromkeys(["sapphirerapids", "emeraldrapids", "graniterapids"], _RAPIDS),
    "znver4": _ICE | {"avx512_bf16"},
    "znver5": _ICE | {"avx512_bf16", "avx_vnni", "avx512_vp2intersect"},
}
_KNOWN: Final = frozenset().union(*_FEATURES.values())
# LLVM's name: the kernel's. They differ by underscores and dots, and in these.
_KERNEL_NAMES: Final = {name.replace("_", ""): name for name in _KNOWN} | {"lzcnt": "abm", "bmi": "bmi1"}

DEVICE_CPU: Final = 1
_POOLED_ALLOCATOR: Final = 2


def required_features(target: dict[str, Any]) -> frozenset[str]:
    """The CPU flags, as in /proc/cpuinfo, that code for `target` (a plan's) may use.

    They come from "mcpu" and from "mattr" (["+avx512f"]). An mcpu that is not in the table adds none: then
    only the features in "mattr" are known. Features that say nothing about vector code are left out.
    """
    features = set(_FEATURES.get(str(target.get("mcpu", "generic")), frozenset()))
    for attribute in target.get("mattr") or ():
        name = _KERNEL_NAMES.get(attribute[1:].replace(".", ""))
        if name is not None:
            (features.add if attribute.startswith("+") else features.discard)(name)
    return frozenset(features)


def check_cpu(target: dict[str, Any], cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Raise TargetError if this machine cannot execute code for `target`, rather than die in the middle."""
    machine = platform.machine()
    wanted = str(target.get("mtriple", machine)).split("-")[0]
    if wanted.replace("amd64", "x86_64") != machine:
        raise TargetError(
            f"the model was compiled for {wanted}, this machine is {machine}: compile it again here"
        )
    if machine != "x86_64":
        return
    missing = required_features(target) - _cpu_flags(cpuinfo)
    if missing:
        raise TargetError(
            f"the model was compiled for {target.get('mcpu')}; this CPU lacks {', '.join(sorted(missing))}: "
            "compile it again on this machine, or for a target that it has"
        )


def _cpu_flags(cpuinfo: Path) -> frozenset[str]:
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def thread_count(target: dict[str, Any], wanted: int | None = None) -> int:
    """Threads to run with: `wanted`, or the plan's cores if this process may use as many.

    Raises InputError for more than the plan counts memory of: each has local buffers and a stack.
    """
    available = len(os.sched_getaffinity(0))
    planned = int(target.get("num-cores") or available)
    if wanted is None:
        return max(1, min(planned, available))
    if not 1 <= wanted <= planned:
        raise InputError(
            f"threads={wanted}: the plan counts the memory of {planned}; give 1 to {planned}, or compile the "
            "model where there are more cores"
        )
    return wanted


_SPINS: Final = 5000
"""How often an idle thread of TVM's yields before it sleeps: a millisecond or two. By default it is 300,000
times, and where other processes use the cores every yield takes milliseconds: ending a process then took
minutes."""


def use_threads(threads: int) -> None:
    """Give TVM's pool, which the first compiled call starts, so many threads; by default it may be one."""
    os.environ["TVM_NUM_THREADS"] = str(threads)
    os.environ["TVM_BIND_THREADS"] = "0"  # it would pin the interpreter's thread to core 0
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", str(_SPINS))


def load_runtime(threads: int) -> ModuleType:
    """Load TVM's runtime and return the tvm_ffi module. Raises TargetError if TVM is not installed.

    TVM's thread pool starts with the calling thread's first compiled call; `threads` has no effect on a pool
    that runs already.
    """
    use_threads(threads)
    tvm_ffi = import_ffi()
    runtime_library()
    return tvm_ffi


RESERVE: Final = "reserve_workspaces"
"""The function of a library that makes the memory of kernels' local buffers as large as it gets."""


def load_vm(library: Path, threads: int, device: int = DEVICE_CPU) -> Any:
    """Load compiled functions and return the VM module that holds them: `vm["prefill"](...)`.

    device: DLPack's number of the kind of device that tensors are on. Raises InputError if the library cannot
    be loaded.
    """
    tvm_ffi = load_runtime(threads)
    try:
        # By a name that was loaded before, the system gives the library that stood there then.
        with tempfile.TemporaryDirectory() as folder:
            alias = Path(folder) / library.name
            alias.symlink_to(library.resolve())
            module = tvm_ffi.load_module(alias)
            vm = module["vm_load_executable"]()
            if module.implements_function(RESERVE, query_imports=True):
                module.get_function(RESERVE, query_imports=True)(tvm_ffi.from_dlpack(np.zeros(1, np.float32)))
    except (AttributeError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"{library}: cannot be loaded ({reason}); compile the model again") from None
    # Pooled: buffers stay allocated from call to call.
    host = () if device == DEVICE_CPU else (DEVICE_CPU, 0, _POOLED_ALLOCATOR)
    vm["vm_initialization"](device, 0, _POOLED_ALLOCATOR, *host)
    return vm


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Hide torch from what is imported inside: tvm and tvm_ffi import it where it is (180 MiB, 2 s)."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]


def import_ffi() -> ModuleType:
    """Import tvm_ffi, without torch. Raises TargetError if TVM is not installed."""
    with without_torch():
        try:
            import tvm_ffi
        except ImportError as error:
            raise TargetError(f"TVM's runtime is not installed ({error}): pip install kvc") from None
    module: ModuleType = tvm_ffi
    return module


@functools.cache
def runtime_library() -> ctypes.CDLL:
    """TVM's runtime, without its compiler."""
    return ctypes.CDLL(str(tvm_library("libtvm_runtime.so")), ctypes.RTLD_GLOBAL)


def tvm_library(name: str) -> Path:
    """A library of the installed tvm package, which is not imported for it. Raises TargetError."""
    spec = importlib.util.find_spec("tvm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        library = Path(folder) / "lib" / name
        if library.is_file():
            return library
    raise TargetError(f"{name} was not found: install apache-tvm as kvc's pyproject.toml names it")
