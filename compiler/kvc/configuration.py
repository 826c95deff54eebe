"""The config.json beside a model: a context length that graphs lack, and claims to hold against them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvc_passes.sites import AttentionSite


def assets_of(path: Path) -> Path:
    """The folder with tokenizer and configuration: `<model>.assets` beside the model, else its own folder."""
    own = path.with_suffix(".assets")
    return own if own.is_dir() else path.parent


@dataclass(frozen=True)
class Configuration:
    """What a config.json says. It decides nothing about how a model is compiled but the context's length."""

    values: dict[str, Any]

    @classmethod
    def beside(cls, path: Path) -> Configuration:
        """That of the model `path`; an empty one where there is none that can be read."""
        try:
            values = json.loads((assets_of(path) / "config.json").read_text())
        except (OSError, ValueError):
            values = {}
        if not isinstance(values, dict):
            values = {}
        text = values.get("text_config")
        return cls(values | text if isinstance(text, dict) else values)

    @property
    def context(self) -> int | None:
        """Most positions: graphs with rotary positions alone have no limit."""
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if found := self._size(name):
                return found
        return None

    def contradictions(self, sites: Sequence[AttentionSite], logits: int) -> tuple[str, ...]:
        """What the graph does otherwise, in sentences. The graph is the truth."""
        found = [
            self._differs("num_hidden_layers", len(sites), "attention layers"),
            self._differs("num_attention_heads", sites[0].heads, "query heads"),
            self._differs("num_key_value_heads", sites[0].kv_heads, "KV heads"),
            self._differs("vocab_size", logits, "logits"),
            self._unused("attention_chunk_size", {s.mask.chunk for s in sites}),
        ]
        if self.values.get("use_sliding_window", True) is not False:
            found.append(self._unused("sliding_window", {s.mask.window for s in sites}))
        return tuple(text for text in found if text is not None)

    def _size(self, name: str) -> int | None:
        value = self.values.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    def _differs(self, name: str, found: int, what: str) -> str | None:
        size = self._size(name)
        if size in (None, found):
            return None
        return f"config.json says {name} = {size}, the graph has {found} {what}; the graph is followed"

    def _unused(self, name: str, found: set[int | None]) -> str | None:
        size = self._size(name)
        if size is None or size in found:
            return None
        others = sorted(n for n in found if n is not None)
        has = f"has {', '.join(map(str, others))}" if others else "has none in any layer"
        return f"config.json says {name} = {size}, the graph {has}; the graph is followed"
