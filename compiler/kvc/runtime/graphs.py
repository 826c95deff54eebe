"""Calls of the same shape as CUDA graphs: one launch for all kernels of a decode step."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

from kvc_passes.errors import Error

MOST: Final = 16
"""Graphs of a function that are kept; further batch sizes launch kernel by kernel."""
Key = tuple[str, int]
"""A function's name and the rows that it is called for."""
_THREAD_LOCAL: Final = 1  # cudaStreamCaptureModeThreadLocal


class Graphs:
    """Records a call when its key comes the second time, and launches the record from then on.

    The first call loads machine code, which must not happen while a graph is recorded. A call must read and
    write the same memory each time. Raises Error where CUDA cannot record or launch.
    """

    def __init__(self, cudart: ctypes.CDLL, stream: int) -> None:
        self._cudart, self._stream = cudart, ctypes.c_void_p(stream)
        self._seen: set[Key] = set()
        self._graphs: dict[Key, ctypes.c_void_p] = {}

    def run(self, key: Key, call: Callable[[], Any]) -> None:
        """Do what `call` does, on the stream; not waited for."""
        if key not in self._graphs:
            if key not in self._seen or sum(name == key[0] for name, _ in self._graphs) == MOST:
                self._seen.add(key)
                call()
                return
            self._graphs[key] = self._record(call)
        self._check("cudaGraphLaunch", self._graphs[key], self._stream)

    def close(self) -> None:
        """Free the graphs."""
        for graph in self._graphs.values():
            self._cudart.cudaGraphExecDestroy(graph)
        self._graphs.clear()

    def _record(self, call: Callable[[], Any]) -> ctypes.c_void_p:
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._check("cudaStreamBeginCapture", self._stream, _THREAD_LOCAL)
        try:
            call()
        finally:  # also ends what an error has spoilt
            ended = self._cudart.cudaStreamEndCapture(self._stream, ctypes.byref(graph))
        if ended:
            raise Error(f"a decode step cannot be recorded as a CUDA graph (error {ended})")
        self._check("cudaGraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        self._check("cudaGraphDestroy", graph)
        return executable

    def _check(self, function: str, *arguments: Any) -> None:
        status = getattr(self._cudart, function)(*arguments)
        if status:
            raise Error(f"{function} fails with CUDA's error {status}")
