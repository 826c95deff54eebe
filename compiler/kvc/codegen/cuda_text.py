"""Machine code from the CUDA text that TVM generates, by NVIDIA's run-time compiler; no GPU is needed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import tvm_ffi

from kvc_passes.errors import TargetError

from ..runtime.cuda import package_files

_CALLBACK = "tvm_callback_cuda_compile"


def compile_text(source: str, arch: str) -> bytes:
    """The cubin of CUDA text for one architecture, such as "sm_90".

    Raises TargetError without the compiler, or with its messages if it refuses the text.
    """
    compiler = _compiler()
    options = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device"]
    options += [f"--include-path={folder}" for folder in _includes()]
    program = ctypes.c_void_p()
    _check(compiler.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kvc.cu", 0, None, None))
    try:
        values = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if compiler.nvrtcCompileProgram(program, len(options), values):
            log = _text(compiler.nvrtcGetProgramLogSize, compiler.nvrtcGetProgramLog, program)
            lines = "\n".join(log.rstrip(b"\0").decode(errors="replace").splitlines()[:12])
            raise TargetError(f"NVIDIA's compiler refuses generated code for {arch}:\n{lines}")
        return _text(compiler.nvrtcGetCUBINSize, compiler.nvrtcGetCUBIN, program)
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


@contextlib.contextmanager
def compiling(function: Callable[[str], bytes]) -> Iterator[None]:
    """Let TVM compile CUDA text by `function`."""
    before = tvm_ffi.get_global_func(_CALLBACK, allow_missing=True)
    tvm_ffi.register_global_func(_CALLBACK, function, override=True)
    try:
        yield
    finally:
        if before is not None:
            tvm_ffi.register_global_func(_CALLBACK, before, override=True)


@functools.cache
def _compiler() -> ctypes.CDLL:
    for name in (*map(str, package_files("*/lib/libnvrtc.so.13")), "libnvrtc.so.13"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise TargetError("code for CUDA needs NVIDIA's compiler (libnvrtc.so.13): pip install 'kvc[cuda]'")


@functools.cache
def _includes() -> tuple[str, ...]:
    """Folders with cuda_fp16.h and with CUDA's C++ library."""
    wanted = ("*/include/cuda_fp16.h", "*/include/cccl/cuda/std/cstdint")
    found = [next(package_files(pattern), None) for pattern in wanted]
    if None in found:
        raise TargetError("CUDA's headers were not found: pip install 'kvc[cuda]'")
    headers, library = (str(path) for path in found)
    return headers.removesuffix("/cuda_fp16.h"), library.removesuffix("/cuda/std/cstdint")


def _text(size: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    length = ctypes.c_size_t()
    _check(size(program, ctypes.byref(length)))
    buffer = ctypes.create_string_buffer(length.value)
    _check(get(program, buffer))
    return buffer.raw


def _check(status: int) -> None:
    if status:
        raise TargetError(f"NVIDIA's compiler fails with status {status}")
