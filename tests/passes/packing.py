"""Weights as MergeProducts and PackMatmuls ask for them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flat_graphs import PRODUCTS

from kvc.kernels.matmul import pack
from kvc_passes.pack_matmuls import PackedWeight


def packed(recipes: Mapping[str, PackedWeight], weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The packed weights by parameter, and every weight under its own name."""
    result = dict(weights)
    for name, recipe in recipes.items():
        parts = [weights[s.name].T if s.transposed else weights[s.name] for s in recipe.sources]
        assert [len(p) for p in parts] == [s.columns for s in recipe.sources]
        whole = np.concatenate(parts)
        assert whole.shape == (recipe.columns, recipe.depth)
        result[name] = pack(whole, PRODUCTS.traits.lanes)
    return result
