"""The longest context, of one request, within a budget: a part of benchmarks/scenarios.py.

kvc says it: its plan either fits or is refused. The peers have no budget, so their peak is measured at two
contexts, a line through both is solved for the budget, and the result is marked as extrapolated; one more
real run says how far the line is off. Contexts go beyond the models' positions: bytes do not depend on them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import scenario_models
from benchmarks.common import show

BUDGETS: Final = ("1GB", "2GB", "4GB", "8GB")
POINTS: Final = {
    "smollm2-long": (2000, 8000),
    "gemma3-1b": (5120, 32768),
    "mistral-window": (5120, 32768),
}
CHECKS: Final = {"smollm2-long": 16000, "gemma3-1b": 8192, "mistral-window": 8192}
QUICK: Final = (128, 256, 192)
_STEP: Final = 16
"""Tokens, to which what is solved is rounded down."""
POSITIONS: Final = 1 << 24
"""What stands for a model without a limit; a context as long as that has no end that the budget sets."""

Measure = Callable[[str, str, Sequence[tuple[int, int]], argparse.Namespace], dict[str, Any]]


def contexts(
    engine: str, name: str, full: dict[str, Any] | None, measure: Measure, options: argparse.Namespace
) -> dict[str, Any]:
    """The longest context of a model for every budget; `full` is the scenario's record, if there is one."""
    row: dict[str, Any] = {"scenario": name, "engine": engine}
    if engine == "kvc":
        model = without_limit(scenario_models.onnx_file(name, options))
        return {**row, "extrapolated": False, "tokens": {b: kvc_longest(model, b) for b in BUDGETS}}
    *points, check = QUICK if options.quick else (*POINTS[name], CHECKS[name])
    peaks: dict[int, int] = {}
    for context in (*points, check):
        known = full if full and _cases(full) == [(1, context)] else None
        found = known or measure(engine, name, [(1, context)], options)
        if "missing" in found:
            return {**row, "missing": f"{context} tokens: {found['missing']}"}
        peaks[context] = found["peak_bytes"]
    (n, m), line = points, [peaks[each] for each in points]
    slope = (line[1] - line[0]) / (m - n)
    base = line[0] - slope * n
    return {
        **row,
        "extrapolated": True,
        "peak_bytes": {str(context): peak for context, peak in sorted(peaks.items())},
        "bytes_a_token": round(slope, 1),
        "bytes_without_tokens": round(base),
        "check": {
            "tokens": check,
            "predicted_bytes": round(base + slope * check),
            "measured_bytes": peaks[check],
        },
        "tokens": {b: _solved(base, slope, b) for b in BUDGETS},
    }


def _cases(row: dict[str, Any]) -> list[tuple[int, int]]:
    return [(case["batch"], case["context"]) for case in row.get("cases", ())]


def _solved(base: float, slope: float, budget: str) -> int | None:
    """Tokens at which the line meets the budget; 0 if none fit, None if there is no end."""
    left = float(budget.removesuffix("GB")) * 1e9 - base
    if left <= 0:
        return 0
    return int(left / slope) // _STEP * _STEP if slope > 0 else None


def without_limit(model: Path) -> Path:
    """The same model, by links, with a configuration of so many positions that they are no limit."""
    folder = model.with_name(f"{model.stem}-endless")
    assets = model.with_name(f"{model.stem}.assets")
    target = folder / f"{model.stem}.assets"
    target.mkdir(parents=True, exist_ok=True)
    for file in [model, model.with_name(model.name + ".data"), *assets.iterdir()]:
        link = (target if file.parent == assets else folder) / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file)
    config = json.loads((assets / "config.json").read_text())
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps({**config, "max_position_embeddings": POSITIONS}))
    return folder / model.name


def kvc_longest(model: Path, budget: str) -> int:
    """Tokens of one request that `budget` holds; 0 if none."""
    import kvc

    try:
        return int(kvc.plan(model, budget=budget, workload=f"1x{_STEP}").capacities[0].context)
    except kvc.BudgetError:
        return 0


def _needed(model: Path, workload: str) -> int:
    """The smallest budget that works."""
    import kvc

    try:
        kvc.plan(model, budget=1, workload=workload)
    except kvc.BudgetError as error:
        return int(error.needed)
    raise RuntimeError("a plan fits into one byte")


def kvc_budget(model: Path, workload: str) -> int:
    """Hardly more than the smallest budget at which prompts are computed in the largest chunks."""
    import kvc

    roomy = kvc.plan(model, budget=10**12, workload=workload)
    budget = _needed(model, workload) + roomy.bytes.arena
    step = 1 << 20
    while kvc.plan(model, budget=budget, workload=workload).chunk < roomy.chunk:
        budget += step
    return budget


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Print all models and engines side by side."""
    cells = [
        (
            f"{row['scenario']}, {row['engine']}",
            *((row["missing"], "", "", "", "") if "missing" in row else _cells(row)),
        )
        for row in rows
    ]
    if cells:
        show("longest context of one request, tokens", ["model, engine", *BUDGETS, "line is off by"], cells)


def _cells(row: dict[str, Any]) -> list[str]:
    found = [row["tokens"][b] for b in BUDGETS]
    tokens = ["no end" if n is None or n >= POSITIONS else f"{n:,}" for n in found]
    check = row.get("check")
    off = f"{check['predicted_bytes'] / check['measured_bytes'] - 1:+.1%}" if check else "planned"
    return [*tokens, off]
