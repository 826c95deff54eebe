"""Measurements of tools/gpu_check.py: kvc's kernels and steps beside PyTorch's, interleaved, in one run."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from tools import gpu_cases as cases

ROUNDS: Final = 7
DECODES: Final = [(1, 2048), (1, 16384), (1, 131072), (8, 16384), (32, 2048), (64, 4096)]
"""Sequences and tokens of each."""
PREFILLS: Final = [1024, 4096, 16384]
ROWS: Final = [1, 8, 32, 64, 512, 4096]


def bench(kernels: Any, boxed: Any, here: Path) -> Iterator[dict[str, Any]]:
    """One result a measurement. Nothing without PyTorch on a GPU.

    boxed: the twins of cases.BOXED and BOXED_ATTENTION, which are timed beside them, or None.
    """
    try:
        import torch
    except ImportError:
        torch = None
    if torch is None or not torch.cuda.is_available():
        print("no PyTorch with CUDA: nothing is measured", file=sys.stderr)
        return
    yield copy_bandwidth(torch)
    for case in cases.ATTENTION:
        if "llama3" in case.name and case.phase == "decode":
            for batch, length in DECODES:
                yield decode_attention(torch, kernels, case, batch, length)
        if "llama3" in case.name and case.phase == "prefill":
            for length in PREFILLS:
                yield prefill_attention(torch, kernels, boxed, case, length)
    for product in cases.PRODUCTS:
        if "8b" in product.name and product.dtype == "bfloat16":
            for rows in ROWS:
                yield product_time(torch, kernels, boxed, product, rows)
    for folder in sorted((here / "timed").iterdir()) if (here / "timed").is_dir() else ():
        yield from decode_steps(torch, folder)


def timed(torch: Any, functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each, in turns; a turn is as many calls as take about 20 ms."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def once(function: Callable[[], Any], calls: int) -> float:
        events[0].record()
        for _ in range(calls):
            function()
        events[1].record()
        torch.cuda.synchronize()
        return float(events[0].elapsed_time(events[1])) / 1e3 / calls

    counts = {}
    for name, function in functions.items():
        once(function, 2)
        counts[name] = max(3, min(200, int(0.02 / max(once(function, 3), 1e-6))))
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            found[name].append(once(function, counts[name]))
    return {name: statistics.median(times) for name, times in found.items()}


def copy_bandwidth(torch: Any) -> dict[str, Any]:
    """Bytes read and written a second by a copy of 2 GB: what memory gives."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = timed(torch, {"copy": lambda: target.copy_(source)})["copy"]
    return {"name": "copy", "gb_s": 2 * source.numel() / seconds / 1e9}


