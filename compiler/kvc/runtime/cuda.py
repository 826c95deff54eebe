"""NVIDIA's libraries: where they are, and TVM's CUDA runtime on top of them."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvc_passes.errors import TargetError

from .library import import_ffi, runtime_library, tvm_library

_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76  # cudaDevAttrComputeCapability...
STAND_IN: Final = "kvc_stand_in"
"""A symbol of the library that takes the driver's place where code is only generated."""
_NEEDED_DRIVER: Final = 13000  # of the CUDA runtime that TVM is built with


def package_files(pattern: str) -> Iterator[Path]:
    """Files of NVIDIA's Python packages, such as nvidia-cuda-runtime, that match a glob."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(folder).glob(pattern))


@functools.cache
def load_cudart() -> ctypes.CDLL:
    """The CUDA runtime library. Raises TargetError where there is none."""
    for name in ("libcudart.so.13", *map(str, package_files("*/lib/libcudart.so.13"))):
        try:
            return ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
    raise TargetError("the CUDA runtime (libcudart.so.13) was not found: pip install 'kvc[cuda]'")


def load_driver() -> ctypes.CDLL:
    """NVIDIA's driver. Raises TargetError where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    except OSError:
        raise _no_driver() from None
    if hasattr(driver, STAND_IN):
        raise _no_driver()
    return driver


def _no_driver() -> TargetError:
    return TargetError(
        "this machine has no NVIDIA driver (libcuda.so.1), so it cannot run code for CUDA: run the model "
        "on a machine with a GPU, or compile it with --target cpu"
    )


@functools.cache
def load_tvm_cuda() -> ctypes.CDLL:
    """TVM's CUDA runtime; the driver, or what stands for it, must be loaded. Raises TargetError."""
    import_ffi()
    runtime_library()
    load_cudart()
    try:
        return ctypes.CDLL(str(tvm_library("libtvm_runtime_cuda.so")), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise TargetError(f"TVM's CUDA runtime cannot be loaded ({error})") from None


@dataclass(frozen=True)
class Device:
    """The GPU that models run on: the first that CUDA shows (CUDA_VISIBLE_DEVICES chooses)."""

    capability: tuple[int, int]
    free: int
    """Bytes that can be allocated now."""
    total: int

    @classmethod
    def find(cls) -> Device:
        """Raises TargetError without a GPU, or with a driver that is too old."""
        load_driver()
        cudart = load_cudart()
        version = _number(cudart.cudaDriverGetVersion)
        if 0 < version < _NEEDED_DRIVER:  # 0 where the driver finds no GPU
            raise TargetError(
                f"the NVIDIA driver supports CUDA {_version(version)}; kvc's code needs "
                f"{_version(_NEEDED_DRIVER)}: update the driver"
            )
        count = ctypes.c_int()
        if cudart.cudaGetDeviceCount(ctypes.byref(count)) or count.value < 1:
            raise TargetError("CUDA shows no GPU; is CUDA_VISIBLE_DEVICES right?")
        major, minor = (
            _number(cudart.cudaDeviceGetAttribute, attribute, 0)
            for attribute in (_COMPUTE_MAJOR, _COMPUTE_MINOR)
        )
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        if cudart.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)):
            raise TargetError("the GPU's free memory cannot be read")
        return cls((major, minor), free.value, total.value)

    def choose(self, archs: tuple[str, ...]) -> str:
        """The best of the architectures that code was generated for. Raises TargetError if none runs here."""
        major, minor = self.capability
        # Machine code runs on the same major version with the same or a later minor one.
        fitting = [(int(a[3:-1]), int(a[-1]), a) for a in archs]
        fitting = [x for x in fitting if x[0] == major and x[1] <= minor]
        if not fitting:
            raise TargetError(
                f"this GPU is sm_{major}{minor}, the model was compiled for {', '.join(archs)}: compile it "
                f"again with --target cuda:sm_{major}{minor}"
            )
        return max(fitting)[2]


def used_bytes() -> int:
    """Device memory that is in use on the first GPU, by all processes.

    Asked of NVIDIA's management library, which takes none itself; without it of CUDA, whose context counts.
    Raises TargetError.
    """
    try:
        management = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        device = Device.find()
        return device.total - device.free
    handle, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # total, free, used
    if (
        management.nvmlInit_v2()
        or management.nvmlDeviceGetHandleByIndex_v2(_first_gpu(), ctypes.byref(handle))
        or management.nvmlDeviceGetMemoryInfo(handle, memory)
    ):
        raise TargetError("the GPU's memory cannot be read from libnvidia-ml.so.1")
    return int(memory[2])


def _first_gpu() -> int:
    """The number that the driver gives the first GPU that CUDA shows."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return int(chosen) if chosen.isdigit() else 0


def _number(function: Any, *arguments: int) -> int:
    value = ctypes.c_int()
    if function(ctypes.byref(value), *arguments):
        raise TargetError("the GPU cannot be asked for its properties; is the driver loaded?")
    return value.value


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
