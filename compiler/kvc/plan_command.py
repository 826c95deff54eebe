"""`kvc plan` and `kvc profile`: plans for one budget or several, saved, drawn and explained."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from kvc_passes.errors import BudgetError, InputError, TargetError
from kvc_passes.facts import to_json
from kvc_passes.plans import Workload

from .api import budget_of, planner
from .arguments import encoder_dims
from .machine import CpuMachine
from .options import parse_workload
from .plan_report import comparison_table, plan_tables, rates_table, reason_tables
from .planning.decide import Decision, Planner
from .planning.explain import Explanation, explain, longest, most_requests
from .planning.rates import save
from .planning.saved import SavedPlan, save_plan
from .targets import parse_target

Report = Callable[[str], None]
_PICTURES: Final = (".svg", ".png", ".html")


def run(options: argparse.Namespace, report: Report) -> tuple[Sequence[Any], int]:
    """What to print, and the exit status: 2 where no budget works. Raises kvc's errors."""
    if not options.budget:
        raise InputError("the budget is missing; give --budget 8GB, or --budget auto (see kvc plan --help)")
    if not (options.workload or options.max_context or options.max_batch):
        wanted = "a --workload, such as 8x256, or --max-context REQUESTS or --max-batch TOKENS"
        raise InputError(f"give {wanted} (see kvc plan --help)")
    if options.workload and (options.max_context or options.max_batch):
        raise InputError("--max-context and --max-batch find a workload: give no --workload beside them")
    if options.plot is not None:
        _require_plots(options.plot, _PICTURES, "pictures are written as .svg, .png or .html")
    if options.report is not None:
        _require_plots(options.report, (".html",), "a report is written as .html")
    machine = parse_target(options.target)
    budgets = [budget_of(text.strip(), machine) for text in options.budget.split(",")]
    alternatives = parse_workload(options.workload) if options.workload else None
    if len(budgets) > 1 and (options.json or options.save or options.plot or options.report):
        raise InputError("--json, --save, --plot and --report show one plan: give one budget")
    built = planner(
        options.model,
        target=options.target,
        allow=options.allow,
        state=options.state,
        encoder=options.encoder,
        encoder_dims=encoder_dims(options),
        tune_db=options.tune_db,
        report=report,
    )
    report("plan")
    if len(budgets) > 1:
        return _compared(built, budgets, lambda budget: alternatives or _found(built, budget, options))
    workload = alternatives or _found(built, budgets[0], options)
    decision = built.decide(budgets[0], workload)
    return _shown(options, built, decision), 0


def _found(built: Planner, budget: int, options: argparse.Namespace) -> tuple[Workload, ...]:
    """The largest workload of --max-context or --max-batch."""
    name = "--max-context" if options.max_context else "--max-batch"
    text = options.max_context or options.max_batch
    number, _, rows = text.partition("+")
    try:
        given, memory = int(number), int(rows or 0)
    except ValueError:
        given = memory = 0
    if given < 1 or memory < 0:
        raise InputError(f"{name} {text}: give a number, at least 1")
    reads = built.model.facts.reads_memory
    if reads != bool(memory):
        hint = f"write {name} {given}+1500" if reads else "the model reads none"
        raise InputError(f"{name} {text}: rows of an encoder's output: {hint}")
    limit = built.model.facts.context
    if name == "--max-batch" and limit is not None and given > limit:
        raise InputError(f"--max-batch {text}: the model has {limit} positions")
    find = longest if options.max_context else most_requests
    one = Workload(given, 1, memory=memory) if options.max_context else Workload(1, given, memory=memory)
    most = find(built, budget, given, memory)
    if most == 0:
        fitting = built.decide(budget, (one,))  # says why it does not fit
        most = find(fitting.by or built, budget, given, memory)  # it may with less for the encoder
    if most == 0:
        raise BudgetError(
            f"{name} {text}: nothing fits {budget} bytes", needed=built.least((one,)), given=budget
        )
    batch, context = (given, most) if options.max_context else (most, given)
    return (Workload(batch, context, memory=memory),)


def _compared(
    built: Planner, budgets: Sequence[int], workload_of: Callable[[int], tuple[Workload, ...]]
) -> tuple[Sequence[Table], int]:
    found: list[Decision | BudgetError] = []
    for budget in budgets:
        try:
            found.append(built.decide(budget, workload_of(budget)))
        except BudgetError as error:
            found.append(error)
    if all(isinstance(each, BudgetError) for each in found):
        raise next(each for each in found if isinstance(each, BudgetError))
    columns = [each if isinstance(each, BudgetError) else each.plan for each in found]
    return [comparison_table(built.model.facts.name, list(zip(budgets, columns)))], 0


def _shown(options: argparse.Namespace, built: Planner, decision: Decision) -> Sequence[Any]:
    plan, name = decision.plan, built.model.facts.name
    if options.save:
        allow = tuple(part for text in options.allow for part in text.split(","))
        save_plan(options.save, SavedPlan(name, options.target, allow, plan))
    why: Explanation | None = None
    if options.plot or options.report or not options.json:
        why = explain(decision.by or built, decision)
    if why is not None and (options.plot or options.report):
        from .planning.page import draw, page

        if options.plot:
            draw(options.plot, why, plan)
        if options.report:
            page(options.report, decision.by or built, decision, why)
    if options.json or why is None:
        print(to_json(plan), end="")
        return []
    return [*plan_tables(plan, name), *reason_tables(plan, why)]


def _require_plots(path: Path, kinds: Sequence[str], message: str) -> None:
    """Raises InputError for another ending than `kinds`, which `message` says, and without matplotlib."""
    import importlib.util

    if path.suffix not in kinds:
        raise InputError(f"{path}: {message}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"{path}: pictures need matplotlib: pip install 'kvc[plot]'")


def profile_machine(target: str, report: Report) -> Sequence[Table]:
    """Measure this machine's rates and keep them. Raises TargetError for other targets than its CPU."""
    from .planning.profile import profile

    machine = parse_target(target)
    if not isinstance(machine, CpuMachine):
        raise TargetError(f"rates are measured for this machine's CPU, not for the target {target}")
    rates = profile(machine, report)
    path = save(rates, machine.key)
    return [rates_table(rates, f"{machine.key}: kept in {path}")]
