"""Plans as files: saved by `kvc plan --save`, edited by a person, checked again by `kvc compile --plan`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvc_passes.errors import BudgetError, InputError
from kvc_passes.plans import Plan, Workload, plan_from_json
from kvc_passes.sites import STATE_FORMS, FormName
from kvc_passes.state_forms import KEYS

from ..layer_forms import judged, legal_forms
from ..options import format_size, parse_workload
from .budget import Draft, check_workload
from .decide import Decision, Planner
from .mixes import Chosen

_FORMAT: Final = 1
_VARIATION: Final = 2 << 20
"""Bytes by which the process may measure larger than when the plan was saved."""


@dataclass(frozen=True)
class SavedPlan:
    """A plan and what else compiling by it takes.

    Of the plan, budget, workload, chunk, ffn_chunk, forms and the groups' pages and max_context are obeyed;
    all else follows from them and is counted again. Where the process takes more than it did, pages are given
    back.
    """

    model: str
    target: str
    allow: tuple[str, ...]
    plan: Plan


def save_plan(path: Path, saved: SavedPlan) -> None:
    """Write a plan as JSON. Raises InputError where it cannot be written."""
    text = json.dumps({"kvc_plan": _FORMAT, **dataclasses.asdict(saved)}, indent=2) + "\n"
    try:
        path.write_text(text)
    except OSError as error:
        raise InputError(f"{path}: the plan cannot be written ({error.strerror})") from None


def read_plan(path: Path) -> SavedPlan:
    """Read what `save_plan` wrote. Raises InputError on any other file."""
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        if data["kvc_plan"] != _FORMAT:
            raise ValueError(f"format {data['kvc_plan']}")
        plan = plan_from_json(json.dumps(data["plan"]))
        _check_numbers(plan)
        return SavedPlan(str(data["model"]), str(data["target"]), tuple(map(str, data["allow"])), plan)
    except OSError as error:
        raise InputError(f"{path}: the plan cannot be read ({error.strerror})") from None
    except (AttributeError, InputError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is no plan that kvc plan --save wrote, or was edited wrongly: {error}"
        ) from None


def _check_numbers(plan: Plan) -> None:
    """Raises ValueError where a number that is obeyed makes no sense."""
    numbers = {"budget": plan.budget, "chunk": plan.chunk, "max_context": plan.max_context}
    numbers |= {"the process's bytes": plan.bytes.runtime}
    numbers |= {f"pages of group {i}": group.pages for i, group in enumerate(plan.groups)}
    for w in plan.workload:
        numbers |= {f"the batch of {w}": w.batch, f"the context of {w}": w.context}
        numbers |= {f"the encoder's rows of {w}": w.memory} if w.memory else {}
    for name, number in numbers.items():
        if type(number) is not int or not 0 < number < 1 << 63:
            raise ValueError(f"{name} is {number!r}")
    for w in plan.workload:
        if parse_workload(str(w)) != (w,):
            raise ValueError(f"the workload {w} is none")
    if not plan.workload:
        raise ValueError("the workload is empty")
    ffn = plan.ffn_chunk
    if type(ffn) is not int or not 0 <= ffn < plan.chunk:
        raise ValueError(f"ffn_chunk is {ffn!r}: it is 0 for no slices, or below the chunk")
    for form in plan.forms:
        if form not in STATE_FORMS:
            raise ValueError(f"there is no form of state {form!r}")


def checked(planner: Planner, saved: SavedPlan, where: Path) -> Decision:
    """The decision that a saved plan asks for, every byte counted anew.

    Raises InputError where it is not legal for the model, BudgetError where it is beyond its budget.
    """
    plan, facts = saved.plan, planner.model.facts
    if saved.model != facts.name or len(plan.forms) != len(facts.sites):
        raise InputError(
            f"{where} is a plan for {saved.model} with {len(plan.forms)} layers, not for {facts.name} with "
            f"{len(facts.sites)}"
        )
    _check_encoder(planner, plan, where)
    check_workload(facts, plan.workload)
    forms: tuple[FormName, ...] = plan.forms
    if set(forms) & set(KEYS):
        planner.model = judged(planner.model, planner.runner)
    for form in forms:
        if form not in planner.machine.forms:
            raise InputError(f"{where}: there are no kernels for {form} on the target {saved.target} yet")
    chosen = legal_forms(planner.model, forms, f"{where}: {{}}")
    _check_slices(planner, chosen, plan, where)
    whole = _counted(planner, chosen, plan, where)
    if whole.bytes.total > plan.budget and planner.encoder is not None:
        planner = planner.squeezed(planner.room(whole, plan.budget), plan.workload)
        whole = _counted(planner, chosen, plan, where)
    _check_budget(whole, where)
    return planner.finished(whole, planner.variant(chosen), chosen)


def _check_slices(planner: Planner, chosen: Chosen, saved: Plan, where: Path) -> None:
    lowered, name = planner.variant(chosen).lowered, planner.model.facts.name
    if saved.ffn_chunk and not lowered.segments:
        raise InputError(
            f"{where}: ffn_chunk is {saved.ffn_chunk}, but nothing of {name} takes less in slices"
        )
    if saved.ffn_chunk % lowered.unit:
        raise InputError(
            f"{where}: ffn_chunk is {saved.ffn_chunk}; for {name} it is a multiple of {lowered.unit}"
        )


def _counted(planner: Planner, chosen: Chosen, saved: Plan, where: Path) -> Plan:
    """The plan with its forms, chunk and pages. Raises InputError where the workload needs other pages."""
    draft = Draft(planner.variant(chosen).costs, saved.budget, saved.workload, saved.chunk, saved.ffn_chunk)
    needed = draft.smallest()
    if len(needed.groups) != len(saved.groups):
        raise InputError(
            f"{where}: the model has {len(needed.groups)} groups of layers, not {len(saved.groups)}"
        )
    for number, (given, least) in enumerate(zip(saved.groups, needed.groups)):
        if given.pages < least.pages:
            raise InputError(
                f"{where}: group {number} has {given.pages} pages; the workload "
                f"{','.join(map(str, saved.workload))} needs {least.pages}"
            )
    context = max(saved.max_context, *(w.context for w in saved.workload))
    if (limit := planner.model.facts.context) is not None:
        context = min(context, limit)
    whole = draft.with_pages([group.pages for group in saved.groups], context)
    more = whole.bytes.runtime - saved.bytes.runtime
    if whole.bytes.total > saved.budget >= whole.bytes.total - more and more <= _VARIATION:
        # Only the process takes more than when the plan filled its budget: it fills what is left.
        pages = [min(a.pages, b.pages) for a, b in zip(saved.groups, draft.filled().groups)]
        whole = draft.with_pages(pages, context)
    return whole


def _check_encoder(planner: Planner, saved: Plan, where: Path) -> None:
    wanted = saved.encoder.name if saved.encoder else None
    given = planner.encoder.facts.name if planner.encoder else None
    if wanted != given:
        hint = "give none" if wanted is None else f"give {wanted}.onnx as --encoder"
        raise InputError(
            f"{where} is a plan {f'with the encoder {wanted}' if wanted else 'without encoder'}: {hint}"
        )


def _check_budget(plan: Plan, where: Path) -> None:
    total = plan.bytes.total
    if total > plan.budget:
        b = plan.bytes
        raise BudgetError(
            f"{where}: the plan takes {total} bytes ({format_size(total)}), its budget is {plan.budget}: "
            f"weights {format_size(b.weights)}, KV pages {format_size(b.pools)}, temporaries "
            f"{format_size(b.arena + b.workspaces)}, logits and tables {format_size(b.outputs + b.tables)}, "
            f"the process {format_size(b.runtime)}; raise its budget, or lower the pages or the chunk",
            needed=total,
            given=plan.budget,
        )


def workload_text(workload: tuple[Workload, ...]) -> str:
    """As a user writes it."""
    return ",".join(map(str, workload))
