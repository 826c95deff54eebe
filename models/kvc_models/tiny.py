"""Small decoders with random weights, for tests: one for every family of `kvc_models.families`.

Every decoder comes with a small tokenizer, so that text can go in and out; what comes out is noise.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from kvc_models import families
from kvc_models.export import (
    DEFAULT_OPSET,
    DTYPES,
    Exporter,
    ModelError,
    export_decoder,
    save_assets,
)
from kvc_models.families import CONTEXT, VOCAB

SEED: Final = 0
WEIGHT_STD: Final = 0.08
"""Livelier than usual initial weights: attention is far from uniform, so that mistakes in it show."""

FAMILIES: Final = tuple(families.FAMILIES)

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


def make_tiny(family: str, dtype: str = "float32", **options: Any) -> Any:
    """A transformers causal language model of `family` with seeded random weights, in evaluation mode.

    Args:
        family: one of `FAMILIES`.
        dtype: "float32", "float16" or "bfloat16", of the weights; what a model computes in float32 whatever
            its weights are, such as rotary frequencies, stays so.
        options: replace options of the family's configuration.

    Raises:
        ModelError: no such family, or no such type.
    """
    import transformers

    if family not in families.FAMILIES:
        raise ModelError(f"no tiny model of the family {family!r}; there are {', '.join(FAMILIES)}")
    if dtype not in DTYPES:
        raise ModelError(f"no weights of type {dtype!r}; there are {', '.join(DTYPES)}")
    made = families.FAMILIES[family]
    end = _end_of_text()
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    config = getattr(transformers, made.config)(**{**made.options, **ends, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = transformers.AutoModelForCausalLM.from_config(config, **made.options_of_model).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() < 2:  # norms stay near one, biases near zero, but no two are the same
                    parameter.add_(torch.randn_like(parameter), alpha=WEIGHT_STD)
                else:
                    parameter.normal_(0, WEIGHT_STD)
    model.generation_config.eos_token_id = end
    return cast(model, dtype)


def cast(model: Any, dtype: str) -> Any:
    """What loading with `dtype` gives: what is stored in a checkpoint is converted, and nothing else."""
    kind = getattr(torch, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kind)
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            buffer.data = buffer.data.to(kind)
    model.config.dtype = kind
    return model


def export_tiny(
    family: str,
    out: Path,
    *,
    with_past: bool = False,
    opset: int = DEFAULT_OPSET,
    external_data: bool = False,
    exporter: Exporter = "dynamo",
    dtype: str = "float32",
) -> Path:
    """Export the tiny model of `family` to `out`, with its tokenizer beside it, and return `out`.

    Args:
        family: one of `FAMILIES`.
        out: the ONNX file.
        with_past: take and return keys and values, see `kvc_models.export`.
        opset: the ONNX operator set.
        external_data: put the weights into `out` + ".data" instead of the ONNX file itself.
        exporter: "dynamo", or "torchscript" for the older one of PyTorch.
        dtype: "float32", "float16" or "bfloat16".

    Raises:
        ModelError: no such family or type, or PyTorch cannot export it at this opset.
    """
    model = make_tiny(family, dtype)
    save_assets(model, tokenizer(), out)
    return export_decoder(
        model, out, with_past=with_past, opset=opset, external_data=external_data, exporter=exporter
    )
