"""Runs a compiled model and ONNX Runtime on the same tokens, and says how far the logits are apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from kvc.artifact import Artifact
from kvc.runtime.executor import Executor, Segment

Logits = NDArray[np.float32]
PROMPTS: Final = (1, 17, 61)
CHUNKS: Final = (1, 7, 13, 3, 17, 14)
RAGGED: Final = (37, 3, 16, 29)
DECODED: Final = 4
_TYPES: Final = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


EXACT_PRODUCTS = ("session.qdq_matmulnbits_accuracy_level", "1")
"""ONNX Runtime makes MatMulNBits of a product with a dequantized weight, and would quantize x to 8 bits."""


class Graph:
    """An ONNX file in ONNX Runtime, on one thread.

    Raises:
        Exception: of ONNX Runtime, if it cannot load the file.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry(*EXACT_PRODUCTS)
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


@dataclass(frozen=True)
class Compared:
    """One kind of call."""

    name: str
    error: float
    """Largest absolute difference of a logit; NaN if there was one."""


class Comparison:
    """An artifact and the graphs that it must agree with."""

    def __init__(self, artifact: Artifact, seed: int = 0) -> None:
        self.executor = Executor(artifact)
        self.random = np.random.default_rng(seed)
        self.page = self.executor.plan.page_size

    def close(self) -> None:
        self.executor.close()

    def against(self, graph: Graph, padded: bool) -> Iterator[Compared]:
        """Prompts, chunks, decoding and ragged batches; `padded`: also left-padded batches."""
        for length in PROMPTS:
            tokens = self._tokens(length)
            got = self.executor.prefill([Segment(tokens, 0, self._pages(length)[0])])
            yield Compared(f"prompt of {length}", _error([(got[0], graph.logits(tokens)[-1])]))
        yield self._chunks(graph)
        sequences = [self._tokens(n + DECODED) for n in RAGGED]
        rows = self._ragged(sequences)
        alone = [graph.logits(tokens) for tokens in sequences]
        expected = [logits[-DECODED - 1 :] for logits in alone]
        yield Compared("ragged batch", _error(_pairs(rows, expected)))
        if padded:
            rows = self._ragged(sequences)
            expected = [np.stack(x) for x in graph.left_padded(sequences, DECODED)]
            yield Compared("left-padded batch", _error(_pairs(rows, expected)))

    def _tokens(self, length: int) -> list[int]:
        return [int(x) for x in self.random.integers(0, self.executor.facts.vocab, length)]

    def _pages(self, *lengths: int) -> list[list[int]]:
        """Pages for sequences of these lengths, from all over the pool."""
        counts = [-(-length // self.page) for length in lengths]
        chosen = iter(self.random.choice(self.executor.plan.pages, sum(counts), replace=False).tolist())
        return [[next(chosen) for _ in range(count)] for count in counts]

    def _chunks(self, graph: Graph) -> Compared:
        """A prompt in pieces, then single tokens."""
        tokens = self._tokens(sum(CHUNKS) + DECODED)
        expected = graph.logits(tokens)
        (pages,) = self._pages(len(tokens))
        pairs, start = [], 0
        for count in CHUNKS:
            got = self.executor.prefill([Segment(tokens[start : start + count], start, pages)])
            start += count
            pairs.append((got[0].copy(), expected[start - 1]))
        for at in range(start, len(tokens)):
            got = self.executor.decode([Segment([tokens[at]], at, pages)])
            pairs.append((got[0].copy(), expected[at]))
        return Compared("chunks, then decode", _error(pairs))

    def _ragged(self, sequences: Sequence[Sequence[int]]) -> list[list[Logits]]:
        """Prompts of unlike lengths in one call, then decoding together."""
        lengths = [len(tokens) - DECODED for tokens in sequences]
        pages = self._pages(*(len(tokens) for tokens in sequences))
        halves = [max(1, n // 2) for n in lengths]
        first = [Segment(t[:n], 0, p, wanted=False) for t, n, p in zip(sequences, halves, pages)]
        self.executor.prefill(first)
        rest = [Segment(t[h:n], h, p) for t, h, n, p in zip(sequences, halves, lengths, pages)]
        rows = [[row.copy()] for row in self.executor.prefill(rest)]
        for step in range(DECODED):
            again = [Segment([t[n + step]], n + step, p) for t, n, p in zip(sequences, lengths, pages)]
            for row, new in zip(rows, self.executor.decode(again)):
                row.append(new.copy())
        return rows


def _pairs(rows: Sequence[Sequence[Logits]], expected: Sequence[Any]) -> list[tuple[Logits, Logits]]:
    return [(got, right) for a, b in zip(rows, expected) for got, right in zip(a, b)]


def _error(pairs: Sequence[tuple[Logits, Logits]]) -> float:
    return float(np.max([np.abs(got.astype(np.float64) - right).max() for got, right in pairs]))
