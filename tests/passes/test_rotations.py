"""Rotations: which elements are turned, by what; and what is no rotation by halves."""

from __future__ import annotations

import numpy as np
import pytest
from rotary_graphs import DIM, HALF, Turn, attention, turned
from tvm import relax
from tvm.relax import op

from kvc_passes.conditions import Unprovable
from kvc_passes.graph import Graph
from kvc_passes.rotations import Rotation, Rotations
from kvc_passes.state_forms import Forms
from support import Draft


def read(turn: Turn = turned, **options: bool | int) -> Rotation:
    module, _ = attention(turn, **options)
    forms = Forms(Graph(module["main"]))
    key = forms.markers()[0].args[2]
    return Rotations(forms.graph, forms.provenance).read(key, forms.provenance.pieces(key))


@pytest.mark.parametrize("frequencies", [False, True])
@pytest.mark.parametrize("half", [HALF, DIM // 2])
@pytest.mark.parametrize("joined", [False, True])
def test_keys_that_are_turned_in_their_first_elements(joined: bool, half: int, frequencies: bool) -> None:
    found = read(joined=joined, half=half, frequencies=frequencies)
    assert (found.half, found.key.width, found.key.stride) == (half, DIM, DIM)
    assert found.key.first == (4 * DIM if joined else 0)
    assert found.projection.x.name.startswith("x_")
    assert [name.partition("_")[0] for name in (found.angles.cosine[0].name, found.angles.sine[0].name)] == [
        "cos",
        "sin",
    ]
    assert (found.angles.cosine[1], found.angles.sine[1]) == (0, 0)


def halves(emit: Draft, x: relax.Var) -> list[relax.Var]:
    half = int(x.ty.shape.values[3].value) // 2
    return [emit(op.strided_slice(x, [3], [b], [b + half], assume_inbound=True)) for b in (0, half)]


def by_halves(emit: Draft, x: relax.Var, cosine: relax.Var, sine: relax.Var) -> relax.Var:
    """Two halves, each spelled out, as operators for rotary embeddings are expanded."""
    (a, b), (c, _), (s, _) = (halves(emit, v) for v in (x, cosine, sine))
    low = emit(op.subtract(emit(op.multiply(a, c)), emit(op.multiply(b, s))))
    high = emit(op.add(emit(op.multiply(s, a)), emit(op.multiply(c, b))))
    return emit(op.concat([low, high], axis=-1))


def test_another_spelling() -> None:
    assert read(by_halves).half == HALF


def the_other_way(emit: Draft, x: relax.Var, cosine: relax.Var, sine: relax.Var) -> relax.Var:
    return turned(emit, x, cosine, emit(op.negative(sine)))


def with_other_cosines(emit: Draft, x: relax.Var, cosine: relax.Var, sine: relax.Var) -> relax.Var:
    a, b = halves(emit, cosine)
    return turned(emit, x, emit(op.concat([a, emit(op.add(b, b))], axis=-1)), sine)


def scaled(emit: Draft, cosine: relax.Var, factors: np.ndarray) -> relax.Var:
    return emit(op.multiply(cosine, relax.const(factors.astype(np.float32))))


def with_scaled_cosines(emit: Draft, x: relax.Var, cosine: relax.Var, sine: relax.Var) -> relax.Var:
    """The second half by other numbers than the first."""
    width = int(x.ty.shape.values[3].value)
    return turned(emit, x, scaled(emit, cosine, np.arange(1, width + 1)), sine)


def with_cosines_scaled_alike(emit: Draft, x: relax.Var, cosine: relax.Var, sine: relax.Var) -> relax.Var:
    half = int(x.ty.shape.values[3].value) // 2
    return turned(emit, x, scaled(emit, cosine, np.tile(np.arange(1, half + 1), 2)), sine)


def test_cosines_that_are_scaled_alike_in_both_halves() -> None:
    assert read(with_cosines_scaled_alike).half == HALF


def interleaved(emit: Draft, x: relax.Var, cosine: relax.Var, sine: relax.Var) -> relax.Var:
    width = int(x.ty.shape.values[3].value)
    a, b = (emit(op.strided_slice(x, [3], [i], [width], [2], assume_inbound=True)) for i in (0, 1))
    (c, _), (s, _) = halves(emit, cosine), halves(emit, sine)
    low = emit(op.subtract(emit(op.multiply(a, c)), emit(op.multiply(b, s))))
    return emit(op.concat([low, emit(op.add(emit(op.multiply(a, s)), emit(op.multiply(b, c))))], axis=-1))


def squared(emit: Draft, x: relax.Var, cosine: relax.Var, sine: relax.Var) -> relax.Var:
    return turned(emit, emit(op.multiply(x, x)), cosine, sine)


@pytest.mark.parametrize(
    "turn",
    [
        the_other_way,
        with_other_cosines,
        with_scaled_cosines,
        interleaved,
        squared,
        lambda emit, x, c, s: emit(op.tanh(x)),
    ],
)
def test_what_is_no_rotation_by_halves(turn: Turn) -> None:
    with pytest.raises(Unprovable):
        read(turn)
