"""Runs Triton kernels on the CPU, in a process of its own: Triton either interprets or compiles."""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
import traceback
from functools import cache
from typing import Any, BinaryIO

from kvc.kernels.cuda.device import DeviceKernel

WRITTEN = {
    "append": ("xpool", "kpool", "vpool", "kscale", "vscale"),
    "decode": ("part",),
    "merge": ("out",),
    "prefill": ("out",),
}
WRITTEN |= {"product": ("y",), "boxed": ("y",), "head_product": ("y",), "embedding": ("y",)}
WRITTEN |= {"peaks": ("parts",), "choose": ("logits", "chosen")}
"""Parameters that each function writes."""


def run(kernel: DeviceKernel, grid: tuple[int, ...], *arguments: Any) -> None:
    """Launch a kernel on tensors of the CPU and numbers, in the order of `kernel.types`.

    What it gets boxes of is given as a matrix.
    """
    names = [name for name, _ in kernel.types]
    values = dict(zip(names, arguments, strict=True))
    process = _process()
    assert process.stdin is not None
    assert process.stdout is not None
    _send(process.stdin, (kernel, grid, values))
    results = pickle.load(process.stdout)
    if isinstance(results, str):
        raise AssertionError(f"{kernel.name} failed\n{results}")
    for name, result in results.items():
        values[name].copy_(result)


@cache
def _process() -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(process.kill)
    return process


def _send(stream: BinaryIO, value: Any) -> None:
    pickle.dump(value, stream)
    stream.flush()


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    while True:
        try:
            kernel, grid, values = pickle.load(requests)
        except EOFError:
            return
        try:
            kernel.load()[grid](**_described(kernel, values), **dict(kernel.constants))
            _send(
                answers,
                {name: values[name] for name in WRITTEN[kernel.function.split(".")[-1]] if name in values},
            )
        except Exception:
            _send(answers, traceback.format_exc())


def _described(kernel: DeviceKernel, values: dict[str, Any]) -> dict[str, Any]:
    """The values with descriptors of the matrices that the kernel gets boxes of."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from kvc.kernels.cuda import boxes

    shapes = {name: boxes.shape_of(kind) for name, kind in kernel.types if boxes.is_matrix(kind)}
    made = {name: TensorDescriptor.from_tensor(values[name], list(box)) for name, box in shapes.items()}
    return values | made


if __name__ == "__main__":
    import torch

    from pretend_gpu.interpreter import hasten

    torch.set_num_threads(1)
    hasten()
    _serve(sys.stdin.buffer, sys.stdout.buffer)
