"""What a proved attention asks of a kernel."""

from __future__ import annotations

from kvc_passes.sites import AttentionSite

from .attention import AttentionShape


def attention_shape(site: AttentionSite, page_size: int) -> AttentionShape:
    """The shape of a site's kernels over pages of `page_size` tokens."""
    mask = site.mask
    return AttentionShape(
        heads=site.heads,
        kv_heads=site.kv_heads,
        head_dim=site.head_dim,
        value_dim=site.value_dim,
        scale=site.scale,
        softcap=site.softcap,
        window=mask.window,
        chunk=mask.chunk,
        sink_keys=mask.sinks,
        predicate=mask.predicate if mask.kind == "predicate" else None,
        slopes=site.slopes is not None,
        distances=len(site.bias[0]) if site.bias else 0,
        sink_scores=site.sinks is not None,
        guarded=site.guarded,
        kv_dtype=site.kv_dtype,
        stored=site.stored,
        shared=site.shared,
        sliced=site.sliced,
        whole=mask.kind == "memory",
        page_size=page_size,
    )
