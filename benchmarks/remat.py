"""The solvers of rematerialization on random layered graphs and on published instances.

Each problem is solved for 0.9 and 0.8 of the peak of its given order, once with that order and once with a
free one, and the fixed order gets a certificate (OR-tools). An independent checker runs every schedule.

    R1-R4   random layered graphs of our own generator, with the sizes of G1-G4
    G1-G4   the graphs of that kind that were published with MOCCASIN; CM1, CM2 two training graphs of
    Checkmate.
            They are not part of this project: --instances names the folder `data` of a checkout of
            github.com/haoming-codes/moccasin

    python -m benchmarks.remat [--instances FOLDER] [--only R1 G1 ...] [--quick]
"""

from __future__ import annotations

import datetime
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.common import destination, parser, show, versions, write_results

from kvc_passes.remat import Problem, Solution, given_order, peak, solve
from kvc_passes.remat.checker import check
from kvc_passes.remat.instances import layered_graph, read_graph

BUDGETS: Final = (0.9, 0.8)
GENERATED: Final = {"R1": (100, 0.27), "R2": (250, 0.43), "R3": (500, 0.36), "R4": (1000, 0.31)}
FILES: Final = {
    "G1": "random_layered_n100_w0.27_nlv0.75_ed0.2_scd0.14.json",
    "G2": "random_layered_n250_w0.43_nlv0.75_ed0.2_scd0.14.json",
    "G3": "random_layered_n500_w0.36_nlv0.75_ed0.2_scd0.14.json",
    "G4": "random_layered_n1000_w0.31_nlv0.75_ed0.2_scd0.14.json",
    "CM1": "fcn_8_vgg (MLSys)_32_(416, 608, 3)_train_nx.json",
    "CM2": "ResNet50 (MLSys)_256_(224, 224, 3)_train_nx.json",
}
# Overhead in % and seconds with the given order, from Bartan et al., "MOCCASIN: Efficient Tensor
# Rematerialization for Neural Networks", ICML 2023: first Checkmate's MILP, then MOCCASIN. "-" found nothing.
PUBLISHED: Final = {
    "G2 0.9": (".9 / 685", ".9 / 55"),
    "G2 0.8": ("-", "4.9 / 640"),
    "G4 0.9": ("-", ".7 / 3613"),
    "G4 0.8": ("-", "3.4 / 3612"),
    "CM1 0.9": ("0.0 / 6.3", "0.0 / 3.1"),
    "CM1 0.8": (".1 / 5.6", ".1 / 3.1"),
    "CM2 0.9": (".1 / 434", ".2 / 65"),
    "CM2 0.8": (".3 / 485", ".3 / 69"),
}
_HEAD: Final = ("benchmark", "date", "machine", "versions")


def problems(only: list[str], folder: Path | None) -> dict[str, Problem]:
    """The problems that were asked for and can be had. Raises SystemExit for unknown names."""
    if unknown := set(only) - {*GENERATED, *FILES}:
        raise SystemExit(f"no such instance: {', '.join(sorted(unknown))}")
    found = {name: layered_graph(*shape) for name, shape in GENERATED.items() if not only or name in only}
    for name, file in FILES.items():
        if folder is not None and (not only or name in only):
            found[name] = read_graph(folder / file)
        elif name in only:
            raise SystemExit(
                f"{name} is a published instance: --instances has to name the folder that it lies in"
            )
    return found


def facts(problem: Problem, solution: Solution, budget: int, fixed_order: bool) -> dict[str, Any]:
    """What is reported of a solution, after the checker ran it."""
    assert check(problem, solution.schedule.order, budget, fixed_order) == (solution.peak, solution.cost)
    result = {
        "overhead_percent": round(100 * solution.overhead, 4),
        "seconds": round(solution.seconds, 2),
        "computed_again": len(solution.schedule.order) - len(problem.sizes),
        "peak_bytes": solution.peak,
    }
    if fixed_order or solution.gap == 0:
        result["proved_percent"] = round(100 * (solution.bound - solution.base) / solution.base, 4)
        result["gap_percent"] = round(100 * solution.gap, 4)
        result["optimal"] = solution.gap == 0
        result["proof_seconds"] = round(solution.proof_seconds, 2)
    return result


