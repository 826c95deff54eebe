"""Encoders of encoder-decoder pairs, exported by themselves: `inputs [batch, ...] -> [batch, rows, d]`."""

# mypy: disable-error-code="misc"
# PyTorch is not followed by mypy, so its Module counts as Any, which strict mode does not let be subclassed.

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kvc_models.adapt import known_maxima, without_complex_numbers
from kvc_models.export import DEFAULT_OPSET, EXAMPLE_BATCH, EXAMPLE_SEQ, Traced, export_traced


class _Features(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.encoder(features).last_hidden_state
        return result


class _Text(_Features):
    def forward(  # type: ignore[override]
        self, features: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        result = self.encoder(input_ids=features, attention_mask=attention_mask)
        rows: torch.Tensor = result.last_hidden_state
        return rows


def export_pair_encoder(model: Any, out: Path, *, opset: int = DEFAULT_OPSET) -> Path:
    """Export the encoder of a pair of kvc_models.pairs; its output is last_hidden_state [batch, rows, d].

    Its inputs are input_features [batch, mel bins, frames] with as many frames as the model has,
    input_values [batch, samples], or input_ids and attention_mask [batch, tokens]. Raises ModelError.
    """
    config, dynamic = model.config, torch.export.Dim.DYNAMIC
    names = ["input_ids", "attention_mask"]
    module: torch.nn.Module = _Features(model)
    both = {0: dynamic, 1: dynamic}
    shapes: dict[str, Any] = {"features": both}
    given: tuple[torch.Tensor, ...]
    if config.model_type == "whisper":
        frames = 2 * config.max_source_positions
        names, shapes = ["input_features"], {"features": {0: dynamic}}
        given = (torch.randn(EXAMPLE_BATCH, config.num_mel_bins, frames).to(model.dtype),)
    elif config.model_type == "moonshine":
        names, given = ["input_values"], (torch.randn(EXAMPLE_BATCH, 4000).to(model.dtype),)
    else:
        ids = torch.arange(EXAMPLE_BATCH * EXAMPLE_SEQ).reshape(EXAMPLE_BATCH, EXAMPLE_SEQ)
        module, given = _Text(model), (ids, torch.ones_like(ids))
        shapes = {"features": both, "attention_mask": both}
    traced = Traced(module, given, shapes, names, ["last_hidden_state"])
    with without_complex_numbers(), known_maxima():
        return export_traced(traced, out, opset=opset, external_data=False)
