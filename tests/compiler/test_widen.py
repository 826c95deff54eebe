"""Widened graphs: no 16-bit float is left, every number is the same, and the logits are PyTorch's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from kvc.widen import widen
from kvc_models import export_tiny, make_tiny
from kvc_models.families import VOCAB
from support import OnnxRuntime


@pytest.mark.parametrize(
    ("dtype", "opset", "family"),
    [("float16", 20, "llama"), ("bfloat16", 23, "gemma2"), ("bfloat16", 20, "gpt2"), ("float16", 23, "opt")],
)
def test_a_widened_graph_computes_what_its_weights_say(
    dtype: str, opset: int, family: str, tmp_path: Path
) -> None:
    narrow = export_tiny(family, tmp_path / "narrow.onnx", dtype=dtype, opset=opset)
    wide = widen(narrow, tmp_path / "wide.onnx")
    kinds = {x.name: x.data_type for x in onnx.load(wide).graph.initializer}
    assert not {TensorProto.FLOAT16, TensorProto.BFLOAT16} & set(kinds.values())
    before, after = (
        {x.name: numpy_helper.to_array(x) for x in onnx.load(path).graph.initializer}
        for path in (narrow, wide)
    )
    for name, value in before.items():
        if kinds[name] == TensorProto.FLOAT:
            np.testing.assert_array_equal(value.astype(np.float32), after[name])
    model = make_tiny(family, dtype).float()
    tokens = np.random.default_rng(0).integers(0, VOCAB, 37)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(tokens[None]), use_cache=False).logits[0].numpy()
    got = OnnxRuntime(wide).logits(list(tokens))
    # Constants that the exporter folded (scales, bounds, frequencies) carry 16-bit roundings.
    np.testing.assert_allclose(got, expected, atol=3e-3 if dtype == "float16" else 3e-2, rtol=0)


def test_narrow_weights_are_the_rounded_wide_ones() -> None:
    wide, narrow = make_tiny("llama"), make_tiny("llama", "bfloat16")
    for (name, a), (_, b) in zip(wide.named_parameters(), narrow.named_parameters(), strict=True):
        assert b.dtype == torch.bfloat16, name
        assert torch.equal(a.to(torch.bfloat16), b)
    frequencies = [x for name, x in narrow.named_buffers() if name.endswith("inv_freq")]
    assert frequencies
    assert all(x.dtype == torch.float32 for x in frequencies), "as after loading a checkpoint"
