"""onnxruntime-genai's model builder (0.18), told what it does not read from configurations of transformers 5.

- Two rotary bases (Gemma 3): it fails on `rope_parameters` of two kinds of layers.
- A window in every layer (Mistral): without `layer_types` it writes attention over a window-sized cache, and
  tells its runtime to allocate caches of the whole length.

The arguments are its own.
"""

from __future__ import annotations

import runpy
from typing import Any

import onnxruntime_genai.models.builders.base  # noqa: F401  imports transformers in a way of its own
import transformers


class _Configurations:
    """Stands for transformers.AutoConfig in the builder, and there alone."""

    loaded = transformers.AutoConfig

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        config = cls.loaded.from_pretrained(*arguments, **options)
        bases = getattr(config, "rope_parameters", None) or {}
        if "full_attention" in bases:
            config.rope_theta = bases["full_attention"]["rope_theta"]
            config.rope_local_base_freq = bases["sliding_attention"]["rope_theta"]
            config.rope_parameters = bases["full_attention"]
        if getattr(config, "sliding_window", None) and not hasattr(config, "layer_types"):
            config.layer_types = ["sliding_attention"] * config.num_hidden_layers
        return config


if __name__ == "__main__":
    transformers.AutoConfig = _Configurations
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
