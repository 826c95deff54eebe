"""`kvc tune`: options, progress, and what a person sees at the end."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from kvc_passes.errors import InputError

from ..report import add_row
from .api import Outcome, tune
from .database import Database
from .search import Trial, Tuned
from .space import default_of

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def run(options: argparse.Namespace) -> Sequence[Any]:
    """Tune or merge; what to print. Raises kvc's errors."""
    if options.db is None:
        raise InputError("say where the records are kept: --db DIR (see kvc tune --help)")
    if options.merge:
        if options.model is not None:
            raise InputError("--merge joins databases: give no model")
        added = Database(options.db).merge(*(Database(path) for path in options.merge))
        return [Text(f"{options.db}: {added} records added")]
    if options.model is None:
        raise InputError("which model? give an ONNX file or an artifact (see kvc tune --help)")
    if options.plot is not None:
        _require_plots(options.plot)
    trials: list[Trial] = []
    outcome = _tuned(options, trials)
    if options.plot is not None and trials:
        _draw(options.plot, trials)
    failed = sum(t.record.outcome in ("failed", "timeout", "wrong") for t in trials)
    left_out = f", {failed} of them without a valid result" if failed else ""
    return [
        table_of(outcome),
        Text(
            f"{outcome.database}: {len(trials)} candidates measured{left_out}; "
            f"kvc compile --tune-db {outcome.database.parent} uses the best"
        ),
    ]


def _tuned(options: argparse.Namespace, trials: list[Trial]) -> Outcome:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("plan", total=options.trials)

        def shown(trial: Trial) -> None:
            trials.append(trial)
            text = f"{trial.task.name}: {1 / trial.best:.2f}x; all {1 / trial.total:.2f}x"
            if trial.seconds_left is not None:
                text += f"; {trial.seconds_left:.0f} s left"
            progress.update(bar, completed=trial.trial, description=text)

        return tune(
            options.model,
            db=options.db,
            trials=options.trials,
            seconds=None if options.time is None else parse_time(options.time),
            budget=options.budget or "auto",
            workload=options.workload,
            target=options.target,
            allow=options.allow,
            state=options.state,
            kernels=[name.strip() for name in options.kernels.split(",")],
            rpc=options.rpc,
            key=options.key,
            timeout=options.timeout,
            on_trial=shown,
            report=lambda name: progress.update(bar, description=name),
        )


def parse_time(text: str) -> float:
    """Seconds of "90s", "30m", "1.5h" or a number. Raises InputError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise InputError(f"--time {text}: write it as 90s, 30m or 2h")
    return float(match[1]) * _UNITS[match[2]]


def table_of(outcome: Outcome) -> Table:
    """Every kernel with its default and best time, heaviest first."""
    known = [t for t in outcome.tasks if t.default is not None]
    whole = max(outcome.predicted, sum(t.default or 0.0 for t in known))
    table = Table(title="kernels, and their share of the model's time", title_justify="left")
    for name in ("kernel", "default us", "best us", "speedup", "share", "trials", "parameters"):
        words = name in ("kernel", "parameters")
        table.add_column(name, justify="left" if words else "right", no_wrap=not words)
    for tuned in sorted(outcome.tasks, key=lambda t: -(t.default or 0.0)):
        add_row(table, *_row(tuned, whole))
    after = sum((t.default or 0.0) * t.best for t in known)
    before = sum(t.default or 0.0 for t in known)
    if before:
        table.caption = Text(f"all of them together: {before / after:.3f} times as fast as by default")
        table.caption_justify = "left"
    return table


def _row(tuned: Tuned, whole: float) -> tuple[str, ...]:
    if tuned.default is None:
        return tuned.task.name, "not measured", "", "", "", str(tuned.trials), ""
    each = tuned.default / sum(b.calls for b in tuned.task.buckets) * 1e6
    names = sorted({*tuned.values})
    text = ", ".join(f"{n} {tuned.values[n]} ({default_of(tuned.task, n)})" for n in names) or "as by default"
    return (
        tuned.task.name,
        f"{each:,.1f}",
        f"{each * tuned.best:,.1f}",
        f"{1 / tuned.best:.3f}",
        f"{tuned.default / whole:.1%}",
        str(tuned.trials),
        text,
    )


def _require_plots(path: Path) -> None:
    import importlib.util

    if path.suffix not in (".svg", ".png"):
        raise InputError(f"{path}: the picture is written as .svg or .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"{path}: pictures need matplotlib: pip install 'kvc[plot]'")


def _draw(path: Path, trials: Sequence[Trial]) -> None:
    """The whole workload's time in tuned kernels, with the best of each so far."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.step([t.trial for t in trials], [t.total for t in trials], where="post")
    axes.set_xlabel("candidates measured")
    axes.set_ylabel("time of the best so far, default = 1")
    axes.set_ylim(top=1.02)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path)
    except OSError as error:
        print(f"kvc: {path}: cannot be written ({error.strerror})", file=sys.stderr)
