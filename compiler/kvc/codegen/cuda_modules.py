"""Triton's machine code as modules that TVM's virtual machine calls."""

from __future__ import annotations

import ctypes
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from kvc_passes.errors import TargetError

from ..kernels.cuda import boxes
from ..kernels.cuda.device import Compiled, DeviceKernel
from ..runtime.cuda import STAND_IN, load_driver, load_tvm_cuda
from .link import find_linker

_DRIVER = (
    *("cuDeviceGetName", "cuFuncSetAttribute", "cuGetErrorName", "cuGetErrorString", "cuLaunchKernelEx"),
    *("cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeTiled"),
)
"""What TVM's CUDA runtime needs of the driver."""
_NO_DEVICE = 100
_TYPES = {"i32": "int32", "i64": "int64", "fp32": "float32"}


def cuda_module(kernel: DeviceKernel, code: Compiled) -> Any:
    """The TVM module that holds one kernel; `prepare` must have been called."""
    types, maps = [], []
    for _, kind in kernel.types:
        parameters = (kind, *boxes.HIDDEN) if boxes.is_matrix(kind) else (kind,)
        types += [_TYPES.get(each, "handle") for each in parameters]
        maps += [int(boxes.is_matrix(each)) for each in parameters]
    types += ["handle", "handle"]
    grid = ["threadIdx.x", "blockIdx.x", "blockIdx.y", "blockIdx.z", "tirx.use_dyn_shared_memory"]
    info = {
        "name": kernel.name,
        "arg_types": types,
        "launch_param_tags": grid,
        "arg_extra_tags": [*maps, 0, 0],  # 1: a tensor map, passed by value
    }
    text = json.dumps({"tvm_version": tvm.__version__, "func_info": {kernel.name: info}})
    functions = tvm_ffi.get_global_func("runtime.LoadMetaDataFromJSON")(text)
    return tvm_ffi.get_global_func("ffi.Module.create.cuda")(code.cubin, "cubin", functions, {})


def prepare() -> None:
    """Make TVM able to create CUDA modules, also where there is no driver.

    TVM's CUDA runtime does not load without libcuda.so.1: where it is missing, a library takes its place
    whose functions all say that there is no GPU. Raises TargetError without a linker or the CUDA runtime.
    """
    if tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None:
        return
    try:
        load_driver()
    except TargetError:
        _load_stand_in()
    load_tvm_cuda()


def _load_stand_in() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "driver.c", Path(folder) / "libcuda.so.1"
        names = (*_DRIVER, STAND_IN)
        source.write_text("".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}\n" for name in names))
        command = [*find_linker(), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise TargetError(f"the C compiler fails:\n{done.stderr.strip()}")
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
