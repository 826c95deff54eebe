"""Two small networks that are no decoders, for the tests of what is refused."""

# mypy: disable-error-code="misc"
# PyTorch is not followed by mypy, so its Module counts as Any, which strict mode does not let be subclassed.

from __future__ import annotations

import math
from pathlib import Path

import torch

from kvc_models.export import DEFAULT_OPSET, Traced, export_traced
from kvc_models.families import CONTEXT, VOCAB
from kvc_models.tiny import SEED


class _Encoder(torch.nn.Module):
    """A small BERT-like network, every token attends to all: input_ids i64[b, s] -> logits f32[b, s, V]."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = torch.nn.Embedding(VOCAB, width)
        self.positions = torch.nn.Embedding(CONTEXT, width)
        self.projections = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width) for _ in range(layers))
        self.outputs = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(layers))
        self.head = torch.nn.Linear(width, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        batch, length = input_ids.shape
        x = self.tokens(input_ids) + self.positions(torch.arange(length))
        for project, output, norm in zip(self.projections, self.outputs, self.norms):
            split = project(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            query, key, value = split.unbind(0)
            scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
            mixed = (scores.softmax(-1) @ value).permute(0, 2, 1, 3).reshape(batch, length, -1)
            x = norm(x + output(mixed))
        logits: torch.Tensor = self.head(x)
        return logits


def export_encoder(out: Path, *, opset: int = DEFAULT_OPSET) -> Path:
    """Export a bidirectional encoder: inputs and outputs like a decoder's, attention not causal."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = _Encoder()
    ids = torch.arange(12).reshape(2, 6)
    both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    traced = Traced(module, (ids,), {"input_ids": both}, ["input_ids"], ["logits"])
    return export_traced(traced, out, opset=opset, external_data=False)


class _Cnn(torch.nn.Module):
    """A small image classifier: image f32[b, 3, 32, 32] -> scores f32[b, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=2, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(8, 16, 3, stride=2, padding=1),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(16, 10),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.layers(image)
        return scores


def export_cnn(out: Path, *, opset: int = DEFAULT_OPSET) -> Path:
    """Export a small convolutional network: no tokens, no attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = _Cnn()
    shapes = {"image": {0: torch.export.Dim.DYNAMIC}}
    traced = Traced(module, (torch.zeros(2, 3, 32, 32),), shapes, ["image"], ["scores"])
    return export_traced(traced, out, opset=opset, external_data=False)
