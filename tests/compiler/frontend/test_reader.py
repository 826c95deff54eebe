"""Reading ONNX files: every way one can be broken, and tensors that are mapped, not read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kvc.frontend.reader import OLDEST_OPSET, read
from kvc_passes.errors import InputError, UnsupportedModel
from support import onnx_model

TABLE = np.arange(128, dtype=np.float32).reshape(32, 4)
IDS = {"input_ids": (TensorProto.INT64, ["b", "s"])}


def model(opset: int = 20, **weights: np.ndarray) -> onnx.ModelProto:
    node = helper.make_node("Gather", ["table", "input_ids"], ["logits"], name="/embed/Gather")
    return onnx_model([node], IDS, {"table": TABLE, **weights}, opset=opset)


def external(folder: Path, data: Path | None = None) -> Path:
    """The model with its table in a file beside it."""
    path = folder / "model.onnx"
    onnx.save_model(
        model(),
        path,
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model(shape=np.array([1, 2], np.int64)), path)
    file = read(path)
    assert (file.path, file.opset) == (path, 20)
    assert file.graph.node[0].name == "/embed/Gather"
    np.testing.assert_array_equal(file.tensors["table"], TABLE)
    assert file.parameter_bytes() == {"float32": 512, "int64": 16}
    assert list(file.parameter_bytes()) == ["float32", "int64"]


def test_external_data_is_mapped_and_read_only(tmp_path: Path) -> None:
    file = read(external(tmp_path))
    table = file.tensors["table"]
    np.testing.assert_array_equal(table, TABLE)
    assert isinstance(table.base, np.memmap) or isinstance(table, np.memmap)
    assert not table.flags.writeable
    assert not file.graph.initializer[0].raw_data


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int8, np.uint8, np.bool_]
)
def test_external_data_of_every_type(tmp_path: Path, dtype: type) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    path = tmp_path / "model.onnx"
    proto = model()
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    proto.graph.initializer.append(helper.make_tensor("other", kind, array.shape, array.tobytes(), raw=True))
    onnx.save_model(proto, path, save_as_external_data=True, location="d", size_threshold=0)
    found = read(path).tensors["other"]
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, array)


def test_the_data_file_may_be_a_link_as_in_caches_of_downloads(tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blobs").mkdir()
    path = external(tmp_path / "snapshot")
    for name in ("model.onnx", "model.onnx.data"):
        link, blob = tmp_path / "snapshot" / name, tmp_path / "blobs" / f"{len(name)}"
        link.rename(blob)
        link.symlink_to(f"../blobs/{blob.name}")
    np.testing.assert_array_equal(read(path).tensors["table"], TABLE)


def test_a_tensor_without_elements(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    proto = model(empty=np.zeros((0, 4), np.float32))
    onnx.save_model(proto, path, save_as_external_data=True, location="d", size_threshold=0)
    assert read(path).tensors["empty"].shape == (0, 4)


def _missing(folder: Path) -> Path:
    return folder / "nothing.onnx"


def _folder(folder: Path) -> Path:
    return folder


def _empty(folder: Path) -> Path:
    (folder / "x.onnx").write_bytes(b"")
    return folder / "x.onnx"


def _text(folder: Path) -> Path:
    (folder / "x.onnx").write_text("This is a letter, not a model. " * 20)
    return folder / "x.onnx"


def _truncated(folder: Path) -> Path:
    data = model().SerializeToString()
    (folder / "x.onnx").write_bytes(data[: len(data) // 2])
    return folder / "x.onnx"


def _no_data_file(folder: Path) -> Path:
    path = external(folder)
    (folder / "model.onnx.data").unlink()
    return path


def _short_data(folder: Path) -> Path:
    path = external(folder)
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    return path


def _moved(folder: Path, location: str) -> Path:
    """The model, its table said to be in `location`."""
    path = external(folder)
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(proto.SerializeToString())
    return path


def _outside(folder: Path) -> Path:
    (folder / "inner").mkdir()
    external(folder)
    return _moved(folder / "inner", "../model.onnx.data")


def _absolute(folder: Path) -> Path:
    return _moved(folder, str(external(folder).with_suffix(".onnx.data")))


def _nameless(folder: Path) -> Path:
    return _moved(folder, "")


def _damaged(folder: Path) -> Path:
    proto = model()
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-3]
    onnx.save(proto, folder / "x.onnx")
    return folder / "x.onnx"


BROKEN = {
    "missing": (_missing, "no such file"),
    "folder": (_folder, r"is a folder; give the \.onnx file in it"),
    "empty": (_empty, "not an ONNX model: it holds no graph"),
    "text": (_text, "not an ONNX file, or a truncated one"),
    "truncated": (_truncated, "not an ONNX file, or a truncated one"),
    "data file missing": (
        _no_data_file,
        "external data missing: initializer 'table' is in 'model.onnx.data'",
    ),
    "data file short": (_short_data, r"external data is short: initializer 'table' ends at byte 512 of"),
    "data outside": (_outside, r"names external data outside the model's folder: '\.\./model"),
    "data at an absolute place": (_absolute, "names external data outside the model's folder: '/"),
    "data nowhere": (_nameless, "names external data outside the model's folder: ''"),
    "initializer damaged": (_damaged, "initializer 'table' is damaged"),
}


@pytest.mark.parametrize(("make", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_with_its_path(
    tmp_path: Path, make: Callable[[Path], Path], reason: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(InputError, match=reason) as refused:
        read(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("cut", range(0, 700, 53))
def test_no_truncation_escapes_as_another_error(tmp_path: Path, cut: int) -> None:
    data = model().SerializeToString()
    path = tmp_path / "x.onnx"
    path.write_bytes(data[: min(cut, len(data) - 1)])
    with pytest.raises((InputError, UnsupportedModel)):
        read(path)


def test_an_old_opset_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    onnx.save(model(opset=OLDEST_OPSET), path)
    assert read(path).opset == OLDEST_OPSET
    onnx.save(model(opset=OLDEST_OPSET - 1), path)
    with pytest.raises(UnsupportedModel, match=r"opset 12 is too old; kvc reads opset 13 and newer"):
        read(path)


def test_a_model_of_foreign_operators_is_refused(tmp_path: Path) -> None:
    proto = model()
    proto.opset_import[0].domain = "com.example"
    onnx.save(proto, tmp_path / "x.onnx")
    with pytest.raises(UnsupportedModel, match=r"imports no ai\.onnx operator set"):
        read(tmp_path / "x.onnx")


def test_local_functions_are_refused(tmp_path: Path) -> None:
    proto = model()
    node = helper.make_node("Identity", ["x"], ["y"])
    imports = [helper.make_opsetid("", 20)]
    proto.functions.append(helper.make_function("local", "Twice", ["x"], ["y"], [node], imports))
    onnx.save(proto, tmp_path / "x.onnx")
    with pytest.raises(
        UnsupportedModel, match=r"1 model-local functions \(the first is 'Twice'\); inline them"
    ):
        read(tmp_path / "x.onnx")


def test_an_element_type_without_a_numpy_form_is_refused(tmp_path: Path) -> None:
    path = external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].data_type = TensorProto.STRING
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UnsupportedModel, match="initializer 'table' has the element type STRING"):
        read(path)


@pytest.mark.parametrize(
    ("dims", "offset"),
    [
        ([32, -4], "0"),
        ([-32, -4], "0"),
        ([1 << 62, 4], "0"),
        ([32, 4], "-8"),
        ([32, 4], "x"),
        ([32, 4], "1" * 30),
    ],
)
def test_external_data_of_impossible_size_or_place(tmp_path: Path, dims: list[int], offset: str) -> None:
    path = external(tmp_path)
    broken = onnx.load(path, load_external_data=False)
    (tensor,) = (t for t in broken.graph.initializer if t.name == "table")
    del tensor.dims[:]
    tensor.dims.extend(dims)
    (entry,) = (e for e in tensor.external_data if e.key == "offset")
    entry.value = offset
    path.write_bytes(broken.SerializeToString())
    with pytest.raises(InputError, match=r"model\.onnx: .*'table'"):
        read(path)


@pytest.mark.parametrize("kind", [99, -1, TensorProto.COMPLEX64, TensorProto.STRING])
def test_initializers_of_types_without_numbers(tmp_path: Path, kind: int) -> None:
    broken = model()
    broken.graph.initializer[0].data_type = kind
    path = tmp_path / "model.onnx"
    path.write_bytes(broken.SerializeToString())
    with pytest.raises(UnsupportedModel, match="initializer 'table' has the element type"):
        read(path)


def rewritten(change: Callable[[onnx.GraphProto], None], old: bytes = b"", new: bytes = b"") -> bytes:
    broken = model()
    change(broken.graph)
    return bytes(broken.SerializeToString()).replace(old, new)


MALFORMED = {
    "an input that nothing makes": (
        lambda g: g.node.append(helper.make_node("Add", ["logits", "lost"], ["sum"], "add")),
        "node 'add' \\(Add\\) reads 'lost', which nothing before it makes",
    ),
    "a cycle": (
        lambda g: g.node.append(helper.make_node("Neg", ["sum"], ["sum"], "neg")),
        "node 'neg' \\(Neg\\) reads 'sum', which nothing before it makes",
    ),
    "made twice": (
        lambda g: g.node.append(helper.make_node("Neg", ["logits"], ["logits"], "neg")),
        "node 'neg' \\(Neg\\) makes 'logits', which is there already",
    ),
    "a required input left out": (
        lambda g: g.node.append(helper.make_node("Concat", ["logits", ""], ["sum"], "cat", axis=-1)),
        "node 'cat' \\(Concat\\) lacks its input 'inputs'",
    ),
    "too few inputs": (
        lambda g: g.node.append(helper.make_node("Add", ["logits"], ["sum"], "add")),
        "node 'add' \\(Add\\) has 1 inputs, not 2",
    ),
    "no outputs": (
        lambda g: g.node.append(helper.make_node("Neg", ["logits"], [], "neg")),
        "node 'neg' \\(Neg\\) has 0 outputs, not 1",
    ),
    "a required attribute left out": (
        lambda g: g.node.append(helper.make_node("Concat", ["logits"], ["sum"], "cat")),
        "node 'cat' \\(Concat\\) lacks its attribute 'axis'",
    ),
    "an attribute of another type": (
        lambda g: g.node.append(helper.make_node("Concat", ["logits"], ["sum"], "cat", axis=1.0)),
        "node 'cat' \\(Concat\\) has an attribute 'axis' that is no INT",
    ),
    "an attribute that the operator lacks": (
        lambda g: g.node.append(helper.make_node("Neg", ["logits"], ["sum"], "neg", axes=[1])),
        "node 'neg' \\(Neg\\) has an attribute 'axes', which the operator does not have",
    ),
    "an output that nothing makes": (
        lambda g: g.output.append(helper.make_tensor_value_info("lost", TensorProto.FLOAT, None)),
        "the output 'lost' is made by no node",
    ),
}


@pytest.mark.parametrize(("change", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_graph_that_is_not_well_formed(tmp_path: Path, change: Any, reason: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(rewritten(change))
    with pytest.raises(InputError, match=rf"model\.onnx: {reason}"):
        read(path)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(rewritten(lambda g: None, b"/embed/Gather", b"/embed/\xff\xfether"))
    with pytest.raises(InputError, match=r"not an ONNX file|the name of a node is no text"):
        read(path)
