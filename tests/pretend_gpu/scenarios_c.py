"""What test_pretend_gpu.py runs through the C API, each in a process of its own.

Called as `python scenarios_c.py NAME FOLDER`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from pretend_gpu.cuda_text import compile_text
from pretend_gpu.device import DEVICE_TO_HOST, HOST_TO_DEVICE, ONE, Device
from pretend_gpu.launches import Grid, Params


def guards(folder: Path) -> None:
    """Writes out of bounds are found, and named after the kernel."""
    device = Device(folder)

    def call(grid: Grid, block: Grid, shared: int, params: Params) -> None:
        count, start = params.i32(1), params.i32(2)
        ctypes.memset(params.address(0) + start, 1, count)

    device.launches.add("fill", call, [8, 4, 4])
    block = device.new(1000)
    for count, start, error, word in (
        (1000, 0, 0, ""),
        (1001, 0, 700, "fill: a write 0 bytes past a block of 1000 bytes"),
        (4, 1040, 700, "fill: a write 40 bytes past"),
        (4, -8, 700, "fill: a write 8 bytes before"),
    ):
        assert device.launch("fill", [block, ctypes.c_int(count), ctypes.c_int(start)]) == error
        assert word in device.problem()
    assert device.cuda.cudaFree(block) == 0
    assert not device.problem()
    assert device.cuda.cudaFree(block) == 1
    assert "freed before" in device.problem()
    fresh = device.get(device.new(64), np.empty(16, "float32"))
    assert np.isnan(fresh).all(), "memory comes as NaN"


def errors(folder: Path) -> None:
    """What a launch raises is kept; a pointer that isn't the device's is refused."""
    device = Device(folder)
    device.launches.add("read", lambda grid, block, shared, params: params.array(0, "f4").sum(), [8])
    host = np.zeros(4, "float32")
    assert device.launch("read", [ctypes.c_void_p(host.ctypes.data)]) == 719
    assert "is no device memory" in device.problem()
    assert device.launch("read", [device.put(host)]) == 0
    assert device.launch("other", []) == 719
    assert "no call for the kernel other" in device.problem()
    assert device.copy(device.put(host), host.ctypes.data, 17, HOST_TO_DEVICE) == 1
    assert "leaves its block" in device.problem()
    assert device.copy(host.ctypes.data, host.ctypes.data, 8, HOST_TO_DEVICE) == 21


def limits(folder: Path) -> None:
    """Memory, blocks, grids and shared memory end where the machine's do."""
    device = Device(folder)
    device.launches.add("nothing", lambda *_: None, [])
    assert device.launch("nothing", [], block=(1024, 1, 1), grid=(70000, 65535, 1)) == 0
    for grid, block in (((1, 65536, 1), ONE), ((0, 1, 1), ONE), (ONE, (1025, 1, 1)), (ONE, (32, 32, 2))):
        assert device.launch("nothing", [], grid, block) == 1, (grid, block)
    device.driver.pretend_forget()
    assert device.launch("nothing", [], shared=49152) == 0
    assert device.launch("nothing", [], shared=49153) == 1
    assert "49153 bytes of dynamic shared memory" in device.problem()
    function = device.function("nothing")
    assert device.driver.cuFuncSetAttribute(function, 8, 232448) == 0
    assert device.launch("nothing", [], shared=232448) == 0
    assert device.driver.cuFuncSetAttribute(function, 8, 232449) == 1
    os.environ["PRETEND_CC"] = "89"
    assert device.driver.cuFuncSetAttribute(function, 8, 101377) == 1
    count = ctypes.c_int()
    os.environ["PRETEND_DRIVER"] = "12080"
    assert device.cuda.cudaGetDeviceCount(ctypes.byref(count)) == 35
    assert device.cuda.cudaDriverGetVersion(ctypes.byref(count)) == 0
    assert count.value == 12080


