"""What test_pretend_gpu.py runs in TVM, each in a process of its own: the pretend driver comes before TVM.

Called as `python scenarios_tvm.py NAME FOLDER`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pretend_gpu.build import activate, build, runtime
from pretend_gpu.cuda_text import compile_text
from pretend_gpu.launches import Launches, run_triton


def load(path: Path) -> Any:
    """A Relax VM over an exported library, on the first GPU."""
    import tvm

    vm = tvm.runtime.load_module(str(path))["vm_load_executable"]()
    cuda, cpu, pooled = 2, 1, 2
    vm["vm_initialization"](cuda, 0, pooled, cpu, 0, pooled)
    return vm


def _run_text(folder: Path, driver: ctypes.CDLL, mod: Any, graphs: bool = False) -> tuple[Launches, Any]:
    """Compiles a module for CUDA; its VM, and launches that run the generated text."""
    import tvm
    import tvm_ffi

    from pretend_gpu import kernels_of_tvm

    texts: list[str] = []

    @tvm_ffi.register_global_func("tvm_callback_cuda_compile", override=True)
    def compiled(text: str) -> bytes:
        texts.append(text)
        return _nvcc(text) if shutil.which("nvcc") else b"pretend"

    target, path = kernels_of_tvm.target(), folder / f"text{os.getpid()}.so"
    with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": graphs}):
        executable = tvm.compile(kernels_of_tvm.scheduled(mod, target), target)
    executable.export_library(str(path))
    launches = Launches(driver)
    for text in texts:
        for name, call in compile_text(text, folder).items():
            launches.add(name, call)
    return launches, load(path)


def _nvcc(text: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "text.cu"), Path(folder, "text.fatbin")
        source.write_text(text)
        command = ["nvcc", "-fatbin", "-arch=sm_90", "-w", "-o", str(out), str(source)]
        subprocess.run(command, check=True)
        return out.read_bytes()


def _near(results: Any, wanted: list[Any], eps: float) -> None:
    for index, (result, right) in enumerate(zip(results, wanted, strict=True)):
        have = result.numpy().astype("float64")
        assert have.shape == right.shape, index
        error = np.abs(have - right) / np.maximum(np.abs(right), 1)
        assert error.max() <= 5 * eps, (index, error.max())  # NaN fails, too


def text_of_tvm(folder: Path, dtype: str = "float32") -> None:
    """Kernels that TVM generated run in the VM, and give what numpy gives."""
    driver = activate(build(folder))
    import tvm

    from pretend_gpu import kernels_of_tvm

    launches, vm = _run_text(folder, driver, kernels_of_tvm.module(dtype))
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    arrays = {
        name: array if name in {"tokens", "cosine", "sine"} else array.astype(kind)
        for name, array in kernels_of_tvm.inputs().items()
    }
    results = vm["main"](*(tvm.runtime.tensor(array, tvm.cuda(0)) for array in arrays.values()))
    eps = {"float32": 2**-23, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    _near(results, kernels_of_tvm.expected(arrays), eps)
    launches.check()
    assert {"rms_norm_kernel", "softmax_kernel", "take_kernel"} <= {each.name for each in launches.log}


def text_of_tvm_in_float16(folder: Path) -> None:
    text_of_tvm(folder, "float16")


def text_of_tvm_in_bfloat16(folder: Path) -> None:
    text_of_tvm(folder, "bfloat16")


def graph_of_the_vm(folder: Path) -> None:
    """The VM captures a graph at the first call, and launches it at later ones."""
    driver = activate(build(folder))
    import tvm

    from pretend_gpu import kernels_of_tvm

    launches, vm = _run_text(folder, driver, kernels_of_tvm.chain(), graphs=True)
    arrays = kernels_of_tvm.inputs()
    x, weight = (tvm.runtime.tensor(arrays[name], tvm.cuda(0)) for name in ("x", "weight"))
    for call in range(3):
        array = arrays["x"] * (call + 1)
        x.copyfrom(array)
        part = _softmax(array.astype("float64"))
        normed = part / np.sqrt((part**2).mean(-1, keepdims=True) + 1e-5) * arrays["weight"]
        _near([vm["main"](x, weight)], [_softmax(normed)], 2**-20)
        assert driver.pretend_graph_launches() == call, "the first call captures"
    launches.check()


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def build_triton(folder: Path) -> None:
    """Compiles the Triton kernels to machine code and exports a Relax module around them."""
    activate(build(folder))
    import tvm

    from pretend_gpu import kernels_of_triton, kernels_of_tvm

    path = folder / "of-triton.so"
    tvm.compile(kernels_of_triton.module(), kernels_of_tvm.target("sm_90a")).export_library(str(path))
    assert b"\x7fELF\x02\x01\x01\x33" in path.read_bytes(), "holds a cubin"


def run_of_triton(folder: Path) -> None:
    """Their cubins are launched by the VM, the interpreter runs them, tensor maps included."""
    os.environ["TRITON_INTERPRET"] = "1"
    launches = Launches(activate(build(folder)))
    import tvm

    from pretend_gpu import kernels_of_triton as kernels

    launches.add("add", run_triton(kernels.add, kernels.ADD, kernels.ADD_CONSTANTS))
    launches.add("dot", run_triton(kernels.dot, kernels.DOT, kernels.DOT_CONSTANTS))
    launches.add("move", run_triton(kernels.move, kernels.MOVE, kernels.MOVE_CONSTANTS))
    vm, random = load(folder / "of-triton.so"), np.random.default_rng(0)

    def call(name: str, *arrays: np.ndarray) -> np.ndarray:
        out = vm[name](*(tvm.runtime.tensor(array, tvm.cuda(0)) for array in arrays))
        launches.check()
        return np.asarray(out.numpy())

    a, b = random.standard_normal((2, 300)).astype("float16")
    b = b.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(call("sum", a, b), (a.astype("float32") + b.astype("float32")) / 2)
    a, b = (random.standard_normal(shape).astype("float16") for shape in ((50, 64), (64, 32)))
    right = a.astype("float32") @ b.astype("float32")
    np.testing.assert_allclose(call("product", a, b).astype("float32"), right, atol=0.02)
    np.testing.assert_array_equal(call("twice", a), 2 * a)
    assert launches.log[1] == ("dot", (2, 1, 1), (128, 1, 1), launches.log[1].shared)

    launches.add("dot", launches.calls["dot"], sizes=[8, 8, 8, 8, 8, 8])
    with pytest.raises(Exception, match="INVALID_VALUE"):  # other parameters than the cubin's
        call("product", a, b)


def other_gpu_of_triton(folder: Path) -> None:
    """A cubin for another GPU isn't loaded."""
    os.environ["PRETEND_CC"] = "80"
    activate(build(folder))
    import tvm

    array = tvm.runtime.tensor(np.zeros((4, 64), "float16"), tvm.cuda(0))
    with pytest.raises(Exception, match="NO_BINARY_FOR_GPU"):
        load(folder / "of-triton.so")["twice"](array)


def memory(folder: Path) -> None:
    """An allocation beyond the device's memory fails in TVM with CUDA's error."""
    libraries = build(folder)
    driver, cuda = activate(libraries), runtime(libraries)
    import tvm

    driver.pretend_set_memory(1 << 20)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    kept = tvm.runtime.empty((600, 1024), "int8", tvm.cuda(0))
    cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    assert (free.value, total.value) == ((1 << 20) - 600 * 1024, 1 << 20)
    with pytest.raises(Exception, match="OUT_OF_MEMORY"):
        tvm.runtime.empty((600, 1024), "int8", tvm.cuda(0))
    assert driver.pretend_current() == driver.pretend_peak() == 600 * 1024
    del kept
    assert driver.pretend_current() == driver.pretend_blocks() == 0


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
