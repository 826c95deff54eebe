"""The Python side of the pretend GPU: what runs when a kernel is launched."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Grid = tuple[int, int, int]


class _Launch(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint)]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_Launch), ctypes.POINTER(ctypes.c_void_p)
)


class Launched(NamedTuple):
    """An entry of the log."""

    name: str
    grid: Grid
    block: Grid
    shared: int


class TensorMap(NamedTuple):
    """A decoded tensor map, its axes in the order of a row-major array: the fastest is the last one."""

    base: int
    type: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In bytes, without the last axis's."""
    box: tuple[int, ...]
    steps: tuple[int, ...]
    interleave: int
    swizzle: int
    promotion: int
    fill: int


class Params:
    """The parameters of a launch."""

    def __init__(self, driver: ctypes.CDLL, base: int) -> None:
        self.base = base
        """The address of the array of addresses of the values."""
        self._driver = driver

    def raw(self, index: int, size: int) -> bytes:
        """The bytes of a parameter."""
        address = ctypes.c_void_p.from_address(self.base + 8 * index).value
        if address is None:
            raise ValueError(f"parameter {index} is missing")
        return ctypes.string_at(address, size)

    def i32(self, index: int) -> int:
        return int.from_bytes(self.raw(index, 4), "little", signed=True)

    def i64(self, index: int) -> int:
        return int.from_bytes(self.raw(index, 8), "little", signed=True)

    def f32(self, index: int) -> float:
        return float(struct.unpack("<f", self.raw(index, 4))[0])

    def address(self, index: int) -> int:
        """A pointer, which may be null."""
        return int.from_bytes(self.raw(index, 8), "little")

    def extent(self, index: int) -> int:
        """The bytes from a pointer to the end of its block; an error unless it is device memory."""
        return self._extent(self.address(index), f"parameter {index}")

    def array(self, index: int, dtype: Any) -> np.ndarray:
        """The memory from a pointer to the end of its block, in place."""
        return self.memory(self.address(index), dtype, f"parameter {index}")

    def memory(self, address: int, dtype: Any, what: str = "a tensor map's base") -> np.ndarray:
        """The memory from an address of the device to the end of its block, in place."""
        kind = np.dtype(dtype)
        if address % kind.itemsize:
            raise ValueError(f"{what} is not aligned for {kind}: {address:#x}")
        size = self._extent(address, what) // kind.itemsize * kind.itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(address), kind)

    def tensor_map(self, index: int) -> TensorMap:
        """A tensor map that is passed by value."""
        raw = self.raw(index, 128)
        if raw[:4] != b"TMAP":
            raise ValueError(f"parameter {index} is no tensor map")
        kind, rank, interleave, swizzle, promotion, fill = raw[4:10]
        steps, box = raw[10 : 10 + rank], struct.unpack_from("<5H", raw, 16)[:rank]
        base, *rest = struct.unpack_from("<10Q", raw, 32)
        shape, strides = rest[:rank], rest[5 : 4 + rank]
        orders = (tuple(reversed(axis)) for axis in (shape, strides, box, steps))
        return TensorMap(base, kind, *orders, interleave, swizzle, promotion, fill)

    def _extent(self, address: int, what: str) -> int:
        extent = int(self._driver.pretend_extent(address))
        if not extent:
            raise ValueError(f"{what} is no device memory: {address:#x}")
        return extent


Call = Callable[[Grid, Grid, int, Params], None]


class Launches:
    """Says what each kernel does, and keeps what happened."""

    def __init__(self, driver: ctypes.CDLL) -> None:
        self.log: list[Launched] = []
        self.calls: dict[str, Call] = {}
        self.driver = driver
        self._errors: list[BaseException] = []
        self._callback = _Callback(self._launched)  # kept alive for the driver
        driver.pretend_on_launch(self._callback)

    def add(self, name: str, call: Call, sizes: Sequence[int] | None = None) -> None:
        """Runs `call(grid, block, shared, params)` for the kernel `name`.

        `sizes`, or `call.sizes`, are those of the parameters in bytes. They are checked against the cubin's;
        captures and deferred work need them where the code can't be read.
        """
        self.calls[name] = call
        known = getattr(call, "sizes", None) if sizes is None else sizes
        if known is not None:
            self.driver.pretend_declare(name.encode(), len(known), (ctypes.c_int * len(known))(*known))

    def check(self) -> None:
        """Raises the first exception of a launch, or what the driver has to complain about."""
        errors, self._errors = self._errors, []
        count = self.driver.pretend_check()
        problems = self.driver.pretend_problems().decode()
        self.driver.pretend_forget()
        if errors:
            raise errors[0]
        if count:
            raise AssertionError(f"the pretend GPU reports:\n{problems}")

    def _launched(self, name: bytes, launch: Any, params: Any) -> int:
        try:
            text = name.decode()
            grid, block = tuple(launch.contents.grid), tuple(launch.contents.block)
            self.log.append(Launched(text, grid, block, launch.contents.shared))
            if text not in self.calls:
                raise KeyError(f"no call for the kernel {text}")
            base = ctypes.cast(params, ctypes.c_void_p).value
            assert base is not None
            self.calls[text](grid, block, launch.contents.shared, Params(self.driver, base))
        except BaseException as error:  # ctypes would print and drop it
            self._errors.append(error)
            return 1
        return 0


