"""What a person looks at of a plan: bytes, state, predicted times, reasons, budgets side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from rich.table import Table
from rich.text import Text

from kvc_passes.errors import BudgetError
from kvc_passes.plans import EncoderPlan, Plan, Workload, chunk_text
from kvc_passes.sites import Reach

from .options import format_size
from .planning.explain import Explanation
from .planning.rates import ROWS, Rates
from .report import add_row, ranges


def plan_tables(plan: Plan, facts_name: str) -> list[Table]:
    """Every byte of a plan and what it is for, and what the layers keep."""
    return [_bytes_table(plan, facts_name), _groups_table(plan)]


def _encoder_text(encoder: EncoderPlan) -> str:
    """What the encoder takes, here and in other lines."""
    arena = format_size(encoder.arena)
    if encoder.arena < encoder.natural:
        arena += f" instead of {format_size(encoder.natural)}"
    weights = format_size(encoder.weights)
    return f"inputs; of the lines above: weights {weights}, temporaries {arena}"


def _bytes_table(plan: Plan, facts_name: str) -> Table:
    b, on_gpu = plan.bytes, plan.target["kind"] == "cuda"
    process = "interpreter, libraries, tokenizer, threads (measured on this machine)"
    slices = f", feed-forward in slices of {plan.ffn_chunk}" if plan.ffn_chunk else ""
    lines = [
        ("weights", b.weights, "copied to the GPU" if on_gpu else "memory-mapped from the artifact"),
        ("KV pages", b.pools, f"pages of {plan.page_size} tokens, see below"),
        ("temporaries", b.arena, f"one arena; prefill in chunks of {plan.chunk} tokens{slices}"),
        ("workspaces", b.workspaces, "local buffers of kernels, of every thread"),
        ("logits", b.outputs, f"{plan.max_batch} rows, and the sampler's scratch"),
        ("tables", b.tables, f"block tables {plan.max_batch} x {plan.table_width}, positions, slots"),
        ("process", b.runtime, "CUDA's context and the machine code (a bound)" if on_gpu else process),
    ]
    if plan.encoder is not None:
        lines.insert(-1, ("encoder", b.encoder, _encoder_text(plan.encoder)))
    workloads = ",".join(map(str, plan.workload))
    table = Table(
        title=Text(f"{facts_name}: {workloads} in {format_size(plan.budget)}"), title_justify="left"
    )
    table.add_column("", no_wrap=True)
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    if not b.workspaces:
        lines = [line for line in lines if line[0] != "workspaces"]
    for name, size, meaning in lines:
        add_row(table, name, f"{size:,}", f"{size / plan.budget:.1%}", meaning)
    table.add_section()
    add_row(
        table,
        "promised",
        f"{b.total:,}",
        f"{b.total / plan.budget:.1%}",
        "the most GPU memory it will use" if on_gpu else "the most this process will use",
    )
    add_row(table, "budget", f"{plan.budget:,}", "", f"up to {plan.max_context} tokens a sequence")
    return table


def _groups_table(plan: Plan) -> Table:
    """What layers keep of a token, of how many, and what the budget could hold besides."""
    table = Table(title="state", title_justify="left")
    for name in ("layers", "form", "keeps", "pages", "tokens", "bytes", "bytes a token"):
        table.add_column(name, justify="left" if name in ("layers", "form", "keeps") else "right")
    for group in plan.groups:
        size = group.pages * group.page_bytes
        numbers = (group.pages, group.pages * plan.page_size, size, group.page_bytes // plan.page_size)
        add_row(table, ranges(group.sites), group.form, _keeps(group.reach), *(f"{n:,}" for n in numbers))
    alone, *others = plan.capacities
    most = [_requests(w) for w in others]
    table.caption = Text(
        f"within this budget at most: {alone.context:,} tokens for one request; {'; '.join(most)}"
    )
    table.caption_justify = "left"
    return table


def _requests(workload: Workload) -> str:
    count = f"{workload.batch:,} request{'s' * (workload.batch != 1)} of {workload.context:,} tokens"
    count += f", {workload.prefix:,} of them in common" if workload.prefix else ""
    return count + (f", and {workload.memory:,} rows of an encoder's output" if workload.memory else "")


def _keeps(reach: Reach) -> str:
    """Which tokens a sequence keeps."""
    if reach.memory:
        return "all rows of the encoder's output"
    if reach.chunk is not None:
        return f"a chunk of {reach.chunk}"
    if reach.window is None:
        return "all tokens"
    return (
        f"the first {reach.sinks} and the last {reach.window}" if reach.sinks else f"the last {reach.window}"
    )


def comparison_table(name: str, columns: Sequence[tuple[int, Plan | BudgetError]]) -> Table:
    """Plans for several budgets side by side; where one cannot work, the smallest that would."""
    table = Table(title=Text(f"{name}: budgets side by side"), title_justify="left")
    table.add_column("")
    for budget, _ in columns:
        table.add_column(format_size(budget), justify="right")

    def line(label: str, show: Callable[[Plan], str], refused: Callable[[BudgetError], str]) -> None:
        cells = (refused(c) if isinstance(c, BudgetError) else show(c) for _, c in columns)
        add_row(table, label, *cells)

    def lacks(error: BudgetError) -> str:
        return "-"

    line("workload", lambda p: ",".join(map(str, p.workload)), lambda e: f"needs {format_size(e.needed)}")
    line("promised", lambda p: format_size(p.bytes.total), lacks)
    line("weights", lambda p: format_size(p.bytes.weights), lacks)
    line("KV pages", lambda p: format_size(p.bytes.pools), lacks)
    line("temporaries", lambda p: format_size(p.bytes.arena), lacks)
    line("prefill chunk", lambda p: chunk_text(p.chunk, p.ffn_chunk), lacks)
    line("forms", lambda p: forms_text(p.forms), lacks)
    line("tokens a sequence", lambda p: f"{p.max_context:,}", lacks)
    line("one request", lambda p: f"{p.capacities[0].context:,} tokens", lacks)
    line("at once", lambda p: "; ".join(f"{w.batch:,} x {w.context:,}" for w in p.capacities[1:]), lacks)
    line("predicted", lambda p: f"{p.seconds:.2f} s", lacks)
    return table


def forms_text(forms: Sequence[str]) -> str:
    """Forms with their numbers of layers, where there are several."""
    counts = Counter(forms)
    return ", ".join(counts if len(counts) == 1 else (f"{form} x{n}" for form, n in counts.items()))


def reason_tables(plan: Plan, why: Explanation) -> list[Table]:
    """Predicted times, why layers are as they are, what a byte and a permission would buy."""
    reasons = _titled("why", ("layers", "form", ""), 3)
    for line in why.reasons:
        add_row(reasons, *line)
    reasons.caption, reasons.caption_justify = Text(why.slices), "left"
    curve = _titled("memory against time, for this workload", ("forms", "chunk", "budget", "predicted"), 1)
    for point in why.curve[:: max(1, len(why.curve) // 8)]:
        size = format_size(point.bytes)
        add_row(curve, point.forms, chunk_text(point.chunk, point.ffn), size, f"{point.seconds:.2f} s")
    curve.caption, curve.caption_justify = Text(why.bound), "left"
    columns = ("--allow", "bytes less", "tokens of one request", "predicted")
    gains = _titled("what permissions would buy", columns, 1)
    for gain in why.gains:
        cells = (format_size(gain.saved), f"{gain.context:,}", f"{gain.seconds:.2f} s")
        add_row(gains, gain.allow, *cells)
    return [_times(plan), reasons, curve, *([gains] if why.gains else [])]


def _times(plan: Plan) -> Table:
    times = _titled("predicted", ("workload", "prefill", "tokens/s", "decode", "tokens/s"), 1)
    for workload, t in zip(plan.workload, plan.times, strict=True):
        prefill, decode = (
            f"{tokens / seconds:,.0f}" if seconds else "-"
            for tokens, seconds in ((t.prompt_tokens, t.prefill_seconds), (t.answer_tokens, t.decode_seconds))
        )
        cells = (f"{t.prefill_seconds:.2f} s", prefill, f"{t.decode_seconds:.2f} s", decode)
        add_row(times, str(workload), *cells)
    times.caption, times.caption_justify = Text(f"rates: {plan.rates}"), "left"
    return times


def _titled(title: str, columns: Sequence[str], left: int) -> Table:
    """A table whose first `left` columns are texts, the others numbers."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right")
    return table


