"""`kvc.head_product` by its definition, for modules that are run before their weights are packed."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from kvc_passes.markers import HEAD_PRODUCT, HeadProduct


@functools.cache
def define_head_product() -> None:
    @tvm_ffi.register_global_func(HEAD_PRODUCT)
    def product(x: Any, weight: Any, text: str) -> Any:
        a = HeadProduct(**json.loads(text))
        x, weight = x.numpy().astype(float), weight.numpy().astype(float)
        first = a.first + np.arange(a.heads) // a.group * a.stride
        w = weight[:, first[:, None] + np.arange(a.width)]  # [depth, heads, width]
        y = np.einsum("bhnw,dhw->bhnd", x, w) if a.absorbed else np.einsum("bnhd,dhw->bnhw", x, w)
        return tvm.runtime.tensor(y.astype(np.float32))
