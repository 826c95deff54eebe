"""Registers, shared memory and instructions of the GPU kernels, as they are compiled; needs no GPU.

    python -m benchmarks.kernel_resources [--archs sm_80,sm_90]

Prints docs/performance.md's table: Llama-3-8B's kernels in float16, and attention with large heads.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from kvc.cuda_machine import parse_archs
from kvc.kernels.attention import AttentionShape
from kvc.kernels.cuda import attention, boxes, products
from kvc.kernels.cuda.device import DeviceKernel, compile_kernel
from kvc.kernels.cuda.knobs import BY_ENGINE, BY_THREADS, PrefillKnobs, ProductKnobs
from kvc_passes.weight_format import WeightFormat

SHAPES = {
    "D64": AttentionShape(32, 8, 64, 64, 0.125, kv_dtype="float16", page_size=64),
    "D128": AttentionShape(32, 8, 128, 128, 0.088, kv_dtype="float16", page_size=64),
    "D256": AttentionShape(8, 4, 256, 256, 0.0625, kv_dtype="float16", page_size=64),
}
FORMATS = {"fp16": WeightFormat("float16"), "4 bits": WeightFormat("uint4", 32, "float16", False)}
_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"mma\.sync\.aligned",
    "cp.async": r"cp\.async\.c[ag]",
    "boxes": r"cp\.async\.bulk\.tensor",
}


def kernels(arch: int) -> dict[str, DeviceKernel]:
    """The kernels of the table by name."""
    found: dict[str, DeviceKernel] = {}
    for name, shape in SHAPES.items():
        tile = attention.choose_tile(shape.group, shape.head_dim)
        found[f"prefill {name}"] = attention.prefill_kernel(shape, tile, "float16", arch)
        if boxes.legal(arch):
            engine = PrefillKnobs(copy=BY_ENGINE)
            found[f"prefill {name}, boxes"] = attention.prefill_kernel(shape, tile, "float16", arch, engine)
        found[f"decode {name}"] = attention.decode_kernel(shape, 33, "float16")
        found[f"merge {name}"] = attention.merge_kernel(shape, 33, "float16")
    for name, format in FORMATS.items():
        for copy in (BY_THREADS, BY_ENGINE) if boxes.legal(arch) and not format.coded else (BY_THREADS,):
            for most, kernel, tall, wide in products.product_kernels(
                28672, 4096, format, "float16", "float16", False, arch, knobs=copied_by(copy)
            ):
                rows = "any rows" if most is None else f"up to {most} rows"
                boxed = ", boxes" if copy == BY_ENGINE else ""
                found[f"product {name}, {rows} ({tall} x {wide}){boxed}"] = kernel
    return found


def copied_by(copy: int) -> Callable[[int], ProductKnobs]:
    return lambda most: ProductKnobs(copy=copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--archs", default="sm_80,sm_90")
    archs = parse_archs(parser.parse_args().archs)
    print(
        "| kernel | architecture | registers | shared, KiB | matrix instructions |\n|---|---|---:|---:|---|"
    )
    for arch in archs:
        for name, kernel in kernels(int(arch.removeprefix("sm_"))).items():
            code = compile_kernel(kernel, int(arch.removeprefix("sm_")))
            used = [word for word, pattern in _INSTRUCTIONS.items() if re.search(pattern, code.ptx)]
            cells = (name, arch, str(code.registers), f"{code.shared / 1024:.0f}", ", ".join(used) or "none")
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