def rates_table(rates: Rates, title: str) -> Table:
    """What was measured of a machine."""
    table = Table(title=Text(title), title_justify="left", show_header=False)
    add_row(table, "memory", f"{rates.read / 1e9:.1f} GB/s")
    for bits, row in rates.products.items():
        one, many = bits / 8 / row[0] / 1e9, 2 * ROWS[-1] / row[-1] / 1e9
        text = f"{one:.1f} GB/s of one row, {many:.0f} GFLOP/s of {ROWS[-1]} rows"
        add_row(table, f"products, weights of {bits} bits", text)
    for name, pair in (("K and V", rates.attention), ("one key for all heads", rates.shared)):
        text = f"{pair[0] / 1e9:.0f} GFLOP/s in prefill, {pair[1] / 1e9:.0f} in decode"
        add_row(table, f"attention over {name}", text)
    for name, pair in rates.codes.items():
        text = f"{pair[0]:.2f} of that speed in prefill, {pair[1]:.2f} of the bytes a second in decode"
        add_row(table, f"attention over codes, kv-{name}", text)
    calls = f"{rates.call * 1e6:.1f} us a call, {rates.kernel * 1e6:.1f} on all threads"
    add_row(table, "other kernels", f"{rates.element / 1e9:.1f} GB/s, {calls}")
    return table
