"""Rewrites while a model is exported: what PyTorch cannot write to ONNX, by something equal that it can."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


def _angles(module: Any, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Cosines and sines [b, s, D / 2, 2] of Llama 4's rotary embedding, which has them as complex numbers."""
    frequencies = module.inv_freq[None, None, :].float()
    angles = position_ids[:, :, None].float() * frequencies
    both = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return both * module.attention_scaling


def _rotate(
    queries: torch.Tensor, keys: torch.Tensor, angles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbouring elements of q and k [b, s, h, D] rotated; a complex product written out."""
    cos, sin = angles[:, :, None, :, 0], angles[:, :, None, :, 1]

    def turn(x: torch.Tensor) -> torch.Tensor:
        even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(3).type_as(x)

    return turn(queries), turn(keys)


@contextlib.contextmanager
def without_complex_numbers() -> Iterator[None]:
    """Rotary embeddings in complex numbers are computed in real ones; ONNX has no complex type."""
    from transformers.models.llama4 import modeling_llama4

    with (
        mock.patch.object(modeling_llama4.Llama4TextRotaryEmbedding, "forward", _angles),
        mock.patch.object(modeling_llama4, "apply_rotary_emb", _rotate),
    ):
        yield


@contextlib.contextmanager
def known_maxima() -> Iterator[None]:
    """MPT's `max(0, n)` of lengths that tracing knows only by name: told which of the two it always is.

    MPT cuts its bias [h, 1, C] with max(0, 1 - queries), which is always 0, and max(0, C - keys), which is
    C - keys in every context that the model has. Left as maxima, PyTorch cannot prove that shapes agree.
    """
    from transformers.models.mpt import modeling_mpt

    def largest(least: Any, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return value if value.node.hint > 0 else least
        return max(least, value)

    with mock.patch.object(modeling_mpt, "max", largest, create=True):
        yield
