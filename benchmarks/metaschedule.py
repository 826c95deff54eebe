"""TVM's MetaSchedule beside kvc's templates: products of SmolLM2-135M, and what share of a step is neither.

    pip install psutil cloudpickle xgboost-cpu
    python -m benchmarks.metaschedule [--trials 64]

Each product y = x w^T of float32 is tuned by MetaSchedule, with the weight as [inputs, outputs], and then
both are timed in turn on weights that no cache holds, the median of rounds. `rest`: the share of a step's
predicted seconds that kernels other than products and attention take, which only MetaSchedule could tune.
Results are written to benchmarks/results/metaschedule.json.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any, Final

import numpy as np
from benchmarks.common import destination, parser, require_model, show, write_results

SHAPES: Final = ((1536, 576, 1), (1536, 576, 512))
_COLD_BYTES: Final = 96 * 2**20
_ROUNDS: Final = 15


def searched(n: int, k: int, rows: int, target: Any, trials: int) -> tuple[Any, float]:
    """The kernel (x, w, y) that MetaSchedule finds, and the seconds that it took to."""
    import tvm
    from tvm import te
    from tvm.s_tir import meta_schedule as ms

    x, w = te.placeholder((rows, k), "float32", "x"), te.placeholder((k, n), "float32", "w")
    r = te.reduce_axis((0, k), "r")
    y = te.compute((rows, n), lambda i, j: te.sum(x[i, r] * w[r, j], r), "y")
    module = tvm.IRModule({"main": te.create_prim_func([x, w, y])})
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        database = ms.tune_tir(module, target, folder, trials, num_trials_per_iter=min(trials, 32))
        schedule = ms.tir_integration.compile_tir(database, module, target)
    return tvm.compile(schedule.mod, target=target), time.perf_counter() - begin


def compared(n: int, k: int, rows: int, trials: int) -> dict[str, Any]:
    """Median microseconds of the template and of what MetaSchedule found."""
    from tvm import runtime

    from kvc.kernels.emit import compiled
    from kvc.kernels.matmul import packed_matmul
    from kvc.kernels.packing import pack
    from kvc.targets import parse_target

    machine: Any = parse_target("cpu")
    traits = machine.products.traits
    template = compiled(packed_matmul(n, k, traits), machine.target)
    found, seconds = searched(n, k, rows, machine.target, trials)
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((rows, k), np.float32), rng.standard_normal((n, k), np.float32)
    copies = max(2, -(-_COLD_BYTES // w.nbytes))
    packed = [runtime.tensor(pack(w, traits.lanes)) for _ in range(copies)]
    plain = [runtime.tensor(np.ascontiguousarray(w.T)) for _ in range(copies)]
    one = (runtime.tensor(x[None]), runtime.tensor(np.zeros((1, rows, n), np.float32)))
    two = (runtime.tensor(x), runtime.tensor(np.zeros((rows, n), np.float32)))
    times: dict[str, list[float]] = {"template": [], "metaschedule": []}
    for _ in range(_ROUNDS):
        for name, kernel, (given, out), weights in (
            ("template", template, one, packed),
            ("metaschedule", found["main"], two, plain),
        ):
            begin = time.perf_counter()
            for weight in weights:
                kernel(given, weight, out)
            times[name].append((time.perf_counter() - begin) / copies)
    apart = float(np.abs(one[1].numpy()[0] - two[1].numpy()).max())
    medians = {name: round(statistics.median(found) * 1e6, 1) for name, found in times.items()}
    return {
        "product": f"{n}x{k}, {rows} rows",
        **medians,
        "metaschedule_over_template": round(medians["metaschedule"] / medians["template"], 3),
        "trials": trials,
        "tuning_seconds": round(seconds, 1),
        "largest_difference": apart,
    }


def rest(model: Any) -> dict[str, float]:
    """Share of a step in kernels that are neither products nor attention, as predicted."""
    import kvc
    from kvc.options import parse_workload

    workload = parse_workload("4x1024")
    built: Any = kvc.planner(model)
    decision = built.decide(10**9, workload)
    clock, rates, plan = decision.variant.clock, built.machine.rates, decision.plan
    (times,) = plan.times
    shares = {}
    for name, work, rows, calls, whole in (
        ("prefill", clock.prefill, plan.chunk, times.prompt_tokens / plan.chunk, times.prefill_seconds),
        ("decode", clock.decode, 4, times.answer_tokens / 4, times.decode_seconds),
    ):
        others = sum(count * s.seconds(rates, rows, 4) for s, count in work.steps if s.kind == "other")
        shares[name] = round(others * calls / whole, 4)
    return shares


def main() -> None:
    command = parser(__doc__, "metaschedule")
    command.add_argument("--trials", type=int, default=64, help="candidates a product (64)")
    options = command.parse_args()
    from kvc.runtime.library import use_threads
    from kvc.targets import parse_target

    machine: Any = parse_target("cpu")
    use_threads(machine.products.traits.threads)
    shares = rest(require_model(options.model))
    shapes = SHAPES[:1] if options.quick else SHAPES
    found = [compared(*shape, 8 if options.quick else options.trials) for shape in shapes]
    columns = ("product", "template", "metaschedule", "metaschedule_over_template", "tuning_seconds")
    show("microseconds", columns, [tuple(row[c] for c in columns) for row in found])
    print(f"other kernels: {shares['prefill']:.1%} of prefill, {shares['decode']:.1%} of decode")
    write_results("metaschedule", {"products": found, "rest": shares}, destination(options, "metaschedule"))


if __name__ == "__main__":
    main()
