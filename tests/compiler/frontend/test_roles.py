"""What graph inputs are for, whatever their names, order and dimensions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kvc.frontend.roles import find_roles, order_outputs, unify_dimensions
from kvc_passes.errors import UnsupportedModel
from kvc_passes.facts import Roles
from support import onnx_model

I64, I32, F32 = TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT
IDS: tuple[int, list[Any]] = (I64, ["b", "s"])
PAST: tuple[int, list[Any]] = (F32, ["b", 2, "p", 8])


def graph(inputs: dict[str, Any], tokens: str = "input_ids", through: str | None = None) -> onnx.GraphProto:
    nodes = []
    index = tokens
    if through:
        nodes.append(
            helper.make_node(through, [tokens], ["same"], to=I64)
            if through == "Cast"
            else helper.make_node(through, [tokens], ["same"])
        )
        index = "same"
    nodes.append(helper.make_node("Gather", ["table", index], ["logits"]))
    return onnx_model(nodes, inputs, {"table": np.zeros((32, 4), np.float32)}).graph


def test_tokens_alone() -> None:
    assert find_roles(graph({"input_ids": IDS}), "m") == Roles("input_ids")


def test_all_roles() -> None:
    inputs = {
        "past_key_values.0.key": PAST,
        "past_key_values.0.value": PAST,
        "position_ids": IDS,
        "attention_mask": (I64, ["b", "t"]),
        "input_ids": IDS,
    }
    past = ("past_key_values.0.key", "past_key_values.0.value")
    assert find_roles(graph(inputs), "m") == Roles("input_ids", "attention_mask", "position_ids", past)


@pytest.mark.parametrize("name", ["tokens", "x", "decoder_input"])
def test_tokens_are_known_by_use(name: str) -> None:
    assert find_roles(graph({"attention_mask": IDS, name: IDS}, name), "m").tokens == name


@pytest.mark.parametrize("through", ["Cast", "Identity"])
def test_tokens_may_be_cast_first(through: str) -> None:
    assert find_roles(graph({"input_ids": (I32, ["b", "s"])}, through=through), "m").tokens == "input_ids"


def test_the_largest_table_decides() -> None:
    nodes = [
        helper.make_node("Gather", ["types", "segments"], ["a"]),
        helper.make_node("Gather", ["words", "ids"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["logits"]),
    ]
    weights = {"types": np.zeros((2, 4), np.float32), "words": np.zeros((90, 4), np.float32)}
    proto = onnx_model(nodes, {"segments": IDS, "ids": IDS}, weights)
    with pytest.raises(UnsupportedModel, match="input 'segments' is neither token ids, attention mask"):
        find_roles(proto.graph, "m")


def test_initializers_listed_as_inputs_are_none() -> None:
    made = graph({"input_ids": IDS})
    made.input.append(helper.make_tensor_value_info("table", F32, [32, 4]))
    assert find_roles(made, "m") == Roles("input_ids")


@pytest.mark.parametrize(
    "inputs",
    [{"image": (F32, ["b", 3, 32, 32])}, {"input_ids": (F32, ["b", "s"])}, {"input_ids": (I64, ["s"])}],
)
def test_a_model_without_tokens_is_no_decoder(inputs: dict[str, Any]) -> None:
    name = next(iter(inputs))
    with pytest.raises(UnsupportedModel, match=rf"m: is not a decoder language model: .*inputs: '{name}'"):
        find_roles(graph(inputs, name), "m")


@pytest.mark.parametrize(
    "extra", [("use_cache_branch", (TensorProto.BOOL, [1])), ("image", (F32, ["b", 3, 8, 8, 2]))]
)
def test_an_input_of_no_role_is_named(extra: tuple[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=f"input '{extra[0]}' is neither token ids, attention mask"):
        find_roles(graph({"input_ids": IDS, extra[0]: extra[1]}), "m")


def test_an_encoders_output_has_rows_of_known_width() -> None:
    """Its axes get the symbols that all inputs share, whatever the file calls them."""
    inputs = {"input_ids": IDS, "states": (F32, ["b", "t", 64]), "encoder_mask": (I64, ["b", "u"])}
    made = graph(inputs)
    roles = find_roles(made, "m")
    assert (roles.memory, roles.memory_mask) == ("states", "encoder_mask")
    unify_dimensions(made, roles, "m")
    found = symbols(made)
    assert (found["states"], found["encoder_mask"]) == (["batch", "rows", 64], ["batch", "rows"])
    for shape, message in ((["b", 7, 64], "a fixed number of rows, 7"), (["b", "t", "w"], "unknown width")):
        made = graph({**inputs, "states": (F32, shape)})
        with pytest.raises(UnsupportedModel, match=message):
            unify_dimensions(made, find_roles(made, "m"), "m")


def symbols(made: onnx.GraphProto) -> dict[str, list[Any]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in made.input}


def test_dimensions_get_one_symbol_each() -> None:
    inputs = {
        "attention_mask": (I64, ["batch_2", "other"]),
        "position_ids": (I64, [1, "seq_7"]),
        "k": (F32, ["b1", 2, "p1", 8]),
        "v": (F32, ["b2", 2, "p2", 8]),
        "input_ids": (I64, ["x", "y"]),
    }
    made = graph(inputs)
    unify_dimensions(made, find_roles(made, "m"), "m")
    found = symbols(made)
    assert found == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "past+sequence"],
        "position_ids": [1, "sequence"],
        "k": ["batch", 2, "past", 8],
        "v": ["batch", 2, "past", 8],
    }


def test_without_past_the_mask_is_as_long_as_the_tokens() -> None:
    made = graph({"attention_mask": (I64, ["a", "c"]), "input_ids": IDS})
    unify_dimensions(made, find_roles(made, "m"), "m")
    assert symbols(made)["attention_mask"] == ["batch", "sequence"]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (["b", 128], "input 'input_ids' has a fixed sequence length, 128"),
        ([4, "s"], "input 'input_ids' has a fixed batch of 4"),
    ],
)
def test_a_fixed_length_or_batch_is_refused(shape: list[Any], reason: str) -> None:
    made = graph({"input_ids": (I64, shape)})
    with pytest.raises(UnsupportedModel, match=reason):
        unify_dimensions(made, find_roles(made, "m"), "m")


@pytest.mark.parametrize("operators", [("Transpose",), ("Cast", "Transpose"), ("Identity",)])
def test_a_table_may_be_made_of_another(operators: tuple[str, ...]) -> None:
    """As a head that is tied to its embedding: the table is its transpose."""
    nodes, name = [], "head"
    for number, operator in enumerate(operators):
        options = {"to": F32} if operator == "Cast" else {}
        nodes.append(helper.make_node(operator, [name], [f"table_{number}"], **options))
        name = f"table_{number}"
    nodes.append(helper.make_node("Gather", [name, "ids"], ["logits"]))
    made = onnx_model(nodes, {"ids": IDS}, {"head": np.zeros((4, 32), np.float32)}).graph
    assert find_roles(made, "m").tokens == "ids"


def test_the_logits_come_first_and_presents_in_the_order_of_their_pasts() -> None:
    names = ["hidden", "present.0.value", "present.1.key", "logits", "present.0.key", "present.1.value"]
    made = graph({"input_ids": IDS})
    made.output.extend(helper.make_tensor_value_info(name, F32, None) for name in names)
    del made.output[0]
    past = tuple(f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value"))
    order_outputs(made, Roles("input_ids", past=past))
    presents = [f"present.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert [value.name for value in made.output] == ["logits", "hidden", *presents]


def test_without_an_output_called_logits_the_first_is_taken() -> None:
    made = graph({"input_ids": IDS})
    del made.output[:]
    made.output.extend(helper.make_tensor_value_info(name, F32, None) for name in ("scores", "other"))
    order_outputs(made, Roles("input_ids"))
    assert [value.name for value in made.output] == ["scores", "other"]
