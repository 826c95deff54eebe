"""Encoders: what is proved of them, what is refused, and that they fit what a plan leaves for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tvm
from onnx import TensorProto, helper
from tvm import relax

from kvc.encoder import PREFIX, Encoder, read_encoder
from kvc.pipeline import Runner
from kvc.runtime.encoder import random_inputs
from kvc.targets import parse_target
from kvc_passes.errors import BudgetError, InputError, UnsupportedModel
from kvc_passes.facts import EncoderInput, ModelFacts
from kvc_passes.plans import Plan, Workload
from support import OnnxRuntime

from .encoder_files import floats, plain, pooled, save, wide

ModelFile = Callable[..., Path]
WIDTH = 64


def decoder(memory: tuple[int, str] | None = (WIDTH, "float32")) -> ModelFacts:
    """Facts of a decoder that reads such rows."""
    return ModelFacts("decoder", 512, 512, 256, (), (), {}, 1, memory=memory)  # type: ignore[arg-type]


def read(path: Path, fixed: dict[str, int] | None = None, facts: ModelFacts | None = None) -> Encoder:
    return read_encoder(path, facts or decoder(), None, fixed or {}, parse_target("cpu"), Runner())


def workload(rows: int) -> tuple[Workload, ...]:
    return (Workload(2, 64, memory=rows),)


def compiled(encoder: Encoder, rows: int) -> Callable[..., np.ndarray]:
    """The function, with its temporaries in an arena of the size that was planned."""
    plan = encoder.plan(workload(rows))
    part = cast(Plan, SimpleNamespace(encoder=plan, bytes=SimpleNamespace(arena=plan.arena)))
    module = relax.transform.AttachGlobalSymbol()(encoder.finished(part))
    with encoder.machine.target:
        executable = tvm.compile(
            module,
            encoder.machine.target,
            relax_pipeline=tvm.transform.Sequential([]),
            tir_pipeline="default",
        )
    machine = relax.VirtualMachine(executable, tvm.cpu())
    weights = [tvm.runtime.tensor(make()) for _, _, _, make in encoder.packed_weights()]

    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        given = [tvm.runtime.tensor(a) for a in inputs.values()]
        result: np.ndarray = machine["main"](*given, *weights).numpy()
        return result

    return run


@pytest.mark.parametrize(
    ("family", "inputs", "least", "longest"),
    [
        ("tiny-whisper", [EncoderInput("input_features", "float32", (16, 80))], 0, 0),
        (
            "tiny-bart",
            [
                EncoderInput("input_ids", "int64", (None,), 512),
                EncoderInput("attention_mask", "int64", (None,), None, mask=True),
            ],
            1,
            40,
        ),
        # rows = (samples - 127) // 384 - 1
        ("tiny-moonshine", [EncoderInput("input_values", "float32", (None,))], 895, 127 + 42 * 384 - 1),
    ],
)
def test_what_is_proved(
    model_file: ModelFile, family: str, inputs: list[EncoderInput], least: int, longest: int
) -> None:
    encoder = read(model_file(f"{family}-encoder"))
    assert list(encoder.facts.inputs) == inputs
    assert encoder.facts.least == least
    plan = encoder.plan(workload(40))
    assert (plan.longest, plan.arena) == (longest, plan.natural)
    assert encoder.extents.rows(longest) == 40
    assert all(name.startswith(PREFIX) for name in encoder.takes)


def test_rows_are_those_of_the_graph(model_file: ModelFile) -> None:
    """Of the longest request, of the shortest, and of one between, each in the same code."""
    path = model_file("tiny-bart-encoder")
    encoder, reference, random = read(path), OnnxRuntime(path), np.random.default_rng(1)
    run = compiled(encoder, 40)
    for extent in (40, 1, 23):
        inputs = dict(random_inputs(encoder.facts, extent, random))
        got = run(inputs)
        np.testing.assert_allclose(got, reference.run(inputs)[0], rtol=0, atol=1e-5)


def test_positions_bound_a_request(model_file: ModelFile) -> None:
    """Its position table has 256 rows behind the first 2, whatever the workload has room for."""
    assert read(model_file("tiny-bart-encoder")).plan(workload(1000)).longest == 256


def test_half_precision_is_given_as_float32(model_file: ModelFile) -> None:
    facts = decoder((WIDTH, "float16"))
    encoder = read(model_file("tiny-whisper-encoder", dtype="float16"), facts=facts)
    assert encoder.facts.inputs[0].dtype == "float32"
    assert "float16" in {tensor.dtype for tensor in encoder.tensors.values()}


def test_less_memory_with_the_same_rows(tmp_path: Path) -> None:
    path = wide(tmp_path / "wide.onnx", 40, WIDTH)
    encoder, w = read(path), workload(40)
    natural = encoder.plan(w)
    room = natural.natural // 2
    half, least = encoder.within(room, w), encoder.least(w)
    for made in (half, least):
        assert made.plan(w).natural == natural.natural
    assert half.plan(w).arena + half.workspace(w) <= room
    assert least.plan(w).arena < natural.natural // 10
    assert least.plan(w).arena <= half.plan(w).arena
    with pytest.raises(BudgetError) as refused:
        encoder.within(10_000, w)
    assert encoder.within(least.plan(w).arena + 100_000, w).plan(w).arena <= refused.value.needed
    inputs = dict(random_inputs(encoder.facts, 0, np.random.default_rng(2)))
    expected = OnnxRuntime(path).run(inputs)[0]
    for made in (encoder, least):
        np.testing.assert_allclose(compiled(made, 40)(inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "output", "fixed", "memory", "kind", "message"),
    [
        ({"x": ["b", 9, 32]}, ["b", 9, 32], {}, (64, "float32"), TensorProto.FLOAT,
         "output is float32 [batch, rows, 32]; the decoder 'decoder' reads float32 [batch, rows, 64]"),
        ({"x": ["b", 9, 64]}, ["b", 9, 64], {}, (64, "float32"), TensorProto.FLOAT16,
         "output is float16 [batch, rows, 64]; the decoder 'decoder' reads float32"),
        ({"x": ["b", 9, 64]}, ["b", 9, 64], {}, None, TensorProto.FLOAT,
         "the model 'decoder' reads no encoder's output: give no encoder"),
        ({"x": [2, 9, 64]}, [2, 9, 64], {}, (64, "float32"), TensorProto.FLOAT,
         "input 'x' has a batch of 2; export the encoder with a dynamic batch"),
        ({"x": ["b", "n", "m"]}, ["b", "n", "m"], {}, (64, "float32"), TensorProto.FLOAT,
         "the extents 'n' of input 'x', 'm' of input 'x' are open"),
        ({"x": ["b", "n", 64]}, ["b", "n", 64], {"k": 5}, (64, "float32"), TensorProto.FLOAT,
         "no input has an open extent 'k'; there are: n"),
        ({"x": ["b", 9, 64], "y": ["b", "n"]}, ["b", 9, 64], {}, (64, "float32"), TensorProto.FLOAT,
         "input 'y': its extent 'n' has no bound, since the rows of the output do not depend on it: fix it, "
         "as --encoder-dim n=N"),
        ({"x": ["b", 9]}, ["b", 9], {}, (64, "float32"), TensorProto.FLOAT,
         "no output is [batch, rows, width], as a decoder reads it ('rows')"),
    ],
)  # fmt: skip
def test_what_is_refused(
    tmp_path: Path, inputs: Any, output: Any, fixed: Any, memory: Any, kind: int, message: str
) -> None:
    path = plain(tmp_path / "encoder.onnx", inputs, output, kind)
    with pytest.raises((InputError, UnsupportedModel)) as refused:
        read(path, fixed, decoder(memory))
    assert message in str(refused.value)


def test_an_extent_that_is_fixed(tmp_path: Path) -> None:
    path = plain(tmp_path / "encoder.onnx", {"x": ["b", "n", "m"]}, ["b", "n", "m"])
    encoder = read(path, {"m": 64})
    assert encoder.facts.inputs == (EncoderInput("x", "float32", (None, 64)),)
    assert read(path, {"m": 64, "n": 7}).facts.inputs[0].shape == (7, 64)


def test_what_makes_other_outputs_is_left_away(tmp_path: Path) -> None:
    encoder = read(pooled(tmp_path / "pooled.onnx"))
    assert encoder.takes == [PREFIX + "w_packed"]
    assert (encoder.facts.parameter_bytes, encoder.facts.nodes) == ({"float32": 4 * 64 * 64}, 1)
    assert encoder.plan(workload(40)).weights == 4 * 64 * 64


def test_weights_that_are_read_for_their_shape_alone_are_not_stored(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["like"], ["shape"]),
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Reshape", ["product", "shape"], ["rows"]),
    ]
    tensors = [floats("w", 64, 64), floats("like", 1, 9, 64)]
    shape = ["b", 9, 64]
    assert read(save(tmp_path / "e.onnx", nodes, {"x": shape}, shape, tensors)).takes == [PREFIX + "w_packed"]


def test_nodes_keep_their_numbers_in_the_file(tmp_path: Path) -> None:
    """Where nodes before them are left away."""
    nodes = [
        helper.make_node("Tanh", ["x"], ["unused"]),
        helper.make_node("Unknown", ["x"], ["rows"], domain="elsewhere"),
    ]
    path = save(tmp_path / "e.onnx", nodes, {"x": ["b", 9, 64]}, ["b", 9, 64])
    with pytest.raises(UnsupportedModel, match=r"Unknown \(node '#1'\)"):
        read(path)


def test_a_workload_without_room_is_refused(tmp_path: Path) -> None:
    encoder = read(wide(tmp_path / "wide.onnx", 40, WIDTH))
    with pytest.raises(InputError, match=r"has 40 rows; the workload 2x64\+39 has room for 39"):
        encoder.plan(workload(39))
