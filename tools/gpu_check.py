"""Checks kvc on a GPU, from a folder that tools/gpu_pack.py made: numbers, models, memory, speed.

    python3 PACK/tools/gpu_check.py [--json FILE] [--quick] [--only PART]

Needs numpy; for the speed of peers also PyTorch with CUDA. Parts: kernels, models, memory, bench.
Every kernel runs on fresh random inputs against float64; models against the logits of the CPU's build; device
memory against the plan; the parts that fail are listed at the end, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE / "python"), str(HERE)]

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from tools import gpu_cases as cases  # noqa: E402
from tools.gpu_weights import assembled  # noqa: E402

from kvc.artifact import Artifact  # noqa: E402
from kvc.artifact_writer import ArtifactWriter  # noqa: E402
from kvc.runtime.cuda import Device, load_tvm_cuda, used_bytes  # noqa: E402
from kvc.runtime.executor import Executor  # noqa: E402
from kvc.runtime.library import load_runtime, load_vm  # noqa: E402
from kvc.runtime.sampler import Draw, SamplingParams, choose  # noqa: E402
from kvc.runtime.sequences import Sequences  # noqa: E402
from kvc_passes.errors import TargetError  # noqa: E402

Array = NDArray[Any]
CUDA: Final = 2
UNITS: Final = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half a unit in the last place of a number in 1 .. 2."""
MODEL_LIMIT: Final = 3e-2
"""Largest difference of a logit, times the largest one: activations of 16 bits in tens of layers."""

WAYS: Final = (
    SamplingParams(),
    SamplingParams(temperature=0.8, top_k=50),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=2.0, top_k=5000, top_p=0.7),
    SamplingParams(temperature=1.0),
)
"""How tokens are chosen, in turn."""


class Kernels:
    """A library of single kernels, called with numpy's arrays. Raises TargetError if none runs here."""

    def __init__(self, seed: int, folder: str = "kernels") -> None:
        self.device = Device.find()
        libraries = [p.name.split(".")[1] for p in (HERE / folder).glob("model.*.so")]
        self.arch = self.device.choose(tuple(libraries))
        load_tvm_cuda()
        self.ffi = load_runtime(1)
        self.vm = load_vm(HERE / folder / f"model.{self.arch}.so", 1, device=CUDA)
        self.seed = seed

    def put(self, array: Array, dtype: str) -> Any:
        """An array on the device; float32 numbers as those of a 16-bit type."""
        get, raw = self.ffi.get_global_func, narrowed(array, dtype)
        tensor = get("runtime.TVMTensorAllocWithScope")(
            self.ffi.Shape(raw.shape), self.ffi.dtype(dtype), self.ffi.device("cuda:0"), None
        )
        get("runtime.TVMTensorCopyFromBytes")(tensor, pointer(raw), raw.nbytes)
        return tensor

    def get(self, tensor: Any, dtype: str) -> Array:
        """A tensor of floats as float32."""
        raw = np.empty(tuple(tensor.shape), np.float32 if dtype == "float32" else np.uint16)
        self.ffi.get_global_func("runtime.TVMTensorCopyToBytes")(tensor, pointer(raw), raw.nbytes)
        return widened(raw, dtype)


def pointer(array: Array) -> Any:
    import ctypes

    return ctypes.c_void_p(array.ctypes.data)


