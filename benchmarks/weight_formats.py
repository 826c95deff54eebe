"""How fast products with weights of every format are, against float32: one row, eight rows, a prefill.

Kernels alone, with shapes of SmolLM2-135M. The weights come from memory: every call has another copy, of
more bytes together than the caches have. One thread, in its CPU time, so that a busy machine disturbs little;
formats take turns, and the best of the repeats counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import destination, show, write_results

SHAPES = {"mlp": (1536, 576), "logits": (49152, 576)}
ROWS = (1, 8, 512)
_CACHES = 160 * 10**6
"""Bytes of copies of a weight that no cache holds."""


def main() -> int:
    result = argparse.ArgumentParser(description=(__doc__ or "").strip())
    result.add_argument("--output", type=Path, help="the JSON file (benchmarks/results/weight_formats.json)")
    result.add_argument("--quick", action="store_true", help="a short run that only shows that it works")
    result.add_argument("--repeats", type=int, default=5)
    options = result.parse_args()
    # Before TVM is imported: it reads them once.
    os.environ.update(TVM_NUM_THREADS="1", TVM_BIND_THREADS="0")
    repeats = 1 if options.quick else options.repeats
    targets = {
        name: {shape: _measure(target, *SHAPES[shape], repeats) for shape in SHAPES}
        for name, target in _targets().items()
    }
    body = {
        "shapes": {name: {"outputs": n, "inputs": k} for name, (n, k) in SHAPES.items()},
        "threads": 1,
        "clock": "CPU time of the thread",
        "repeats": repeats,
        "targets": targets,
    }
    path = write_results("weight_formats", body, destination(options, "weight_formats"))
    for target, shapes in targets.items():
        for shape, formats in shapes.items():
            rows = [
                (name, *(f"{one['rows'][str(m)]['speed_vs_float32']:.2f}" for m in ROWS))
                for name, one in formats.items()
            ]
            columns = ["format", *(f"{m} rows" for m in ROWS)]
            show(f"{shape} on {target}: times as fast as float32", columns, rows)
    print(f"written: {path.name}")
    return 0


def _targets() -> dict[str, Any]:
    """This machine's target, and AVX2 where the machine is wider."""
    from tvm.target import Target

    from kvc.kernels.traits import CpuTraits, default_target

    own = default_target()
    found = {str(own.attrs["mcpu"]): own}
    if CpuTraits.of(own).lanes == 16:
        found["x86-64-v3"] = Target({**dict(own.export()), "mcpu": "x86-64-v3"})
    return found


def _formats() -> dict[str, Any]:
    from kvc_passes.weight_format import WeightFormat

    return {
        "float32": WeightFormat(),
        "float16": WeightFormat("float16"),
        "bfloat16": WeightFormat("bfloat16"),
        "uint8, block 32": WeightFormat("uint8", 32, "float16"),
        "uint8, a column's scale and zero": WeightFormat("uint8", 2**20, zeros=True),
        "uint4, block 32": WeightFormat("uint4", 32, "float16"),
        "uint4, block 32, zeros": WeightFormat("uint4", 32, "float16", zeros=True),
    }


def _measure(target: Any, n: int, k: int, repeats: int) -> dict[str, Any]:
    """Every format's bytes, and microseconds for each number of rows."""
    import numpy as np
    from tvm import runtime

    from kvc.kernels.emit import compiled
    from kvc.kernels.matmul import packed_matmul
    from kvc.kernels.packing import packed_tensors
    from kvc.kernels.traits import CpuTraits

    traits, rng = replace(CpuTraits.of(target), threads=1), np.random.default_rng(0)
    weights, kernels, sizes = {}, {}, {}
    for name, format in _formats().items():
        kernels[name] = compiled(packed_matmul(n, k, traits, format=format), target)
        packed = [_random(t.dtype, t.shape, rng) for t in packed_tensors(n, k, format, traits.lanes)]
        sizes[name] = sum(array.nbytes for array in packed)
        copies = -(-_CACHES // sizes[name])
        weights[name] = [[runtime.tensor(array) for array in packed] for _ in range(copies)]
    found: dict[str, Any] = {name: {"bytes": sizes[name], "rows": {}} for name in kernels}
    for m in ROWS:
        x = runtime.tensor(rng.standard_normal((1, m, k)).astype(np.float32))
        y = runtime.tensor(np.zeros((1, m, n), np.float32))
        times: dict[str, list[float]] = {name: [] for name in kernels}
        calls = 1 if m > 64 else 16  # about as many as copies of the smallest weight that no cache holds
        for _ in range(repeats):
            for name, kernel in kernels.items():
                for turn in range(0, len(weights[name]), calls):
                    some = weights[name][turn : turn + calls]
                    start = time.thread_time()
                    for copy in some:
                        kernel(x, *copy, y)
                    times[name].append((time.thread_time() - start) / len(some))
                    if m > 64:
                        break
        for name, seconds in times.items():
            found[name]["rows"][str(m)] = {
                "microseconds_best": round(min(seconds) * 1e6, 1),
                "microseconds_median": round(statistics.median(seconds) * 1e6, 1),
                "gflops": round(2 * m * n * k / min(seconds) / 1e9, 1),
                "speed_vs_float32": round(min(times["float32"]) / min(seconds), 2),
            }
    return found


def _random(dtype: str, shape: tuple[int, ...], rng: Any) -> Any:
    import numpy as np

    if dtype == "uint8":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    values = rng.standard_normal(shape, dtype=np.float32) / 16
    if dtype == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16)
    return values.astype(dtype)


if __name__ == "__main__":
    sys.exit(main())
