"""The tiny models: ONNX Runtime computes from the exported files what PyTorch computes from the models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from kvc_models import ModelError, assets_folder, export_cnn, export_encoder, export_tiny, make_tiny
from kvc_models.families import CHUNK, SHORT_CONTEXT, VOCAB, WINDOW
from kvc_models.tiny import FAMILIES, tokenizer

ATOL = 1e-4
FAST = ("llama", "gpt2", "mistral", "bloom")
EVERY = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FAMILIES]


def session(path: Path) -> Any:
    """An ONNX Runtime session on one CPU thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def tokens(batch: int, length: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length))


def torch_logits(model: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """The logits [b, s, V] of the model in PyTorch, computed without a cache."""
    with torch.no_grad():
        logits: NDArray[np.float32] = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
    return logits


def run_with_past(run: Any, ids: NDArray[np.int64], lengths: list[int]) -> NDArray[np.float32]:
    """The logits [b, s, V] of `ids` [b, s], fed in pieces, each with the keys and values of those before."""
    batch = len(ids)
    inputs = run.get_inputs()
    caches = [x for x in inputs if x.name.startswith("past_key_values")]
    past = [np.zeros((batch, x.shape[1], 0, x.shape[3]), np.float32) for x in caches]
    logits, start = [], 0
    for length in lengths:
        end = start + length
        feed = {
            "input_ids": ids[:, start:end],
            "attention_mask": np.ones((batch, end), np.int64),
            "position_ids": np.tile(np.arange(start, end), (batch, 1)),
            **dict(zip((x.name for x in caches), past)),
        }
        piece, *past = run.run(None, {x.name: feed[x.name] for x in inputs})
        assert all(x.shape[2] == end for x in past), "every key and value must come back"
        logits.append(piece)
        start = end
    return np.concatenate(logits, axis=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def exported(folder: Path, family: str, with_past: bool = False, exporter: Any = "dynamo") -> Path:
    """The exported model; exported once in this module."""
    out = folder / f"{family}-{exporter}{'-past' if with_past else ''}.onnx"
    return out if out.exists() else export_tiny(family, out, with_past=with_past, exporter=exporter)


@pytest.mark.parametrize("family", EVERY)
def test_logits_equal_torch_without_past(folder: Path, family: str) -> None:
    run, model = session(exported(folder, family)), make_tiny(family)
    for batch, length in ((1, 5), (3, 2 * WINDOW + 3)):
        ids = tokens(batch, length)
        (logits,) = run.run(None, {"input_ids": ids})
        np.testing.assert_allclose(logits, torch_logits(model, ids), atol=ATOL, rtol=0)


@pytest.mark.parametrize("family", EVERY)
def test_logits_equal_torch_with_past(folder: Path, family: str) -> None:
    run, model = session(exported(folder, family, with_past=True)), make_tiny(family)
    for batch, lengths in ((2, [4, 1, 1]), (1, [WINDOW + 3, 5, 1])):
        ids = tokens(batch, sum(lengths))
        logits = run_with_past(run, ids, lengths)
        np.testing.assert_allclose(logits, torch_logits(model, ids), atol=ATOL, rtol=0)


OLDER = [each for each in EVERY if each.values[0] not in ("phi3-long", "llama4", "llama4-moe")]


@pytest.mark.parametrize("family", OLDER)
def test_the_older_exporter_computes_the_same(folder: Path, family: str) -> None:
    model = make_tiny(family)
    run = session(exported(folder, family, exporter="torchscript"))
    ids = tokens(3, 2 * WINDOW + 3)
    (logits,) = run.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    np.testing.assert_allclose(logits, torch_logits(model, ids), atol=ATOL, rtol=0)
    run = session(exported(folder, family, with_past=True, exporter="torchscript"))
    ids = tokens(2, WINDOW + 9)
    logits = run_with_past(run, ids, [WINDOW + 3, 5, 1])
    np.testing.assert_allclose(logits, torch_logits(model, ids), atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("family", "reason"), [("phi3-long", "aten::copy"), ("llama4", r"CumSum.*tensor\(bool\)")]
)
def test_what_the_older_exporter_cannot_write_is_an_error(tmp_path: Path, family: str, reason: str) -> None:
    with pytest.raises(ModelError, match=f"older exporter cannot export x.onnx: .*{reason}"):
        export_tiny(family, tmp_path / "x.onnx", exporter="torchscript")
    assert not (tmp_path / "x.onnx").exists()


def test_long_frequencies_are_used_by_long_texts_only() -> None:
    """phi3-long changes to other frequencies behind `SHORT_CONTEXT` tokens, for all positions."""
    model = make_tiny("phi3-long")
    ids = tokens(1, SHORT_CONTEXT + 1)
    before, after = torch_logits(model, ids[:, :-1]), torch_logits(model, ids)
    assert np.abs(before[0, 5] - after[0, 5]).max() > 1e-2


def test_chunks_hide_earlier_tokens_where_positions_rotate() -> None:
    """In llama4 three layers look into their own chunk only; the fourth sees everything."""
    model = make_tiny("llama4", num_hidden_layers=3, no_rope_layers=[1, 1, 1])
    ids = tokens(1, 2 * CHUNK)
    changed = ids.copy()
    changed[0, CHUNK - 1] = (changed[0, CHUNK - 1] + 1) % VOCAB
    difference = np.abs(torch_logits(model, ids) - torch_logits(model, changed))[0].max(axis=-1)
    assert difference[CHUNK - 1] > 1e-2
    assert difference[CHUNK:].max() == 0


@pytest.mark.parametrize("family", EVERY)
def test_no_weight_is_stored_twice(folder: Path, family: str) -> None:
    graph = onnx.load(exported(folder, family)).graph
    stored = sum(
        int(np.prod(x.dims))
        for x in graph.initializer
        if x.data_type == onnx.TensorProto.FLOAT and len(x.dims) > 1
    )
    weights = sum(p.numel() for p in make_tiny(family).parameters() if p.dim() > 1)
    assert 0 <= stored - weights < 8192, "constants may be added, but not so many as the smallest matrix has"


@pytest.mark.parametrize(("family", "reaches"), [("llama", True), ("mistral", False)])
def test_a_sliding_window_hides_what_is_far_away(folder: Path, family: str, reaches: bool) -> None:
    run = session(exported(folder, family))
    ids = tokens(1, 2 * WINDOW + 1)  # two layers see 2 * (WINDOW - 1) tokens back
    changed = ids.copy()
    changed[0, 0] = (changed[0, 0] + 1) % VOCAB
    before, after = (run.run(None, {"input_ids": x})[0][0, -1] for x in (ids, changed))
    assert bool(np.abs(before - after).max() > 1e-3) is reaches


def test_weights_are_the_same_every_time_and_no_two_tensors_alike() -> None:
    state, again = (make_tiny("gpt2").state_dict() for _ in range(2))
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    vectors = [value for value in state.values() if value.dim() == 1]
    assert not any(
        torch.equal(a, b) for i, a in enumerate(vectors) for b in vectors[i + 1 :] if a.shape == b.shape
    )


def test_external_data_is_one_file_and_gives_the_same_logits(folder: Path, tmp_path: Path) -> None:
    out = export_tiny("llama", tmp_path / "model.onnx", external_data=True)
    names = {x.name for x in tmp_path.iterdir()}
    assert names == {"model.onnx", "model.onnx.data", "model.assets"}
    graph = onnx.load(out, load_external_data=False).graph
    places = [
        {e.key: e.value for e in x.external_data}["location"] for x in graph.initializer if x.external_data
    ]
    assert set(places) == {"model.onnx.data"}
    assert out.stat().st_size < (tmp_path / "model.onnx.data").stat().st_size
    ids = tokens(2, 7)
    inline = session(exported(folder, "llama")).run(None, {"input_ids": ids})[0]
    np.testing.assert_array_equal(session(out).run(None, {"input_ids": ids})[0], inline)


def test_the_tokenizer_beside_the_model_takes_text_in_and_out(folder: Path) -> None:
    assets = assets_folder(exported(folder, "llama"))
    read = Tokenizer.from_file(str(assets / "tokenizer.json"))
    assert read.get_vocab_size() <= VOCAB
    for text in ("The capital of France is Paris.", "ünïcode 😀\n\ttabs", ""):
        assert read.decode(read.encode(text).ids) == text
    end = json.loads((assets / "generation_config.json").read_text())["eos_token_id"]
    assert read.id_to_token(end) == json.loads((assets / "tokenizer_config.json").read_text())["eos_token"]
    assert json.loads((assets / "config.json").read_text())["vocab_size"] == VOCAB
    assert "add_generation_prompt" in (assets / "chat_template.jinja").read_text()


def test_the_tokenizer_is_the_same_every_time() -> None:
    first, second = (tokenizer().backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_the_encoder_looks_at_later_tokens(tmp_path: Path) -> None:
    run = session(export_encoder(tmp_path / "encoder.onnx"))
    for batch, length in ((1, 4), (3, 9)):
        ids = tokens(batch, length)
        changed = ids.copy()
        changed[:, -1] = (changed[:, -1] + 1) % VOCAB
        before, after = (run.run(None, {"input_ids": x})[0] for x in (ids, changed))
        assert before.shape == (batch, length, VOCAB)
        assert (np.abs(before - after)[:, 0].max(axis=-1) > 1e-4).all()


def test_the_convolutional_network_runs(tmp_path: Path) -> None:
    run = session(export_cnn(tmp_path / "cnn.onnx"))
    (scores,) = run.run(None, {"image": np.ones((3, 3, 32, 32), np.float32)})
    assert scores.shape == (3, 10)
    assert "Conv" in {node.op_type for node in onnx.load(tmp_path / "cnn.onnx").graph.node}


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tiny model of the family 'clip'; there are llama, gpt2"):
        export_tiny("clip", tmp_path / "x.onnx")
    with pytest.raises(ModelError, match=r"no weights of type 'int3'; there are float32, float16"):
        export_tiny("llama", tmp_path / "x.onnx", dtype="int3")
    assert not list(tmp_path.iterdir())
