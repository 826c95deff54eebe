"""RecognizeAttention: operators that are whole attentions, and what is proved of their masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attention_graphs import DIM, HEADS, TOLERANCE, Attention, Context, arrays, causal, i64
from tvm import relax
from tvm.relax import op

from kvc_passes.errors import UnsupportedModel
from kvc_passes.expand_markers import ExpandMarkers
from kvc_passes.markers import SDPA, Sdpa, marker
from kvc_passes.recognize_attention import RecognizeAttention
from support import attend, module_of, run


def marked(attrs: Sdpa, *extras: Any, past: bool = False) -> Any:
    """An attention that is one operator, recognized: the result, the module and its inputs' context."""
    c = Context(past)

    def body(emit: Any, *_: Any) -> Any:
        k, v = (emit(op.concat([p, n], axis=2)) if past else n for p, n in zip(c.past or "kv", (c.k, c.v)))
        more = [extra(emit, c) for extra in extras]
        type_ = relax.TensorType([c.batch, HEADS, c.sequence, DIM], "float32")
        return emit(marker(SDPA, [c.q, k, v, *more], attrs, type_), "/layers.0/Attention")

    module, names = module_of(c.params, body)
    return RecognizeAttention(c.roles, names).run(module), module


def seen(emit: Any, c: Context) -> Any:
    return causal(emit, c)


def counted_keys(emit: Any, c: Context) -> Any:
    """As genai's exports count: the sum of the attention mask, less one."""
    return emit(op.astype(emit(op.subtract(emit(op.sum(c.padding, axis=1)), i64(1))), "int32"))


def miscounted_keys(emit: Any, c: Context) -> Any:
    return emit(op.astype(emit(op.sum(c.padding, axis=1)), "int32"))


MARKED = {
    "causal": (Sdpa(0.25, causal=True), [], False, "causal"),
    "causal behind a past": (Sdpa(0.25, causal=True, offset="past"), [], True, "causal"),
    "window": (Sdpa(0.25, causal=True, offset="past", window=4), [], True, "window"),
    "a mask": (Sdpa(0.25, extras=("mask",)), [seen], True, "causal"),
    "causal, and the keys counted": (
        Sdpa(0.25, 2.0, causal=True, offset="past", extras=("lengths",)),
        [counted_keys],
        True,
        "causal",
    ),
}


@pytest.mark.parametrize(("attrs", "extras", "past", "kind"), MARKED.values(), ids=MARKED)
def test_an_operator_keeps_its_attributes(attrs: Sdpa, extras: Any, past: bool, kind: str) -> None:
    result, module = marked(attrs, *extras, past=past)
    (site,) = result.facts
    assert (site.scale, site.softcap, site.mask.kind) == (attrs.scale, attrs.softcap, kind)
    assert site.mask.window == attrs.window
    inputs = arrays(Attention(past=past), past=7 if past else 0)
    (expected,) = run(ExpandMarkers().run(module).module, *inputs)
    q, k, v = inputs[-3:]
    if past:
        k, v = (np.concatenate(pair, axis=2) for pair in zip(inputs[3:5], (k, v)))
    np.testing.assert_allclose(attend(q, k, v, site), expected.transpose(0, 2, 1, 3), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("attrs", "extras", "past", "reason"),
    [
        (Sdpa(0.25), [], False, "the attention is bidirectional"),
        (Sdpa(0.25, causal=True), [], True, "is not proved to show a token itself"),
        (
            Sdpa(0.25, causal=True, offset="past", extras=("lengths",)),
            [miscounted_keys],
            True,
            r"counts .* keys before the last one",
        ),
    ],
)
def test_an_operator_whose_mask_is_no_decoders_is_refused(
    attrs: Sdpa, extras: Any, past: bool, reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=f"attention at node '/layers.0/Attention' .*{reason}"):
        marked(attrs, *extras, past=past)
