"""An ONNX file in ONNX Runtime: what a compiled model is compared with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

Logits = NDArray[np.float32]
_TYPES: Final = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
EXACT_PRODUCTS: Final = ("session.qdq_matmulnbits_accuracy_level", "1")
"""ONNX Runtime makes MatMulNBits of a product with a dequantized weight, and would quantize x to 8 bits."""


class Graph:
    """An ONNX file in ONNX Runtime, on one thread.

    basic: whether operators are left alone, not fused; takes less time to load.

    Raises:
        Exception: of ONNX Runtime, if it cannot load the file.
    """

    def __init__(self, path: Path, *, basic: bool = False) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry(*EXACT_PRODUCTS)
        if basic:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.caches = [name for name in self.inputs if name.startswith("past")]
        self.outputs = ["logits", *(name.replace("past_key_values", "present") for name in self.caches)]
        self.head_dim = _head_dim(path)

    def logits(self, tokens: Sequence[int]) -> Logits:
        """float32 [len(tokens), V] of one sequence, nothing cached."""
        ids = np.array([tokens], np.int64)
        logits, _ = self.run(ids, np.ones_like(ids), np.arange(len(tokens))[None])
        row: Logits = logits[0]
        return row

    def pieces(self, tokens: Sequence[int], counts: Sequence[int]) -> Logits:
        """The same of sum(counts) tokens, a piece at a time through the caches."""
        rows, start = list[Logits](), 0
        past: list[NDArray[Any]] | None = None
        for count in counts:
            end = start + count
            ids, mask = np.array([tokens[start:end]], np.int64), np.ones((1, end), np.int64)
            logits, past = self.run(ids, mask, np.arange(start, end)[None], past)
            rows.append(logits[0])
            start = end
        return np.concatenate(rows)

    def run(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        past: Sequence[NDArray[Any]] | None = None,
    ) -> tuple[Logits, list[NDArray[Any]]]:
        """Logits [b, s, V] and the new caches, of tokens [b, s] behind `past`."""
        known = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {}
        for name, value in self.inputs.items():
            if name in known:
                feeds[name] = known[name].astype(_TYPES[value.type])
        for index, name in enumerate(self.caches):
            value = self.inputs[name]
            dim = value.shape[3] if isinstance(value.shape[3], int) else self.head_dim
            empty = (len(ids), value.shape[1], 0, dim)
            feeds[name] = past[index] if past else np.zeros(empty, _TYPES[value.type])
        logits, *caches = self.session.run(self.outputs, feeds)
        return logits.astype(np.float32), caches

    def left_padded(self, sequences: Sequence[Sequence[int]], steps: int) -> list[list[Logits]]:
        """What a batch says, padded at the left to equal lengths, one more token a sequence each step.

        Returns:
            for every sequence `steps` + 1 rows [V]: after all but the last `steps` tokens, and after each.
        """
        lengths = [len(tokens) - steps for tokens in sequences]
        longest = max(lengths)
        ids = np.zeros((len(sequences), longest), np.int64)
        mask = np.zeros((len(sequences), longest), np.int64)
        for index, (tokens, length) in enumerate(zip(sequences, lengths)):
            ids[index, longest - length :] = tokens[:length]
            mask[index, longest - length :] = 1
        logits, past = self.run(ids, mask, np.maximum(mask.cumsum(axis=1) - 1, 0))
        rows = [[row[-1]] for row in logits]
        for step in range(steps):
            ids = np.array([[tokens[n + step]] for tokens, n in zip(sequences, lengths)], np.int64)
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
            positions = np.array([[n + step] for n in lengths])
            logits, past = self.run(ids, mask, positions, past)
            for row, new in zip(rows, logits):
                row.append(new[-1])
        return rows


def without_rings(path: Path, out: Path) -> Path:
    """Copy a graph of onnxruntime-genai so that it can be run from an empty past.

    GroupQueryAttention may say that the cache of a windowed layer is written in circles, and then takes none
    that is shorter than the window. Without that attribute it computes the same from a cache that grows.
    """
    model = onnx.load(path)
    for node in model.graph.node:
        for attribute in [a for a in node.attribute if a.name == "sliding_window_cache"]:
            node.attribute.remove(attribute)
    out.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, out)
    return out


def _head_dim(path: Path) -> int:
    """What the configuration beside the file says, for graphs that leave it open; 0 without one."""
    file = path.with_suffix(".assets") / "config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    whole, heads = config.get("hidden_size", 0), config.get("num_attention_heads", 1)
    return int(config.get("head_dim") or whole // heads)
