"""What a loaded model takes for pools and calls: shapes, and the bytes that plans count."""

from __future__ import annotations

from kvc.runtime.choices import choice_shapes
from kvc.runtime.host_memory import Shapes, padded
from kvc.runtime.pages import RECORD_BYTES
from kvc.runtime.sampler import scratch_bytes
from kvc_passes.facts import ModelFacts
from kvc_passes.plans import Plan


def input_shapes(plan: Plan, facts: ModelFacts) -> Shapes:
    """Dtype and shape of the inputs of the largest call."""
    tokens, reaches = max(plan.chunk, plan.max_batch), [group.reach for group in plan.groups]
    tables = {
        f"table_{g}": ("int32", (plan.max_batch, plan.table_columns(reach.memory)))
        for g, reach in enumerate(reaches)
    }
    memory = {
        "memory_last": ("int64", (tokens,)),
        "memory": ("float32", (plan.chunk, facts.memory[0] if facts.memory else 0)),
        "memory_slots": ("int32", (plan.chunk,)),
    }
    return {
        "tokens": ("int64", (tokens,)),
        "positions": ("int64", (tokens,)),
        **{f"slots_{g}": ("int32", (tokens,)) for g, reach in enumerate(reaches) if not reach.memory},
        "tiles": ("int32", (plan.max_tiles, 3)),
        **tables,
        "rows": ("int32", (plan.max_batch,)),
        **(memory if facts.memory else {}),
    }


def table_bytes(plan: Plan, facts: ModelFacts) -> int:
    """Bytes of the largest call's inputs, and of what is remembered of pages (Bytes.tables)."""
    inputs = sum(padded(dtype, shape) for dtype, shape in input_shapes(plan, facts).values())
    if plan.target["kind"] == "cuda":  # whose memory is what is counted
        return inputs
    if facts.memory:  # requests keep what they came with: they may have to be computed again
        inputs += plan.max_batch * padded("float32", (plan.max_memory, facts.memory[0]))
    return inputs + RECORD_BYTES * sum(group.pages for group in plan.groups)


def logits_bytes(plan: Plan, facts: ModelFacts) -> int:
    """Bytes of the logits of the most rows that one call returns (a part of Bytes.outputs)."""
    return padded("float32", (plan.max_batch, facts.logits))


def choice_bytes(plan: Plan, facts: ModelFacts) -> int:
    """Bytes that choosing tokens takes beside logits (the rest of Bytes.outputs)."""
    if plan.target["kind"] != "cuda":
        return scratch_bytes(facts.logits)
    return sum(padded(*each) for each in choice_shapes(plan.max_batch, facts.choices).values())


def pool_bytes(plan: Plan, facts: ModelFacts) -> int:
    """Bytes of the page pools as they are allocated (Bytes.pools)."""
    return sum(padded(*each) for each in pool_shapes(plan, facts).values())


def pool_shapes(plan: Plan, facts: ModelFacts, *, memory: bool = False) -> Shapes:
    """Dtypes and shapes of what the sites keep: k_0, v_0, k_1, ...; `memory`: of cross-attention alone."""
    pages = {site: group.pages for group in plan.groups for site in group.sites}
    return {
        f"{name}_{site.index}": (dtype, (pages[site.index], *shape))
        for site in facts.sites
        if site.mask.reach.memory or not memory
        for name, (dtype, shape) in site.state(plan.page_size, plan.keys_transposed).items()
    }