_TYPES = {"fp16": "<f2", "fp32": "<f4", "i1": "i1", "i8": "i1", "i16": "<i2", "i32": "<i4", "i64": "<i8"}
_TYPES |= {"u8": "u1", "u16": "<u2", "u32": "<u4", "u64": "<u8", "fp64": "<f8", "bf16": "<u2"}
_SCALARS = {"i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "fp32": "<f"}
_MAP_TYPES = {"fp16": 6, "bf16": 9, "fp32": 7}
"""Of CUtensorMapDataType."""
_SWIZZLES = {32: 1, 64: 2, 128: 3}
"""Of CUtensorMapSwizzle, by the bytes of a row of what one copy brings: 128 at most."""
_DESCRIPTOR = re.compile(r"tensordesc<(\w+)\[([\d, ]+)\]")


def run_triton(function: Any, types: Sequence[tuple[str, str]], constants: Mapping[str, Any]) -> Call:
    """Runs a Triton kernel in Triton's interpreter.

    `types` are the parameters at run time in their order, with Triton's names of types ("*fp16", "i32",
    "tensordesc<fp16[128, 64]>"); `constants` the others. The environment needs TRITON_INTERPRET=1 before
    Triton is imported. A tensor reaches the kernel as all of the memory from its pointer to its block's end.
    """
    import torch

    if not hasattr(function, "rewriter"):
        raise TypeError(f"{function} was made without TRITON_INTERPRET=1")
    sizes: list[int] = []
    for name, kind in types:
        if found := _DESCRIPTOR.match(kind):
            rank = found[2].count(",") + 1
            sizes += [128, *[4] * rank, *[8] * rank]
        elif kind[0] == "*":
            if kind[1:] not in _TYPES:
                raise ValueError(f"{name}: no type {kind}")
            sizes.append(8)
        else:
            sizes.append(struct.calcsize(_SCALARS[kind]))

    def tensor(params: Params, address: int, kind: str, what: str) -> torch.Tensor | None:
        if not address:
            return None
        array = torch.from_numpy(params.memory(address, _TYPES[kind], what))
        return array.view(torch.bfloat16) if kind == "bf16" else array

    def descriptor(params: Params, index: int, kind: str, box: list[int]) -> Any:
        from triton.tools.tensor_descriptor import TensorDescriptor

        encoded = params.tensor_map(index)
        rank = len(box)
        shape = [params.i32(index + 1 + axis) for axis in range(rank)]
        strides = [params.i64(index + 1 + rank + axis) for axis in range(rank)]
        base = tensor(params, encoded.base, kind, "a tensor map's base")
        assert base is not None
        size = base.element_size()
        inner = [stride * size for stride in strides[:-1]]
        copied = [*box[:-1], min(box[-1], 128 // size)]
        wanted = (_MAP_TYPES[kind], copied, _SWIZZLES[copied[-1] * size], [1] * rank, 0, 0)
        given = (encoded.type, list(encoded.box), encoded.swizzle, list(encoded.steps))
        if (*given, encoded.interleave, encoded.fill) != wanted:
            raise ValueError(f"a tensor map {encoded} for a kernel that copies {wanted}")
        if list(encoded.shape) != shape or list(encoded.strides) != inner or strides[-1] != 1:
            raise ValueError(f"a tensor map {encoded} with the shape {shape} and the strides {strides}")
        return TensorDescriptor(base.as_strided(shape, strides), shape, strides, box)

    def call(grid: Grid, block: Grid, shared: int, params: Params) -> None:
        arguments, index = {}, 0
        for name, kind in types:
            if found := _DESCRIPTOR.match(kind):
                box = [int(size) for size in found[2].split(",")]
                arguments[name] = descriptor(params, index, found[1], box)
                index += 2 * len(box)
            elif kind[0] == "*":
                arguments[name] = tensor(params, params.address(index), kind[1:], name)
            else:
                raw = params.raw(index, sizes[index])
                arguments[name] = struct.unpack(_SCALARS[kind], raw)[0]
            index += 1
        # Compiled kernels have two more parameters, for scratch memory that ours don't need.
        if params.address(index) or params.address(index + 1):
            raise ValueError("the hidden pointers to scratch memory must be null")
        function[grid](**arguments, **constants)

    call.sizes = [*sizes, 8, 8]  # type: ignore[attr-defined]
    return call
