"""Decoders of encoder-decoder models, which read the encoder's output; weights are random.

    input_ids i64[batch, seq], encoder_hidden_states f32[batch, rows, d] -> logits f32[batch, seq, V]

In models of 16 bits, f32 is their own type.
"""

# mypy: disable-error-code="misc"
# PyTorch is not followed by mypy, so its Module counts as Any, which strict mode does not let be subclassed.

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from kvc_models.adapt import known_maxima, without_complex_numbers
from kvc_models.export import (
    DEFAULT_OPSET,
    EXAMPLE_BATCH,
    EXAMPLE_SEQ,
    Exporter,
    ModelError,
    Traced,
    export_traced,
    export_with_torchscript,
    save_assets,
)
from kvc_models.families import CONTEXT, VOCAB
from kvc_models.tiny import SEED, WEIGHT_STD, cast, tokenizer

_WHISPER: Final[dict[str, Any]] = {
    "model_type": "whisper",
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_mel_bins": 16,
    "max_source_positions": 40,
    "max_target_positions": CONTEXT,
    "vocab_size": VOCAB,
}

PAIRS: Final[dict[str, dict[str, Any]]] = {
    "tiny-whisper": _WHISPER,
    "tiny-bart": {
        "model_type": "bart",
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "max_position_embeddings": CONTEXT,
        "vocab_size": VOCAB,
    },
    "tiny-moonshine": {
        "model_type": "moonshine",
        "hidden_size": 64,
        "intermediate_size": 128,
        "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 2,
        "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "vocab_size": VOCAB,
    },
    "tiny-t5": {
        "model_type": "t5",
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": VOCAB,
    },
    "whisper-small": {
        **_WHISPER,
        "d_model": 768,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_attention_heads": 12,
        "decoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072,
        "num_mel_bins": 80,
        "max_source_positions": 1500,
        "max_target_positions": 448,
        "vocab_size": 51865,
    },
}
"""Options of their configurations. whisper-small has the shapes of the real one."""


class _Decoder(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        given = BaseModelOutput(last_hidden_state=encoder_hidden_states)
        given.attention_mask = None  # Moonshine's own kind of output has one
        result = self.model(decoder_input_ids=input_ids, encoder_outputs=given, use_cache=False)
        logits: torch.Tensor = result.logits
        return logits


def make_pair(name: str, dtype: str = "float32") -> Any:
    """The model `name` of PAIRS, with seeded random weights. Raises ModelError: there is none."""
    import transformers

    if name not in PAIRS:
        raise ModelError(f"no pair is called {name!r}; there are {', '.join(PAIRS)}")
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
    config = transformers.AutoConfig.for_model(**{**PAIRS[name], **ends})
    kind = transformers.AutoModelForSpeechSeq2Seq
    if type(config) not in kind._model_mapping:
        kind = transformers.AutoModelForSeq2SeqLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = kind.from_config(config).eval()
        if name.startswith("tiny"):  # livelier than usual, so that mistakes show
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 2:
                        parameter.normal_(0, WEIGHT_STD)
                    elif parameter.dim() < 2:
                        parameter.add_(torch.randn_like(parameter), alpha=WEIGHT_STD)
    return cast(model, dtype)


def export_pair_decoder(
    model: Any,
    out: Path,
    *,
    opset: int = DEFAULT_OPSET,
    exporter: Exporter = "dynamo",
    external_data: bool = False,
) -> Path:
    """Export a pair's decoder, with the small tokenizer; raises as kvc_models.export.export_decoder."""
    save_assets(model, tokenizer(), out)
    dynamic = torch.export.Dim.DYNAMIC
    rows = EXAMPLE_SEQ + 3
    memory = torch.randn(EXAMPLE_BATCH, rows, model.config.hidden_size).to(model.dtype)
    ids = torch.arange(EXAMPLE_BATCH * EXAMPLE_SEQ).reshape(EXAMPLE_BATCH, EXAMPLE_SEQ)
    names = ["input_ids", "encoder_hidden_states"]
    shapes = {name: {0: dynamic, 1: dynamic} for name in names}
    traced = Traced(_Decoder(model), (ids, memory), shapes, names, ["logits"])
    with without_complex_numbers(), known_maxima():
        if exporter == "torchscript":
            return export_with_torchscript(traced, out, opset=opset)
        return export_traced(traced, out, opset=opset, external_data=external_data)