def measure(problem: Problem, part: float, moves: int | None, proof_seconds: float) -> dict[str, Any]:
    """One row: both orders."""
    budget = math.ceil(part * peak(problem, given_order(problem)))
    fixed = solve(
        problem, budget, fixed_order=True, certify=proof_seconds > 0, moves=moves, proof_seconds=proof_seconds
    )
    free = solve(problem, budget, moves=moves)
    return {
        "operations": len(problem.sizes),
        "edges": sum(map(len, problem.inputs)),
        "budget_bytes": budget,
        "same_order": facts(problem, fixed, budget, True),
        "free_order": facts(problem, free, budget, False),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def first_call() -> float:
    """Seconds of the first search in a process: numba compiles it, or loads what it compiled before."""
    start = time.perf_counter()
    problem = layered_graph(20, 0.3)
    solve(problem, peak(problem, given_order(problem)) - 1, moves=10)
    return time.perf_counter() - start


def main() -> int:
    options = _options()
    path = destination(options, "remat")
    body = json.loads(path.read_text()) if path.is_file() else {}
    rows: dict[str, Any] = body.get("solver", {}).get("rows", {})
    loading = first_call()
    for name, problem in problems(options.only, options.instances).items():
        for part in BUDGETS:
            key = f"{name} {part}"
            rows[key] = measure(
                problem, part, 2_000 if options.quick else None, 2 if options.quick else options.proof
            )
            if key in PUBLISHED:
                rows[key]["published"] = dict(zip(("checkmate", "moccasin"), PUBLISHED[key], strict=True))
            print(f"{key}: {json.dumps(rows[key])}", file=sys.stderr)
    body = {key: value for key, value in body.items() if key not in _HEAD}
    body["solver"] = {
        "budget": "a part of the given order's peak; overheads in % of the cost of computing everything once",
        "published": "Bartan et al., MOCCASIN, ICML 2023, same order: overhead % / seconds",
        "first_call_seconds": round(loading, 2),
        "versions": versions(("numba", "ortools", "numpy")),
        "rows": {key: rows[key] for key in sorted(rows, key=_place)},
    }
    print(write_results("remat", body, path))
    table(body["solver"]["rows"])
    return 0


def table(rows: dict[str, Any]) -> None:
    columns = ["% / s", "ops", "Checkmate", "MOCCASIN", "same order", "proved at least", "free order"]
    cells = []
    for key, row in rows.items():
        same, free = row["same_order"], row["free_order"]
        published = row.get("published", {"checkmate": "", "moccasin": ""})
        proof = "optimal" if same["optimal"] else f"{same['proved_percent']:.3f}"
        cells.append(
            (
                key,
                row["operations"],
                *published.values(),
                f"{same['overhead_percent']:.3f} / {same['seconds']:.1f}",
                f"{proof} / {same['proof_seconds']:.1f}",
                f"{free['overhead_percent']:.3f} / {free['seconds']:.1f}",
            )
        )
    show("Overhead in % of the cost and seconds; published numbers are for the same order", columns, cells)


def _place(key: str) -> tuple[int, str]:
    name, part = key.split()
    return [*GENERATED, *FILES].index(name), f"{1 - float(part):.1f}"


def _options() -> Any:
    options = parser(__doc__, "remat")
    options.add_argument("--instances", type=Path, help="the folder with the published instances")
    options.add_argument("--only", nargs="+", default=[], help=f"of {', '.join([*GENERATED, *FILES])}")
    options.add_argument(
        "--proof", type=float, default=300, help="seconds for a certificate (%(default)s); 0 for none"
    )
    return options.parse_args()


if __name__ == "__main__":
    sys.exit(main())