def paged(torch: Any, case: cases.AttentionCase, batch: int, length: int) -> dict[str, Any]:
    """Random pages on the GPU, and the same keys and values one sequence after the other."""
    kind, page = getattr(torch, case.dtype), cases.PAGE
    each = -(-length // page)
    order = torch.randperm(batch * each)
    shape = (batch * each, case.kv_heads, page, case.dim)
    pools = [torch.randn(shape, dtype=kind, device="cuda") for _ in range(2)]
    table = order.reshape(batch, each).to(torch.int32).cuda()
    whole = [
        pool[order.cuda()].reshape(batch, each, case.kv_heads, page, case.dim).transpose(1, 2)
        .reshape(batch, case.kv_heads, each * page, case.dim)[:, :, :length]
        for pool in pools
    ]  # fmt: skip
    return {"pools": pools, "table": table, "whole": whole}


def decode_attention(torch: Any, kernels: Any, case: cases.AttentionCase, batch: int, length: int) -> Any:
    made = paged(torch, case, batch, length)
    kind, take = getattr(torch, case.dtype), kernels.ffi.from_dlpack
    query = torch.randn(1, case.heads, batch, case.dim, dtype=kind, device="cuda")
    positions = torch.full((batch,), length - 1, dtype=torch.int64, device="cuda")
    inputs = [take(x) for x in (query, *made["pools"], positions, made["table"])]
    function, k, v = kernels.vm[case.name], *(x.contiguous() for x in made["whole"])
    q = query[0].transpose(0, 1)[:, :, None].contiguous()
    attend = torch.nn.functional.scaled_dot_product_attention
    seconds = timed(
        torch,
        {"kvc": lambda: function(*inputs), "sdpa": lambda: attend(q, k, v, enable_gqa=True)},
    )
    got = torch.from_dlpack(function(*inputs))[0].float()
    error = (got - attend(q, k, v, enable_gqa=True)[:, :, 0].float()).abs().max().item()
    size = 2 * batch * length * case.kv_heads * case.dim * 2
    return {
        "name": f"{case.name} {batch}x{length}",
        "gb_s": size / seconds["kvc"] / 1e9,
        "seconds": seconds,
        "of_sdpa": seconds["sdpa"] / seconds["kvc"],
        "error": error,
        "passed": bool(error < 2e-2),
    }


def prefill_attention(torch: Any, kernels: Any, boxed: Any, case: cases.AttentionCase, length: int) -> Any:
    import json

    from torch.nn.attention import SDPBackend, sdpa_kernel

    made = paged(torch, case, 1, length)
    kind, take = getattr(torch, case.dtype), kernels.ffi.from_dlpack
    query = torch.randn(1, case.heads, length, case.dim, dtype=kind, device="cuda")
    positions = torch.arange(length, dtype=torch.int64, device="cuda")
    file = Path(__file__).resolve().parents[1] / "kernels" / "tiles.json"
    tile = json.loads(file.read_text())[case.name]
    tiles = torch.tensor(
        [(0, i, min(tile, length - i)) for i in range(0, length, tile)], dtype=torch.int32, device="cuda"
    )
    inputs = [take(x) for x in (query, *made["pools"], positions, tiles, made["table"])]
    function, k, v = kernels.vm[case.name], *(x.contiguous() for x in made["whole"])
    attend = torch.nn.functional.scaled_dot_product_attention

    def by(backend: Any) -> Callable[[], Any]:
        def call() -> Any:
            with sdpa_kernel(backend):
                return attend(query, k, v, is_causal=True, enable_gqa=True)

        return call

    functions = {"kvc": lambda: function(*inputs)}
    if boxed is not None and case in cases.BOXED_ATTENTION:
        twin = boxed.vm[case.name]
        functions["boxed"] = lambda: twin(*inputs)
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            by(backend)()
            functions[name] = by(backend)
        except RuntimeError:
            continue
    seconds = timed(torch, functions)
    expected = attend(query, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).float()
    error = (torch.from_dlpack(function(*inputs))[0].float() - expected).abs().max().item()
    flops = 2 * case.heads * case.dim * length * length
    return {
        "name": f"{case.name} {length}",
        "tflop_s": flops / seconds["kvc"] / 1e12,
        "seconds": seconds,
        "of_best": min(s for n, s in seconds.items() if n in ("flash", "cudnn")) / seconds["kvc"],
        "error": error,
        "passed": bool(error < 3e-2),
    }


def product_time(torch: Any, kernels: Any, boxed: Any, case: cases.ProductCase, rows: int) -> dict[str, Any]:
    kind, take = getattr(torch, case.dtype), kernels.ffi.from_dlpack
    x = torch.randn(1, rows, case.depth, dtype=kind, device="cuda")
    plain = torch.randn(case.columns, case.depth, dtype=kind, device="cuda") / 16
    tensors, bits = [plain], 16
    if case.stored:
        bits = 4 if case.stored == "uint4" else 8
        shape = (case.columns, case.depth * bits // 8)
        tensors = [
            torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda"),
            torch.rand(case.columns, case.depth // 32, dtype=kind, device="cuda"),
        ]
    inputs, function = [take(t) for t in (x, *tensors)], kernels.vm[case.name]
    functions = {"kvc": lambda: function(*inputs), "cublas": lambda: x @ plain.T}
    if boxed is not None and case in cases.BOXED:
        twin = boxed.vm[case.name]
        functions["boxed"] = lambda: twin(*inputs)
    seconds = timed(torch, functions)
    flops = 2 * rows * case.columns * case.depth
    size = sum(t.numel() * t.element_size() for t in tensors)
    return {
        "name": f"{case.name} x {rows}",
        "tflop_s": flops / seconds["kvc"] / 1e12,
        "gb_s": size / seconds["kvc"] / 1e9,
        "seconds": seconds,
        "of_cublas": seconds["cublas"] / seconds["kvc"],
    }


def decode_steps(torch: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """A decode step of a whole model with the choice of its tokens, wall time with all copies.

    Every second row is drawn with top-k and top-p, the others take the most likely token.
    """
    import time

    from tools.gpu_check import artifact_of

    from kvc.runtime.executor import Executor
    from kvc.runtime.sampler import Draw, SamplingParams
    from kvc.runtime.state import State

    with tempfile.TemporaryDirectory() as work:
        executor = Executor(artifact_of(folder, Path(work)))
    plan, facts = executor.plan, executor.facts
    for workload in plan.workload:
        length = min(workload.context, plan.max_context) - 1
        state = State(plan, share=False, shuffle=np.random.default_rng(0))
        sequences = [state.open([1] * (length + 1)) for _ in range(workload.batch)]
        for kept in sequences:  # what the pages hold does not matter for the time
            while kept.length < length:
                count = min(plan.chunk, length - kept.length)
                state.segment(kept, count)
                state.advance(kept, count)
        calls = [state.segment(kept, 1) for kept in sequences]
        ways = (SamplingParams(), SamplingParams(temperature=0.8, top_k=1000, top_p=0.95))
        draws = [Draw(ways[i % 2], np.random.default_rng(i)) for i in range(workload.batch)]
        times, chosen = [], []
        for _ in range(20):
            start = time.perf_counter()
            executor.decode(calls, take=False)
            middle = time.perf_counter()
            executor.choose(draws)
            chosen.append(time.perf_counter() - middle)
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times[5:])
        size = plan.bytes.weights + workload.batch * (length + 1) * facts.kv_token_bytes()
        yield {
            "name": f"{folder.name} decode {workload}",
            "seconds": seconds,
            "choosing_s": statistics.median(chosen[5:]),
            "tokens_s": workload.batch / seconds,
            "gb_s": size / seconds / 1e9,
        }
    executor.close()
