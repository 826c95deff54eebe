"""Where a model on a GPU has its tensors: device memory, and arrays of the host that calls are built in."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, Final

from numpy.typing import NDArray

from kvc.artifact import Artifact
from kvc.runtime.cuda import Device, load_cudart, load_tvm_cuda
from kvc.runtime.graphs import Graphs, Key
from kvc.runtime.host_memory import Region, Shapes, mapped, padded
from kvc.runtime.library import load_runtime, load_vm
from kvc_passes.errors import InputError, TargetError

_CUDA: Final = 2


class DeviceMemory:
    """Implements executor.Memory on the first GPU.

    Raises TargetError if the GPU or its driver cannot run the code, or has not enough free memory (nothing is
    allocated then), InputError if library or weights cannot be loaded.
    """

    def __init__(self, artifact: Artifact, inputs: Shapes, pools: Shapes) -> None:
        device = Device.find()
        arch = device.choose(tuple(artifact.plan.target["archs"]))
        counted = artifact.plan.bytes
        needed = counted.total - counted.runtime
        if needed > device.free:
            raise TargetError(
                f"the model needs {needed} bytes of device memory, {device.free} of {device.total} are free: "
                "free some, or compile it with a smaller --budget"
            )
        load_tvm_cuda()
        self._ffi = load_runtime(1)
        self.vm = load_vm(artifact.path / f"model.{arch}.so", 1, device=_CUDA)
        region = Region(sum(padded(*each) for each in inputs.values()))
        self.arrays = {name: region.array(*each) for name, each in inputs.items()}
        get = self._ffi.get_global_func
        self._allocate = get("runtime.TVMTensorAllocWithScope")
        self._view = get("runtime.TVMTensorCreateView")
        self._to_device = get("runtime.TVMTensorCopyFromBytes")
        self._to_host = get("runtime.TVMTensorCopyToBytes")
        self._device = self._ffi.device("cuda:0")
        # Of our own: what the default stream does cannot be recorded as a graph.
        self._stream = get("runtime.Device_StreamCreate")(self._device)
        self._use_stream = get("runtime.Device_SetStream")
        self._wait = get("runtime.Device_StreamSync")
        self._graphs = Graphs(load_cudart(), self._stream)
        self._inputs = {name: self._tensor(*each) for name, each in inputs.items()}
        # Not zeroed: kernels read no key or value that was not written.
        self.pools = [self._tensor(*each) for each in pools.values()]
        self.weights: list[Any] = []
        for spec, raw in mapped(artifact.path / "weights.safetensors", artifact.layout()):
            tensor = self._tensor(spec.dtype, spec.shape)
            self._to_device(tensor, _pointer(raw), raw.nbytes)
            self.weights.append(tensor)

    def give(self, name: str, count: int) -> Any:
        """The first `count` rows of an input, on the device."""
        tensor, array = self.place(name, count), self.arrays[name][:count]
        self._to_device(tensor, _pointer(array), array.nbytes)
        return tensor

    def shaped(self, name: str, shape: tuple[int, ...]) -> Any:
        """The first elements of an input of one dimension, on the device as a tensor of another shape."""
        tensor, array = self._viewed(name, shape), self.arrays[name][: math.prod(shape)]
        self._to_device(tensor, _pointer(array), array.nbytes)
        return tensor

    def place(self, name: str, count: int) -> Any:
        """The first `count` rows of what the function writes."""
        return self._viewed(name, (count, *self.arrays[name].shape[1:]))

    def _viewed(self, name: str, shape: tuple[int, ...]) -> Any:
        dtype = self._ffi.dtype(str(self.arrays[name].dtype))
        return self._view(self._inputs[name], self._ffi.Shape(shape), dtype, 0)

    def take(self, name: str, count: int) -> NDArray[Any]:
        """What the function wrote there."""
        array = self.arrays[name][:count]
        self._to_host(self.place(name, count), _pointer(array), array.nbytes)
        return array

    def read(self, tensor: Any, array: NDArray[Any]) -> None:
        """Copy a tensor into an array of the host, of its type and shape."""
        self._to_host(tensor, _pointer(array), array.nbytes)

    def run(self, function: Any, arguments: Sequence[Any], shape: Key | None) -> Any:
        """Call a function and wait for it; calls of the same `shape` become a CUDA graph.

        What it returns, if `shape` is None.
        """
        self._use_stream(self._device, self._stream)  # another model may have set its own
        result = None
        if shape is None:
            result = function(*arguments)
        else:
            self._graphs.run(shape, lambda: function(*arguments))
        self._wait(self._device, self._stream)
        return result

    def close(self) -> None:
        """Free what was recorded."""
        self._graphs.close()

    def _tensor(self, dtype: str, shape: tuple[int, ...]) -> Any:
        try:
            return self._allocate(self._ffi.Shape(shape), self._ffi.dtype(dtype), self._device, None)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"device memory for {shape} of {dtype} cannot be had ({reason})") from None


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
