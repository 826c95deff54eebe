"""A plan as pictures, and as one page that needs nothing else."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, Final

from kvc_passes.errors import InputError
from kvc_passes.plans import Plan

from ..compilation import bounds_of
from ..options import format_size
from ..pipeline import Phase
from ..plan_report import forms_text
from .decide import Decision, Planner
from .explain import Explanation, timeline

_COLOURS: Final = {
    "weights": "#4c72b0",
    "KV pages": "#dd8452",
    "temporaries": "#55a868",
    "logits and tables": "#8172b3",
    "encoder": "#c44e52",
    "process": "#937860",
}
_SHAPES: Final = {
    "paged_kv": "#dd8452",
    "x_absorbed": "#4c72b0",
    "mla_latent": "#55a868",
    "kv-int8": "#c44e52",
    "kv-fp8": "#937860",
    "kv-int4": "#8c8c8c",
}
_OTHER: Final = "#8172b3"
_PLAIN: Final = dict.fromkeys(("Date", "Creator", "Format", "Type"))
"""Nothing that differs from run to run, or that a page does not need."""


def draw(path: Path, why: Explanation, plan: Plan) -> None:
    """The curve of memory against time as .svg, .png or .html. Raises InputError if it cannot be written."""
    figure = _curve(why, plan)
    if path.suffix == ".html":
        _write(path, _template("curve.html.j2", title="Memory against time", svg=_svg(figure)).encode())
        return
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:], metadata=_PLAIN if path.suffix == ".svg" else None)
    _write(path, data.getvalue())


def page(path: Path, planner: Planner, decision: Decision, why: Explanation) -> None:
    """One file with the budget, the forms, the curve, memory over time and permissions.

    Raises InputError if it cannot be written.
    """
    plan, facts = decision.plan, planner.model.facts
    text = _template(
        "page.html.j2",
        name=facts.name,
        plan=plan,
        why=why,
        workload=", ".join(map(str, plan.workload)),
        forms=forms_text(plan.forms),
        size=format_size,
        parts=_parts(plan),
        pictures={
            "The budget": _svg(_bar(plan)),
            "Forms by layer": _svg(_layers(decision)),
            "Memory against time": _svg(_curve(why, plan)),
            "Temporaries over one call": _svg(_memory(decision)),
        },
    )
    _write(path, text.encode())


def _parts(plan: Plan) -> dict[str, int]:
    b = plan.bytes
    return {
        "weights": b.weights,
        "KV pages": b.pools,
        "temporaries": b.arena + b.workspaces,
        "logits and tables": b.outputs + b.tables,
        **({"encoder": b.encoder} if b.encoder else {}),
        "process": b.runtime,
    }


def _template(file: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvc.planning", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(file).render(**values)


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    """Inline SVG, without what only a file of its own needs."""
    data = io.StringIO()
    figure.savefig(data, format="svg", metadata=_PLAIN)
    return re.sub(r"^.*?(?=<svg)", "", data.getvalue(), count=1, flags=re.DOTALL)


def _bar(plan: Plan) -> Any:
    figure, axes = _figure(1.8)
    left = 0.0
    for name, size in _parts(plan).items():
        axes.barh([0], [size / 1e9], left=left, color=_COLOURS[name], label=f"{name} {format_size(size)}")
        left += size / 1e9
    axes.axvline(plan.budget / 1e9, color="black", linestyle="--", label=f"budget {format_size(plan.budget)}")
    axes.set_yticks([])
    axes.set_xlabel("GB")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.02), frameon=False, fontsize=8)
    return figure


def _layers(decision: Decision) -> Any:
    """Bytes of every layer's pages."""
    figure, axes = _figure(2.4)
    plan, sites = decision.plan, decision.variant.model.facts.sites
    pages = {site: group.pages for group in plan.groups for site in group.sites}
    sizes = [site.token_bytes() * plan.page_size * pages[site.index] / 1e6 for site in sites]
    for form in dict.fromkeys(plan.forms):
        own = [site for site, name in enumerate(plan.forms) if name == form]
        axes.bar(own, [sizes[site] for site in own], color=_SHAPES.get(form, _OTHER), label=form)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")
    axes.set_ylabel("MB of pages")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _curve(why: Explanation, plan: Plan) -> Any:
    figure, axes = _figure(3.2)
    x, y = [p.bytes / 1e9 for p in why.curve], [p.seconds for p in why.curve]
    axes.step(x, y, where="post", color=_COLOURS["weights"])
    axes.plot(x, y, "o", color=_COLOURS["weights"], markersize=4, label="plans for this workload")
    axes.plot(
        [plan.budget / 1e9], [plan.seconds], "D", color=_COLOURS["KV pages"], label="this plan, its budget"
    )
    axes.set_xlabel("budget, GB")
    axes.set_ylabel("predicted seconds")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _memory(decision: Decision) -> Any:
    figure, axes = _figure(2.8)
    plan, lowered = decision.plan, decision.variant.lowered
    phases: tuple[tuple[Phase, str], ...] = (
        ("prefill", _COLOURS["temporaries"]),
        ("decode", _COLOURS["weights"]),
    )
    for phase, colour in phases:
        bounds = bounds_of(phase, plan.chunk, plan.max_batch)
        rows = plan.ffn_chunk if phase == "prefill" else 0
        alive = timeline(lowered.functions[phase], bounds, lowered.segments, rows)
        steps = [i / max(1, len(alive) - 1) for i in range(len(alive))]
        axes.plot(steps, [size / 1e6 for size in alive], color=colour, linewidth=0.8, label=phase)
    axes.axhline(plan.bytes.arena / 1e6, color="black", linestyle="--", label="the arena")
    axes.set_xlabel("share of the call's kernels")
    axes.set_ylabel("MB")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return figure