def maps(folder: Path) -> None:
    """A tensor map is refused where the engine could not copy by it."""
    device = Device(folder)
    base = device.new(1 << 16)
    room = (ctypes.c_char * 192)()
    out = ctypes.c_void_p((ctypes.addressof(room) + 63) // 64 * 64)

    def encode(
        at: int = 0, width: int = 64, rows: int = 100, pitch: int = 128, box: tuple[int, int] = (64, 128),
        swizzle: int = 3,
    ) -> int:  # fmt: skip
        sizes, strides = (ctypes.c_uint64 * 2)(width, rows), (ctypes.c_uint64 * 1)(pitch)
        place = ctypes.c_void_p((base.value or 0) + at)
        boxes, steps = (ctypes.c_uint32 * 2)(*box), (ctypes.c_uint32 * 2)(1, 1)
        call = device.driver.cuTensorMapEncodeTiled
        return int(call(out, 6, 2, place, sizes, strides, boxes, steps, 0, swizzle, 2, 0))

    assert encode() == 0
    assert not device.problem()
    for refused, why in (
        ({"at": 8}, "aligned to 16 bytes"),
        ({"at": 1 << 17}, "isn't device memory"),
        ({"pitch": 200}, "a tensor map's stride 0 of 200 bytes"),
        ({"box": (64, 257)}, "axis 1: size 100, box 257"),
        ({"box": (128, 64)}, "256 bytes wide, its swizzle 128"),
        ({"rows": 0}, "axis 1: size 0"),
    ):
        assert encode(**refused) == 1, refused  # type: ignore[arg-type]
        assert why in device.problem(), refused


def graph(folder: Path) -> None:
    """A capture records without running; a launch of the graph runs what was recorded."""
    device = Device(folder)

    def call(grid: Grid, block: Grid, shared: int, params: Params) -> None:
        params.array(0, "f4")[:] += params.f32(1)

    device.launches.add("plus", call, [8, 4])
    start = np.arange(4, dtype="float32")
    array, copy = device.put(start), device.put(start)
    captured, exec_ = ctypes.c_void_p(), ctypes.c_void_p()
    cuda, stream = device.cuda, device.stream
    assert cuda.cudaStreamBeginCapture(stream, 0) == 0
    value = ctypes.c_float(2)
    assert device.launch("plus", [array, value]) == 0
    assert device.copy(copy, array, 16, 3) == 0
    value.value = 100  # the graph has its own copy
    assert not device.launches.log
    assert cuda.cudaStreamEndCapture(stream, ctypes.byref(captured)) == 0
    assert cuda.cudaGraphInstantiate(ctypes.byref(exec_), captured, ctypes.c_ulonglong(0)) == 0
    assert cuda.cudaGraphDestroy(captured) == 0
    for count in (1, 2):
        assert cuda.cudaGraphLaunch(exec_, stream) == 0
        np.testing.assert_array_equal(device.get(copy, start), start + 2 * count)
    assert cuda.cudaGraphExecDestroy(exec_) == 0
    assert not device.problem()
    # What may not happen during a capture spoils it.
    assert cuda.cudaStreamBeginCapture(stream, 0) == 0
    assert cuda.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(4)) == 900
    assert cuda.cudaStreamEndCapture(stream, ctypes.byref(captured)) == 901
    assert "cudaMalloc during a capture" in device.problem()


def deferred(folder: Path) -> None:
    """Work that is put off until the host waits shows where it doesn't."""
    device = Device(folder)
    device.driver.pretend_defer(1)
    device.launches.add("plus", lambda g, b, s, params: np.add.at(params.array(0, "f4"), slice(4), 1), [8])
    start = np.arange(4, dtype="float32")
    array, pinned = device.put(start), device.new(16, "cudaHostAlloc")
    start[:] = 7  # pageable memory was read by the call
    view = np.frombuffer((ctypes.c_char * 16).from_address(pinned.value or 0), "float32")
    assert device.launch("plus", [array]) == 0
    assert device.copy(pinned, array, 16, DEVICE_TO_HOST) == 0
    assert np.isnan(view).all()
    assert not device.launches.log
    assert device.cuda.cudaStreamSynchronize(device.stream) == 0
    np.testing.assert_array_equal(view, [1, 2, 3, 4])
    assert device.cuda.cudaFreeHost(pinned) == 0
    assert not device.problem()


def fibers(folder: Path) -> None:
    """Barriers, shuffles and shared memory as a GPU has them, and their misuse."""
    text = """
extern "C" __global__ void __launch_bounds__(64) sums(float* __restrict__ out, int n) {
  extern __shared__ alignas(16) float dynamic[];
  __shared__ float parts[2];
  float x = threadIdx.x;
  for (int by = 16; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  dynamic[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = parts[0] + parts[1] + dynamic[63 - threadIdx.x] * n;
}
extern "C" __global__ void __launch_bounds__(64) some(float* __restrict__ out) {
  float x = 1;
  if (threadIdx.x < 5) {
    unsigned mask = __activemask();
    for (int by = 4; by; by /= 2) x += __shfl_down_sync(mask, x, by);
  }
  out[threadIdx.x] = x;
}
extern "C" __global__ void __launch_bounds__(64) stuck(float* __restrict__ out) {
  if (threadIdx.x < 5) out[0] = __shfl_down_sync(~0u, 1.f, 1);
  __syncthreads();
}
extern "C" __global__ void __launch_bounds__(64) unset(float* __restrict__ out) {
  __shared__ float parts[64];
  if (threadIdx.x != 3) parts[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = parts[threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(64) together(float* __restrict__ out) {
  __shared__ float parts[64];
  ((volatile float*)parts)[((int)threadIdx.x)] = 1;
  __syncthreads();
  if (threadIdx.x < 16) {
    for (int by = 16; by; by /= 2) {
      float x = ((volatile float*)parts)[threadIdx.x] + ((volatile float*)parts)[threadIdx.x + by];
      ((volatile float*)parts)[threadIdx.x] = x;
    }
  }
  __syncthreads();
  out[threadIdx.x] = parts[0];
}
"""
    device = Device(folder)
    kernels = compile_text(text, folder)
    assert [name for name, call in kernels.items() if call.lockstep] == ["together"]
    for name, call in kernels.items():
        device.launches.add(name, call)
    like = np.zeros(128, "float32")
    out = device.put(like)
    assert device.launch("sums", [out, ctypes.c_int(1)], (2, 1, 1), (64, 1, 1), 256) == 0
    right = np.tile(2016 + 63 - np.arange(64), 2)
    np.testing.assert_array_equal(device.get(out, like), right)
    assert device.launch("sums", [out, ctypes.c_int(1)], (2, 1, 1), (64, 1, 1), 252) == 719
    assert "past the dynamic shared memory" in device.problem()
    assert device.launch("some", [out], ONE, (64, 1, 1)) == 0
    assert np.isnan(device.get(out, like)[0]), "adds lanes that take no part"
    assert device.launch("stuck", [out], ONE, (64, 1, 1)) == 719
    assert "wait for lanes that don't come" in device.problem()
    assert device.launch("unset", [out], ONE, (64, 1, 1)) == 0
    assert np.flatnonzero(np.isnan(device.get(out, like)[:64])).tolist() == [3]
    assert device.launch("unset", [out], ONE, (65, 1, 1)) == 719
    assert device.launch("together", [out], ONE, (64, 1, 1)) == 0
    assert (device.get(out, like)[:64] == 32).all()


