"""What transformers itself generates: the tokens that a compiled model is held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvc_models import registry


def load(name: str, cache: Path | None = None) -> Any:
    """The model `name` as a transformers causal language model, fp32; `cache` is where downloads are kept.

    Raises:
        ModelError: no such model, or its weights cannot be had.
    """
    return registry.find(name).load(cache)[0]


def transformers_greedy(
    name: str, prompts: Sequence[Sequence[int]], max_new_tokens: int, cache: Path | None = None
) -> list[list[int]]:
    """The tokens that the model `name` adds to each prompt, always taking the likeliest one.

    Each prompt runs alone, without padding. A text ends after `max_new_tokens` or with an end-of-text token,
    which is part of what is returned.

    Args:
        name: a model of `kvc_models list`.
        prompts: token ids, at least one each.
        max_new_tokens: how many tokens to add at most, 1 or more.
        cache: where downloads are kept.

    Raises:
        ModelError: no such model, or its weights cannot be had.
    """
    model = load(name, cache)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], dtype=torch.int64)
        with torch.no_grad():
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
            )
        texts.append([int(token) for token in whole[0, ids.shape[1] :]])
    return texts
