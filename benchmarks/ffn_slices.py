"""What computing feed-forward parts in slices of a prefill chunk buys, by the planner's own numbers.

For each model: temporaries and predicted seconds of prefill for every chunk, whole and in slices, and the
smallest budget of several speeds with slices and without. Nothing is compiled or run.

    python -m kvc_models make-big build/llama-8b.onnx --params 8b --sparse
    python -m kvc_models export smollm2-135m build/smollm2-135m.onnx
    python -m kvc_models export gpt2-124m build/benchmarks/forms/gpt2-124m.onnx --dtype float16
    python -m benchmarks.ffn_slices [--only llama-8b ...]

Rates are those of `kvc profile` on a CPU where it was run, else nominal; for GPUs those of data sheets.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.common import BUILD, show, write_results

CASES: Final = {
    "llama-8b": ("llama-8b.onnx", "cuda:sm_90", "8x8192"),
    "smollm2-135m": ("smollm2-135m.onnx", "cpu", "4x1024"),
    "gpt2-124m": ("benchmarks/forms/gpt2-124m.onnx", "cpu", "4x1024"),
}


def planned(path: Path, target: str, workload: str) -> dict[str, Any]:
    """Of K and V in all layers: every chunk and its slices, and the curve of memory against time."""
    import kvc
    from kvc.options import parse_workload
    from kvc.planning.explain import curve

    planner, alternatives = kvc.planner(path, target=target), parse_workload(workload)
    variant, *_ = [planner.variant(chosen) for chosen in planner.usual()]  # lowered here, and timed below
    batch = max(w.batch for w in alternatives)
    rows = []
    for chunk in planner.machine.chunks:
        for ffn in (0, *variant.costs.slices(chunk, batch)):
            seconds = sum(variant.clock.times(w, chunk, ffn).prefill_seconds for w in alternatives)
            arena = variant.costs.arena(chunk, batch, ffn)
            rows.append({"chunk": chunk, "ffn_chunk": ffn, "arena": arena, "prefill_seconds": seconds})
    start = time.perf_counter()
    points = curve(planner, alternatives)
    took = time.perf_counter() - start
    found = [
        {"bytes": p.bytes, "seconds": p.seconds, "chunk": p.chunk, "ffn_chunk": p.ffn, "forms": p.forms}
        for p in points
    ]
    return {"rates": planner.machine.rates.source, "chunks": rows, "curve": found, "curve_seconds": took}


def best_whole(rows: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest whole chunk that takes no more than a row."""
    whole = [r for r in rows if not r["ffn_chunk"] and r["arena"] <= row["arena"]]
    return min(whole, key=lambda r: r["prefill_seconds"], default=None)


def main() -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").strip())
    arguments.add_argument("--only", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    arguments.add_argument("--output", type=Path)
    options = arguments.parse_args()
    body: dict[str, Any] = {}
    for name in options.only:
        file, target, workload = CASES[name]
        if not (BUILD / file).is_file():
            raise SystemExit(f"{BUILD / file} is not there; the head of this script says how it is made")
        body[name] = {"target": target, "workload": workload, **planned(BUILD / file, target, workload)}
        table = []
        for row in body[name]["chunks"]:
            other = best_whole(body[name]["chunks"], row)
            gain = other["prefill_seconds"] / row["prefill_seconds"] if other else float("inf")
            cells = (row["chunk"], row["ffn_chunk"] or "whole", f"{row['arena'] / 1e6:.1f}")
            table.append((*map(str, cells), f"{row['prefill_seconds']:.3f}", f"{gain:.3f}"))
        columns = ["chunk", "slices", "temporaries, MB", "prefill, s", "fastest whole that fits / this"]
        show(f"{name}, {target}, {workload}", columns, table)
    path = write_results("ffn_slices", body, options.output)
    print(f"written: {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