def rounding(folder: Path) -> None:
    """16-bit types round to nearest even after each operation, as numpy's do."""
    text = """
extern "C" __global__ void __launch_bounds__(256) narrow(half* h, nv_bfloat16* b, float* x, int n) {
  int i = blockIdx.x * 256 + threadIdx.x;
  if (i < n) { h[i] = (half)x[i]; b[i] = (nv_bfloat16)x[i]; }
}
extern "C" __global__ void __launch_bounds__(256) whole(half* h, nv_bfloat16* b, int64_t* x, int n) {
  int i = blockIdx.x * 256 + threadIdx.x;
  if (i < n) { h[i] = (half)x[i]; b[i] = (nv_bfloat16)x[i]; }
}
extern "C" __global__ void __launch_bounds__(256) steps(half* h, nv_bfloat16* b, int n) {
  int i = blockIdx.x * 256 + threadIdx.x;
  if (i < n) { h[i] = (h[i] * h[n] + h[n + 1]) / h[i]; b[i] = (b[i] * b[n] + b[n + 1]) / b[i]; }
}
"""
    device, random, n = Device(folder), np.random.default_rng(0), 100_000
    for name, call in compile_text(text, folder).items():
        device.launches.add(name, call)
    grid, block, count = ((n + 255) // 256, 1, 1), (256, 1, 1), ctypes.c_int(n)
    shorts = np.zeros(n, "uint16")
    half, brain = device.put(shorts), device.put(shorts)

    def results() -> tuple[np.ndarray, np.ndarray]:
        return device.get(half, shorts).view("float16"), device.get(brain, shorts).view(ml_dtypes.bfloat16)

    def same(have: np.ndarray, wanted: np.ndarray) -> None:
        np.testing.assert_array_equal(have.astype("float32"), wanted.astype("float32"))

    wide = random.integers(0, 1 << 32, n, "uint32").view("float32")  # all exponents, NaN and infinity too
    wide[: n // 2] = np.ldexp(random.standard_normal(n // 2), random.integers(-28, 18, n // 2))
    whole = random.integers(-(1 << 62), 1 << 62, n) >> random.integers(0, 62, n)
    with np.errstate(all="ignore"):
        for name, source in (("narrow", wide), ("whole", whole)):
            assert device.launch(name, [half, brain, device.put(source), count], grid, block) == 0
            # numpy rounds integers to float32 before bfloat16: to nearest twice isn't to nearest once.
            exact = source if name == "narrow" else _to_odd(source)
            same(results()[0], source.astype("float16"))
            same(results()[1], exact.astype(ml_dtypes.bfloat16))
        h = random.standard_normal(n).astype("float16")
        b = random.standard_normal(n).astype(ml_dtypes.bfloat16)
        device.copy(half, h.ctypes.data, h.nbytes, HOST_TO_DEVICE)
        device.copy(brain, b.ctypes.data, b.nbytes, HOST_TO_DEVICE)
        few = 256
        assert device.launch("steps", [half, brain, ctypes.c_int(few)], (1, 1, 1), block) == 0
        for have, given in zip(results(), (h, b), strict=True):
            wanted = (given[:few] * given[few] + given[few + 1]) / given[:few]
            same(have[:few], wanted)


def _to_odd(whole: np.ndarray) -> np.ndarray:
    """The integers in float32, rounded so that a further rounding gives what one rounding would."""
    near = whole.astype("float32")
    bits = near.view("uint32")
    exact = [int(value) for value in near]
    for i, value in enumerate(whole.tolist()):
        if exact[i] != value:
            bits[i] = (bits[i] - (abs(exact[i]) > abs(value))) | 1
    return near


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