def narrowed(array: Array, dtype: str) -> Array:
    """float32 numbers in the bits of a 16-bit type that holds them exactly; other arrays as they are."""
    if dtype == "float16":
        return np.ascontiguousarray(array.astype(np.float16)).view(np.uint16)
    if dtype == "bfloat16":
        return (np.ascontiguousarray(array.astype(np.float32)).view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(array)


def widened(raw: Array, dtype: str) -> Array:
    if dtype == "float32":
        return raw
    if dtype == "float16":
        return raw.view(np.float16).astype(np.float32)
    return (raw.astype(np.uint32) << 16).view(np.float32)


def check_attention(kernels: Kernels, case: cases.AttentionCase, quick: bool) -> dict[str, Any]:
    """Error in units of the output's rounding; weights are rounded to the type before they meet V."""
    tile = json.loads((HERE / "kernels" / "tiles.json").read_text())[case.name]
    decode = case.phase == "decode"
    lengths = [(1, 1), (64, 20), (200, 150)] if quick else [(1, 1), (64, 64), (777, 300), (1500, 129)]
    made = cases.attention_inputs(case, [(n, 1 if decode else new) for n, new in lengths], kernels.seed)
    inputs = dict(made.inputs)
    inputs["tiles"] = tiles_of(inputs["tiles"], tile)
    if decode:
        del inputs["tiles"]
    types = {"positions": "int64", "tiles": "int32", "table": "int32", "cos": "float32", "sin": "float32"}
    given = (kernels.put(array, types.get(name, case.dtype)) for name, array in inputs.items())
    out = kernels.vm[case.name](*given)
    got = kernels.get(out, str(out.dtype))[0]
    scale = np.abs(made.expected).max()
    error = float(np.abs(got - made.expected).max() / (UNITS[case.dtype] * scale))
    return {"name": case.name, "error": error, "limit": 8.0, "passed": bool(error <= 8)}


def tiles_of(whole: Array, tile: int) -> Array:
    """Rows of (table row, first token, tokens), cut into tiles."""
    parts = [
        (row, first + i, min(tile, count - i)) for row, first, count in whole for i in range(0, count, tile)
    ]
    return np.array(parts, np.int32)


def check_product(kernels: Kernels, case: cases.ProductCase, rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(kernels.seed + rows)
    x = cases.rounded(rng.standard_normal((1, rows, case.depth)))
    depth, columns = case.depth, case.columns
    if case.stored:
        bits = 4 if case.stored == "uint4" else 8
        codes = rng.integers(0, 1 << bits, (columns, depth)).astype(np.uint8)
        scales = cases.rounded(rng.uniform(0.5, 1, (columns, depth // 32)) / (1 << bits) / 4)
        weight = (codes.astype(np.float32) - (1 << (bits - 1))) * np.repeat(scales, 32, 1)
        # A kernel rounds the number that a code stands for to the type of x.
        weight = rounded_to(weight, case.dtype)
        tensors = [kernels.put(packed(codes, bits), "uint8"), kernels.put(scales, case.dtype)]
    else:
        weight = cases.rounded(rng.standard_normal((columns, depth)) / 16)
        tensors = [kernels.put(weight, case.dtype)]
    got = kernels.get(kernels.vm[case.name](kernels.put(x, case.dtype), *tensors), case.dtype)[0]
    expected = x[0].astype(np.float64) @ weight.T.astype(np.float64)
    # float32 sums in any order, then one rounding of the result.
    sums = np.sqrt(depth) * 2.0**-22 * (np.abs(x[0]) @ np.abs(weight).T)
    bound = sums + UNITS[case.dtype] * np.abs(expected) * 1.01 + 1e-6
    error = float((np.abs(got - expected) / bound).max())
    return {"name": f"{case.name} x {rows}", "error": error, "limit": 1.0, "passed": bool(error <= 1)}


def rounded_to(x: Array, dtype: str) -> Array:
    """float32 rounded to the nearest number of a type, ties to even."""
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(x).view(np.uint32)
    even = bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    return (even & np.uint32(0xFFFF0000)).view(np.float32)


def packed(codes: Array, bits: int) -> Array:
    """Codes as kvc.kernels.cuda.rows stores them."""
    if bits == 8:
        return codes
    groups = codes.reshape(len(codes), -1, 2, 32)
    return np.ascontiguousarray((groups[:, :, 0] | groups[:, :, 1] << 4).reshape(len(codes), -1))


def artifact_of(folder: Path, work: Path) -> Artifact:
    """The model of a folder of the pack, its weights made."""
    small = np.load(folder / "small.npz")
    items = []
    for entry in json.loads((folder / "recipe.json").read_text()):
        name, dtype = entry["name"], entry["dtype"]
        made_of = entry.get("made_of")
        make = partial(small.__getitem__, name) if made_of is None else partial(assembled, made_of, dtype)
        items.append((name, tuple(entry["shape"]), dtype, make))
    with ArtifactWriter(work / f"{folder.name}.kvc") as writer:
        for file in folder.iterdir():
            if file.suffix == ".so" or file.name in ("plan.json", "facts.json", "kernels.json"):
                writer.copy(file.name, file)
        writer.weights(items)
        writer.commit()
    return Artifact.open(work / f"{folder.name}.kvc", verify=False)


def check_model(folder: Path, work: Path) -> list[dict[str, Any]]:
    """Logits against those of the CPU's build, and the memory that was taken against the plan."""
    before = used_bytes()
    artifact = artifact_of(folder, work)
    start = time.perf_counter()
    executor = Executor(artifact)
    loaded = time.perf_counter() - start
    expected = np.load(folder / "expected.npz")
    lengths = [int(n) for n in expected["lengths"]]
    tokens = [expected[f"tokens{i}"].tolist() for i in range(len(lengths))]
    sequences = Sequences(executor)
    kept = [sequences.open(t) for t in tokens]
    rows = [sequences.prefill(list(zip(kept, lengths))).copy()]
    wrong = wrong_choices(executor, rows[0], 0)
    for step in range(1, len(expected["logits"])):
        rows.append(sequences.decode(kept).copy())
        wrong += wrong_choices(executor, rows[-1], step)
    taken = used_bytes() - before
    executor.close()
    want = expected["logits"]
    error = float(np.abs(np.stack(rows) - want).max() / max(1.0, np.abs(want).max()))
    promised = artifact.plan.bytes.total
    shutil.rmtree(artifact.path)
    return [
        {"name": folder.name, "error": error, "limit": MODEL_LIMIT, "passed": error <= MODEL_LIMIT,
         "load_s": round(loaded, 2)},
        {"name": f"{folder.name}: chosen tokens", "error": wrong, "limit": 0, "passed": not wrong},
        {"name": f"{folder.name}: device bytes", "error": taken, "limit": promised,
         "passed": taken <= promised, "overhead": taken - (promised - artifact.plan.bytes.runtime)},
    ]  # fmt: skip


def wrong_choices(executor: Executor, logits: NDArray[Any], step: int) -> int:
    """How many tokens after a call are not those that the host chooses from its logits [rows, columns]."""
    way = WAYS[step % len(WAYS)]
    draws = [[Draw(way, np.random.default_rng((step, row))) for row in range(len(logits))] for _ in range(2)]
    wanted = choose(logits[:, : executor.facts.vocab].copy(), draws[0])
    return sum(a != b for a, b in zip(executor.choose(draws[1]), wanted))


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    wanted = {options.only} if options.only else {"kernels", "models", "bench"}
    kernels, boxed = Kernels(options.seed), boxed_kernels(options.seed)
    if "kernels" in wanted:
        attention = [c for c in cases.ATTENTION if c.dtype in options.dtypes.split(",")]
        forms = [c for c in cases.FORMS if c.dtype in options.dtypes.split(",")]
        for case in (*attention[:: 4 if options.quick else 1], *forms):
            yield check_attention(kernels, case, options.quick)
            if boxed is not None and case in cases.BOXED_ATTENTION:
                yield in_boxes(check_attention(boxed, case, options.quick))
        products = [c for c in cases.PRODUCTS if c.dtype in options.dtypes.split(",")]
        for product in [c for c in products if not options.quick or "smollm2" in c.name]:
            for rows in (1, 17, 130) if options.quick else (1, 16, 33, 64, 200, 1000):
                yield check_product(kernels, product, rows)
                if boxed is not None and product in cases.BOXED:
                    yield in_boxes(check_product(boxed, product, rows))
    if "models" in wanted:
        with tempfile.TemporaryDirectory() as work:
            for folder in sorted((HERE / "models").iterdir()):
                yield from check_model(folder, Path(work))
    if "bench" in wanted and not options.quick:
        from tools.gpu_bench import bench

        yield from bench(kernels, boxed, HERE)


def boxed_kernels(seed: int) -> Kernels | None:
    """The twins of cases.BOXED and BOXED_ATTENTION that use the copy engine, on a GPU that has one."""
    try:
        return Kernels(seed, "boxed")
    except TargetError:
        return None


def in_boxes(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "name": f"{result['name']}, in boxes"}


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a few small kernels, no measurements")
    parser.add_argument("--dtypes", default="float16,bfloat16")
    parser.add_argument("--only", choices=("kernels", "models", "bench"))
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    device = Device.find()
    about = {
        "gpu": gpu_name(),
        "capability": device.capability,
        "total_bytes": device.total,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "seed": options.seed,
    }
    print(json.dumps(about), flush=True)
    results = []
    for result in run(options):
        results.append(result)
        print(json.dumps(result), flush=True)
        if options.json:
            options.json.write_text(json.dumps({**about, "results": results}, indent=1))
    failed = [r["name"] for r in results if not r.get("passed", True)]
    print(f"{len(results)} results, {len(failed)} failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def gpu_name() -> str:
    """What the driver calls the GPU."""
    import ctypes

    text = ctypes.create_string_buffer(256)
    ctypes.CDLL("libcuda.so.1").cuDeviceGetName(text, 256, 0)
    return text.value.decode()


if __name__ == "__main__":
    sys.exit(main())
