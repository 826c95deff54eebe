"""Small models with random weights, for tests: decoders of eight families, and two that are no decoders.

Every decoder comes with a small tokenizer, so that text can go in and out; what comes out is noise.
"""

# mypy: disable-error-code="misc"
# PyTorch is not followed by mypy, so its Module counts as Any, which strict mode does not let be subclassed.

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from kvc_models.export import DEFAULT_OPSET, ModelError, Traced, export_decoder, export_traced, save_assets

VOCAB: Final = 512
CONTEXT: Final = 256
WINDOW: Final = 8
SEED: Final = 0
WEIGHT_STD: Final = 0.08
"""Livelier than usual initial weights: attention is far from uniform, so that mistakes in it show."""

_SIZES: Final = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_GEMMA: Final = {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 32}
_LAYERS_GEMMA3: Final = ["sliding_attention", "full_attention", "sliding_attention"]

_CONFIGS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama": ("LlamaConfig", _SIZES),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    ),
    "qwen2": ("Qwen2Config", _SIZES),
    "mistral": ("MistralConfig", {**_SIZES, "sliding_window": WINDOW}),
    "qwen3": ("Qwen3Config", {**_SIZES, "head_dim": 32}),
    "gemma2": ("Gemma2Config", {**_SIZES, **_GEMMA}),
    "gemma3": (
        "Gemma3TextConfig",
        {**_SIZES, **_GEMMA, "num_hidden_layers": 3, "layer_types": _LAYERS_GEMMA3},
    ),
    "phi3": ("Phi3Config", _SIZES),
}

FAMILIES: Final = tuple(_CONFIGS)

END_OF_TEXT: Final = "<|endoftext|>"
_TEXT: Final = (
    "A compiler reads a program and writes another one that does the same, only faster or in less memory.",
    "The weights of a language model do not change while it runs; the keys and values of its cache grow.",
    "Every token looks back at the tokens before it, and never at those that are still to come.",
    "Pages of memory are handed out as a sequence grows, and taken back when the sequence ends.",
    "What is the capital of France? The capital of France is Paris. It lies on the river Seine.",
    "Once upon a time there was a small machine with two cores, which counted: 0 1 2 3 4 5 6 7 8 9 10.",
)
_CHAT: Final = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


@cache
def _end_of_text() -> int:
    """The id of the token that ends a text."""
    return int(tokenizer().convert_tokens_to_ids(END_OF_TEXT))


def tokenizer() -> Any:
    """A byte-level BPE tokenizer with at most `VOCAB` tokens, trained on a few sentences, always the same."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        chat_template=_CHAT + "{% if add_generation_prompt %}assistant: {% endif %}",
    )


def make_tiny(family: str) -> Any:
    """A transformers causal language model of `family` with seeded random weights, fp32, in evaluation mode.

    Raises:
        ModelError: no such family.
    """
    import transformers

    if family not in _CONFIGS:
        raise ModelError(f"no tiny model of the family {family!r}; there are {', '.join(FAMILIES)}")
    name, sizes = _CONFIGS[family]
    end = _end_of_text()
    config = getattr(transformers, name)(**sizes, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() < 2:  # norms stay near one, biases near zero, but no two are the same
                    parameter.add_(torch.randn_like(parameter), alpha=WEIGHT_STD)
                else:
                    parameter.normal_(0, WEIGHT_STD)
    model.generation_config.eos_token_id = end
    return model


def export_tiny(
    family: str,
    out: Path,
    *,
    with_past: bool = False,
    opset: int = DEFAULT_OPSET,
    external_data: bool = False,
) -> Path:
    """Export the tiny model of `family` to `out`, with its tokenizer beside it, and return `out`.

    Args:
        family: one of `FAMILIES`.
        out: the ONNX file.
        with_past: take and return keys and values, see `kvc_models.export`.
        opset: the ONNX operator set.
        external_data: put the weights into `out` + ".data" instead of the ONNX file itself.

    Raises:
        ModelError: no such family, or PyTorch cannot export it at this opset.
    """
    model = make_tiny(family)
    save_assets(model, tokenizer(), out)
    return export_decoder(model, out, with_past=with_past, opset=opset, external_data=external_data)


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
