"""What a person looks at: tables of plans, models, checks and timings."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from kvc_passes.facts import ModelFacts, StateForm
from kvc_passes.sites import AttentionSite

from .options import format_size

if TYPE_CHECKING:
    from .checks import Check
    from .tuning.records import Choice


def add_row(table: Table, *cells: str | Text) -> None:
    """Add a row of texts as they are: names of files and nodes may look like markup."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in ascending order, briefly: 0-4,6."""
    parts = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        first, *rest = (number for _, number in run)
        parts.append(f"{first}-{rest[-1]}" if rest else str(first))
    return ",".join(parts)


def model_tables(facts: ModelFacts) -> list[Table]:
    """What was proved about a model."""
    summary = Table(title=Text(facts.name), title_justify="left", show_header=False)
    parameters = ", ".join(f"{format_size(size)} {dtype}" for dtype, size in facts.parameter_bytes.items())
    context = "unbounded" if facts.context is None else f"{facts.context} positions"
    add_row(summary, "parameters", parameters)
    add_row(summary, "vocabulary", f"{facts.vocab} tokens, {facts.logits} logits")
    add_row(summary, "context", context)
    add_row(summary, "KV state", f"{facts.kv_token_bytes():,} bytes a token over {len(facts.sites)} layers")
    if facts.memory is not None:
        width, dtype = facts.memory
        size = f"{facts.memory_row_bytes():,} bytes a row"
        add_row(summary, "encoder's output", f"rows of {width} {dtype} numbers; state {size}")
    add_row(
        summary, "positions", f"proved from {', '.join(facts.positions) or 'nothing: the model uses none'}"
    )
    add_row(summary, "token-wise", f"proved: of {facts.nodes} ONNX nodes, only attention mixes tokens")
    sites = Table(title="attention", title_justify="left")
    for name in (
        "sites",
        "first node",
        "heads",
        "KV heads",
        "dim",
        "scale",
        "softcap",
        "RoPE",
        "KV",
        "mask",
        "proof",
    ):
        sites.add_column(name, justify="right" if name in ("heads", "KV heads", "dim", "scale") else "left")
    for _, group in groupby(facts.sites, key=_geometry):
        add_row(sites, *_site_row(list(group)))
    return [summary, sites, _forms_table(facts)]


def _forms_table(facts: ModelFacts) -> Table:
    """For layers alike, the forms that their state may be kept in, and why not in others."""
    table = Table(title="forms of the state", title_justify="left")
    for name in ("sites", "form", "bytes a token", ""):
        table.add_column(name, justify="right" if name == "bytes a token" else "left")

    def alike(pair: tuple[AttentionSite, tuple[StateForm, ...]]) -> list[tuple[object, ...]]:
        return [(f.name, f.token_bytes, re.sub("'.*?'", "", f.detail)) for f in pair[1]]

    for _, run in groupby(zip(facts.sites, facts.forms), key=alike):
        pairs = list(run)
        for i, form in enumerate(pairs[0][1]):
            size = f"{form.token_bytes:,}" if form.legal else "not legal"
            add_row(
                table, "" if i else ranges([site.index for site, _ in pairs]), form.name, size, form.detail
            )
        table.add_section()
    return table


def _geometry(site: AttentionSite) -> tuple[object, ...]:
    return (
        site.heads,
        site.kv_heads,
        site.head_dim,
        site.value_dim,
        site.scale,
        site.softcap,
        site.mask,
        site.rope,
        site.slopes,
        site.bias,
        site.sinks is None,
        site.kv_dtype,
    )


def _site_row(group: Sequence[AttentionSite]) -> list[str]:
    site = group[0]
    dim = str(site.head_dim) if site.head_dim == site.value_dim else f"{site.head_dim}/{site.value_dim}"
    indices = str(site.index) if len(group) == 1 else f"{site.index}-{group[-1].index}"
    cap = "" if site.softcap is None else f"{site.softcap:g}"
    numbers = [str(site.heads), str(site.kv_heads), dim, f"{site.scale:.5g}"]
    return [
        indices,
        site.node,
        *numbers,
        cap,
        site.rope or ("ALiBi" if site.slopes else "learned, by distance" if site.bias else "none"),
        site.stored or site.kv_dtype,
        _mask(site),
        site.mask.proof,
    ]


def _mask(site: AttentionSite) -> str:
    """The mask in a few words, and a learned score where there is one."""
    mask = site.mask
    names = {
        "causal": "causal",
        "window": f"window {mask.window}",
        "chunk": f"chunks of {mask.chunk}",
        "sinks": f"first {mask.sinks}, window {mask.window}",
        "predicate": mask.predicate,
        "memory": "an encoder's output",
    }
    return names[mask.kind] + (", learned score" if site.sinks is not None else "")


def check_table(checks: Sequence[Check], name: str) -> Table:
    """Promises and whether they were kept."""
    table = Table(title=Text(name), title_justify="left")
    for column in ("check", "of", "measured", "at most", ""):
        table.add_column(column, justify="right" if column in ("measured", "at most") else "left")
    for check in checks:
        number = "{:,.0f}" if check.unit == "bytes" else "{:.2e}"
        verdict = Text("kept", "green") if check.passed else Text("BROKEN", "red")
        if math.isinf(check.limit) and check.passed:
            verdict = Text("allowed", "yellow")
        add_row(
            table,
            check.name,
            check.detail,
            number.format(check.measured),
            "" if math.isinf(check.limit) else number.format(check.limit),
            verdict,
        )
    return table


def timing_table(timings: Sequence[tuple[str, float, int]]) -> Table:
    """Seconds and changed places of every pass, in order."""
    table = Table(title="passes", title_justify="left")
    table.add_column("pass")
    table.add_column("seconds", justify="right")
    table.add_column("places changed", justify="right")
    for name, seconds, sites in timings:
        add_row(table, name, f"{seconds:.3f}", str(sites) if sites else "(unchanged)")
    table.add_section()
    add_row(table, "all", f"{sum(t[1] for t in timings):.3f}", "")
    return table


def kernels_table(kernels: Sequence[tuple[str, Choice]]) -> Table:
    """Where the parameters of every kernel come from."""
    table = Table(title="tuned kernels", title_justify="left")
    for name in ("kernel", "record", "speedup", "parameters"):
        table.add_column(name, justify="right" if name == "speedup" else "left")
    for name, choice in kernels:
        values = ", ".join(f"{n} {v}" for n, v in sorted(choice.values.items())) or "as by default"
        speedup = f"{1 / choice.share:.3f}" if choice.source == "measured" else ""
        add_row(table, name, choice.source, speedup, values)
    return table
