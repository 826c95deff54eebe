"""docs/coverage.md, written from results."""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.coverage_rows import FLOATS, Row
from tools.mutants import read_counts


@dataclass(frozen=True)
class Outcome:
    """What came of a row.

    Attributes:
        row: `str` of the row.
        result: "proved", "refused", "wrong", "crashed" or "not exported".
        error: largest difference of a logit, NaN if it did not run.
        reason: why it is not proved.
        seconds: time of all steps.
    """

    row: str
    result: str
    error: float
    reason: str = ""
    seconds: float = 0.0

    @property
    def shown(self) -> str:
        return "" if math.isnan(self.error) else f"{self.error:.0e}"


_HEAD = """# Coverage

Written by `python tools/coverage.py`; not to be edited. Tiny models with random weights of every family are
exported, proved, compiled and run. A number is the largest difference of a logit (they go to about 8) from
what ONNX Runtime makes of the same file, over prompts, chunks, decoding and ragged batches; where the graph
takes a past, also over batches that ONNX Runtime runs padded at the left. 16-bit graphs are compared with the
same graph widened to float32.

**r3**: refused, for the third reason below. **x**: the exporter itself cannot write it. **WRONG**, **CRASH**:
bugs. `-past`: keys and values go in and come out. Empty: not run.
"""


class _Page:
    """Collects reasons while tables are written."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes = {outcome.row: outcome for outcome in outcomes}
        self.reasons: dict[str, list[str]] = defaultdict(list)

    def cell(self, row: Row) -> str:
        outcome = self.outcomes.get(str(row))
        if outcome is None:
            return ""
        if outcome.result == "proved":
            return outcome.shown
        self.reasons[f"{outcome.result}: {outcome.reason}"].append(str(row))
        if outcome.result == "not exported":
            return "x"
        number = list(self.reasons).index(f"{outcome.result}: {outcome.reason}") + 1
        return {"refused": f"r{number}", "wrong": f"**WRONG {outcome.shown}**"}.get(
            outcome.result, "**CRASH**"
        )

    def table(
        self, title: str, lines: Sequence[tuple[str, Sequence[Row]]], columns: Sequence[str]
    ) -> list[str]:
        text = [f"## {title}", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        text += [f"| {name} | " + " | ".join(self.cell(row) for row in rows) + " |" for name, rows in lines]
        return [*text, ""]


def write_page(path: Path, outcomes: Sequence[Outcome], rows: Sequence[Row]) -> None:
    """Write the page: a table for every float type, and one of quantized weights."""
    page = _Page(outcomes)
    text: list[str] = []
    for dtype in FLOATS:
        chosen = [row for row in rows if row.dtype == dtype]
        exporters = list(dict.fromkeys(row.exporter for row in chosen))
        families = list(dict.fromkeys(row.family for row in chosen))
        lines = [(family, [Row(family, exporter, dtype) for exporter in exporters]) for family in families]
        text += page.table(dtype, lines, exporters)
    chosen = [row for row in rows if row.dtype not in FLOATS]
    models = list(dict.fromkeys((row.family, row.exporter) for row in chosen))
    dtypes = list(dict.fromkeys(row.dtype for row in chosen))
    lines = [(dtype, [Row(*model, dtype) for model in models]) for dtype in dtypes]
    text += page.table("Quantized weights", lines, [" ".join(model) for model in models])
    text += ["## Reasons", ""]
    for number, (reason, which) in enumerate(page.reasons.items(), 1):
        more = f" and {len(which) - 3} more" if len(which) > 3 else ""
        text.append(f"{number}. {reason} ({', '.join(which[:3])}{more})")
    text += ["", *_mutants(), *_node_cases(path.with_name("node-cases.md"))]
    ran = [outcome for outcome in outcomes if outcome.result != "not exported"]
    proved = sum(outcome.result == "proved" for outcome in ran)
    count = f"{proved} of {len(ran)} files that an exporter wrote are proved, compiled and exact."
    path.write_text("\n".join([_HEAD, count, "", *text, "", _machine(), ""]))


def _mutants() -> list[str]:
    """What came of models with one thing changed, where tools/mutants.py was run."""
    counts = read_counts()
    if counts is None:
        return []
    rows = [f"| {what} | {count} |" for what, count in counts.items()]
    about = "Good graphs with one thing changed (`python -m tools.mutants`): each must be refused or exact."
    return ["## Mutants", "", about, "", "| outcome | mutants |", "|---|---:|", *rows, ""]


def _node_cases(page: Path) -> list[str]:
    """The totals of the page of ONNX's own cases."""
    lines = page.read_text().splitlines() if page.exists() else []
    totals = [line for line in lines if line.startswith(("| operator", "|---", "| **all"))]
    about = f"By operator in [{page.name}]({page.name})."
    return ["## ONNX's own node cases", "", about, "", *totals[:3], ""]


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {datetime.date.today().isoformat()}"
