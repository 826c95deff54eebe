"""How the GPU products of few rows fill a GPU: programs, and what they have under way; needs no GPU.

    python -m benchmarks.gpu_programs [--processors 132] [--shared 227]

Prints docs/performance.md's table: layers of Llama-3-8B in 16 bits and narrow ones of small models, in
blocks as they are chosen for sm_90. Nothing is measured here.
"""

from __future__ import annotations

import argparse

from benchmarks.roofline import HALF, PRODUCTS

from kvc.kernels.cuda import products
from kvc_passes.weight_format import WeightFormat

NARROW = {"SmolLM2, attention output": (576, 576), "SmolLM2, down": (1536, 576), "2048 x 8192": (8192, 2048)}
"""Depth and columns."""


def line(name: str, depth: int, columns: int, most: int, processors: int, shared: int) -> str:
    """A row of the table for `most` rows of x; `shared`: bytes of shared memory of a processor."""
    table = products.blocks(columns, depth, WeightFormat("float16"), "float16", 90)
    rows, wide, deep, _, stages = next(row for limit, *row in table if limit == most)
    programs = -(-columns // wide)
    together = shared // (stages * (rows + wide) * deep * HALF)
    ahead = min((stages - 1) * deep, depth) * wide * HALF
    under_way = min(programs, processors * together) * ahead
    x = programs * most * depth * HALF
    cells = (f"{rows} x {wide}", programs, together, f"{ahead / 1024:.0f}")
    sizes = (f"{n / 1e6:.1f}" for n in (under_way, depth * columns * HALF, x))
    return "| " + " | ".join(map(str, (name, most, *cells, *sizes))) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--processors", type=int, default=132)
    parser.add_argument("--shared", type=int, default=227, help="KiB a processor has (%(default)s)")
    options = parser.parse_args()
    heads = ["product", "rows", "block", "programs", "of a processor at once", "KiB of w ahead"]
    print("| " + " | ".join([*heads, "MB of w under way", "MB of w", "MB of x"]) + " |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for name, (depth, columns) in {**PRODUCTS, **NARROW}.items():
        for most in (16, 32, 64):
            print(line(name, depth, columns, most, options.processors, options.shared * 1024))


if __name__ == "__main__":
    main()
