"""Weights as MergeProducts and PackMatmuls ask for them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flat_graphs import PRODUCTS

from kvc.kernels import packing
from kvc.stored_weights import stored
from kvc_passes.weights import WeightPart


def packed(recipes: Mapping[str, WeightPart], weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The packed weights by parameter, and every weight under its own name."""
    result = dict(weights)
    for name, recipe in recipes.items():
        weight = recipe.weight
        tensors = PRODUCTS.packed(weight.columns, weight.depth, weight.format)
        result[name] = stored(recipe, tensors[recipe.part], weights, packing)
        assert (result[name].shape, str(result[name].dtype)) == tensors[recipe.part][::-1]
    return result
