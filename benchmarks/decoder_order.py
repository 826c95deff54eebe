"""What writing over inputs does to the arena of decoders, and what another order of kernels could.

Of each model's prefill, lowered for a CPU (chunks of 512 tokens) and a GPU (chunks of 8192), in bytes:

    apart      of temporaries if no kernel wrote over what it reads
    arena      as plans count them: with OverwriteInputs, where PlaceArena puts them
    quarters   both with feed-forward parts in slices of a quarter of the chunk, which need not be worth it
    alive      the most that is alive at once, in the order of the graph
    lowest     the same in the best order that the search of `kvc_passes.remat` reaches, computing again at
               any cost; and that cost, by a roofline, as a share of computing everything once
    floor      what no order and no recomputation goes below: the kernel that needs most, with what it reads
    instead    what plans choose from already: the fastest smaller chunk, or slices of feed-forward parts,
               that takes no more than `lowest`; and how much longer prefill of 32 requests of 1024 takes

Nothing is run: costs are those of a roofline, and of the rates of `kvc profile` or nominal ones.

    python -m kvc_models make-big build/benchmarks/forms/llama-8b.onnx --params 8b --sparse
    python -m benchmarks.decoder_order [--only gpt2-124m ...] [--quick]
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.common import destination, parser, show, write_results
from benchmarks.plan_times import exported

MODELS: Final = ("smollm2-135m", "gpt2-124m", "phi15-slice", "gemma4-slice", "llama-8b")
TARGETS: Final = {"cpu": 512, "cuda:sm_90": 8192}
BATCH: Final = 32
CONTEXT: Final = 1024
SECONDS: Final = 30.0


def measured(name: str, model: Path, targets: dict[str, int]) -> list[dict[str, Any]]:
    """Prefill of one model on all targets."""
    from kvc.compilation import bounds_of, read_model
    from kvc.frontend.importer import import_onnx
    from kvc.permissions import Permissions
    from kvc.pipeline import Runner
    from kvc.planning.decide import Planner
    from kvc.targets import parse_target
    from kvc_passes.base import Pass, Result
    from kvc_passes.overwrite_inputs import OverwriteInputs
    from kvc_passes.prove_overwrites import ProveOverwrites

    @dataclass
    class Recording(Runner):
        """Keeps kernels as they were marked, and as they were before any wrote over what it reads."""

        kept: dict[tuple[str, str], Any] = field(default_factory=dict)

        def apply(self, mod: Any, step: Pass, label: str = "") -> Result:
            result = super().apply(mod, step, label)
            if isinstance(step, ProveOverwrites):
                self.kept[label, "marked"] = result.module
            if isinstance(step, OverwriteInputs):
                self.kept[label, "apart"] = mod
            return result

    rows = []
    for target, chunk in targets.items():
        runner, machine = Recording(), parse_target(target)
        imported = import_onnx(exported(name, model), frozenset())
        planner = Planner(read_model(imported, Permissions(), machine.page_size, runner), machine, 0, runner)
        variant = planner.variant(planner.usual()[0])
        bounds = bounds_of("prefill", chunk, BATCH)
        row: dict[str, Any] = {"model": name, "target": target, "chunk": chunk}
        for key, mod in (
            ("apart", with_places(runner.kept["prefill-", "apart"])),
            ("arena", variant.lowered.functions["prefill"]),
        ):
            row[key], row[f"{key}_quarters"] = arenas(mod, bounds, chunk // 4)
        row |= lowest(runner.kept["prefill-", "marked"], bounds)
        rows.append(row | instead(variant, chunk, row["lowest"]))
        print(rows[-1], flush=True)
    return rows


def with_places(mod: Any) -> Any:
    """Temporaries as tensors that are allocated."""
    from kvc.codegen.lower import allocated
    from kvc.pipeline import Runner

    return allocated(mod, Runner())


def arenas(mod: Any, bounds: dict[str, int], rows: int) -> tuple[int, int]:
    """Bytes with feed-forward parts whole, and in slices of so many tokens."""
    from kvc_passes.place_arena import Arena
    from kvc_passes.row_segments import segments_of

    return Arena.of(mod).size(bounds), Arena.of(mod, segments=segments_of(mod)).size(bounds, rows)


def lowest(mod: Any, bounds: dict[str, int]) -> dict[str, Any]:
    """What is alive in the order of the graph, and in the best that is found."""
    from kvc_passes.remat.lowest import least_conceivable, lowest_peak
    from kvc_passes.remat.memory import given_order, peak
    from kvc_passes.remat.views import without_views
    from kvc_passes.rematerialize import Operations

    others = {"t": bounds["n"], "m": 64} | {f"pages_{group}": 1024 for group in range(4)}
    problem = Operations(mod, others | bounds, {}).problem  # costs see pages, sizes do not
    found = lowest_peak(problem, deadline=time.perf_counter() + SECONDS)
    return {
        "alive": peak(problem, given_order(problem)),
        "lowest": peak(problem, found),
        "cost": round(found.cost(problem) / problem.cost - 1, 4),
        "floor": least_conceivable(without_views(problem)),
        "operations": len(problem.sizes),
    }


def instead(variant: Any, chunk: int, most: int) -> dict[str, Any]:
    """The fastest call of at most `most` bytes of temporaries that plans may choose."""
    from kvc.planning.budget import calls
    from kvc_passes.plans import Workload

    work = Workload(BATCH, CONTEXT)

    def seconds(call: tuple[int, int]) -> float:
        return float(variant.clock.times(work, *call).prefill_seconds)

    fitting = [c for c in calls(variant.costs, (work,)) if variant.costs.arena(c[0], BATCH, c[1]) <= most]
    best = min(fitting, key=seconds)
    return {
        "instead": {"chunk": best[0], "ffn_chunk": best[1]},
        "instead_arena": variant.costs.arena(best[0], BATCH, best[1]),
        "instead_cost": round(seconds(best) / seconds((chunk, 0)) - 1, 4),
    }


def main() -> None:
    command = parser(__doc__, "decoder_order")
    command.add_argument("--only", nargs="+", default=MODELS, choices=MODELS)
    options = command.parse_args()
    target = destination(options, "decoder_order")
    known = json.loads(target.read_text())["rows"] if target.is_file() else []
    for name in options.only:
        targets = {"cpu": TARGETS["cpu"]} if options.quick else TARGETS
        known = [row for row in known if row["model"] != name] + measured(name, options.model, targets)
        write_results("decoder_order", {"workload": f"{BATCH}x{CONTEXT}", "rows": known}, target)
    table = [
        (
            f"{row['model']}, {row['target']}, chunk {row['chunk']}",
            f"{row['apart'] / 1e6:.1f} MB",
            f"{row['arena'] / row['apart']:.3f}",
            f"{row['arena_quarters'] / row['apart_quarters']:.3f}",
            *(f"{row[key] / row['arena']:.3f}" for key in ("floor", "lowest")),
            f"{row['cost']:+.1%}",
            f"{row['instead_arena'] / row['arena']:.3f}",
            f"{row['instead_cost']:+.1%}",
        )
        for row in known
    ]
    columns = ("model", "apart", "arena", "in quarters", "floor", "lowest", "cost", "instead", "cost")
    show("arenas of prefill over those apart; order and recomputation over the arena", columns, table)


if __name__ == "__main__":
    main()
