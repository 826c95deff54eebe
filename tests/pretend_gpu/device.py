"""The pretend GPU through the C API, without TVM."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretend_gpu.build import activate, build, runtime
from pretend_gpu.launches import Grid, Launches

ONE = (1, 1, 1)
HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3


class Device:
    """The C API without TVM."""

    def __init__(self, folder: Path) -> None:
        libraries = build(folder)
        self.driver, self.cuda = activate(libraries), runtime(libraries)
        self.launches = Launches(self.driver)
        self.module, self.stream = ctypes.c_void_p(), ctypes.c_void_p()
        assert self.driver.cuModuleLoadData(ctypes.byref(self.module), b"pretend") == 0
        assert self.cuda.cudaStreamCreate(ctypes.byref(self.stream)) == 0

    def new(self, size: int, call: str = "cudaMalloc") -> ctypes.c_void_p:
        out = ctypes.c_void_p()
        more = [ctypes.c_uint(0)] if call == "cudaHostAlloc" else []
        error = self.cuda[call](ctypes.byref(out), ctypes.c_size_t(size), *more)
        assert error == 0, error
        return out

    def put(self, array: np.ndarray) -> ctypes.c_void_p:
        out = self.new(array.nbytes)
        assert self.copy(out, array.ctypes.data, array.nbytes, HOST_TO_DEVICE) == 0
        return out

    def get(self, pointer: ctypes.c_void_p, like: np.ndarray) -> np.ndarray:
        out = np.empty_like(like)
        assert self.copy(out.ctypes.data, pointer, out.nbytes, DEVICE_TO_HOST) == 0
        return out

    def copy(self, to: Any, source: Any, size: int, kind: int) -> int:
        pointers = [
            each if isinstance(each, ctypes.c_void_p) else ctypes.c_void_p(each) for each in (to, source)
        ]
        return int(self.cuda.cudaMemcpyAsync(*pointers, ctypes.c_size_t(size), kind, self.stream))

    def function(self, name: str) -> ctypes.c_void_p:
        out = ctypes.c_void_p()
        assert self.driver.cuModuleGetFunction(ctypes.byref(out), self.module, name.encode()) == 0
        return out

    def launch(
        self, name: str, values: Sequence[Any], grid: Grid = ONE, block: Grid = ONE, shared: int = 0
    ) -> int:
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        dims = [ctypes.c_uint(size) for size in (*grid, *block, shared)]
        return int(self.driver.cuLaunchKernel(self.function(name), *dims, self.stream, addresses, None))

    def problem(self) -> str:
        try:
            self.launches.check()
        except Exception as error:
            return str(error)
        return ""
