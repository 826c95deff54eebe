"""config.json: its context's length counts; what it says against the graph is told, no more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import kvc
from kvc import cli
from kvc.configuration import Configuration
from kvc_models import quantize
from kvc_passes.sites import MaskFact
from support import site

FIXTURES = Path(__file__).parents[1] / "fixtures"
WINDOW = MaskFact("window", 8, "given", predicate="k <= q and k > q - 8")
SITES = (site(0), site(1, mask=WINDOW))


def configuration(tmp_path: Path, text: str) -> Configuration:
    (tmp_path / "config.json").write_text(text)
    return Configuration.beside(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"max_position_embeddings": "many"}', '{"n_positions": -1}']
)
def test_what_says_nothing_about_the_context(tmp_path: Path, text: str) -> None:
    assert configuration(tmp_path, text).context is None


def test_a_context_may_stand_in_a_part_for_text(tmp_path: Path) -> None:
    assert configuration(tmp_path, '{"text_config": {"max_position_embeddings": 77}}').context == 77
    assert configuration(tmp_path, '{"max_seq_len": 33}').context == 33


def test_a_configuration_that_agrees_is_not_mentioned(tmp_path: Path) -> None:
    said = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    assert configuration(tmp_path, json.dumps({**said, "vocab_size": 48})).contradictions(SITES, 48) == ()


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"sliding_window": 4096}, "says sliding_window = 4096, the graph has 8; the graph is followed"),
        ({"attention_chunk_size": 16}, "says attention_chunk_size = 16, the graph has none in any layer"),
        ({"num_hidden_layers": 3}, "says num_hidden_layers = 3, the graph has 2 attention layers"),
        ({"num_attention_heads": 8}, "says num_attention_heads = 8, the graph has 4 query heads"),
        ({"vocab_size": 50}, "says vocab_size = 50, the graph has 48 logits"),
    ],
)
def test_each_contradiction_is_a_sentence(tmp_path: Path, said: dict[str, int], text: str) -> None:
    (found,) = configuration(tmp_path, json.dumps(said)).contradictions(SITES, 48)
    assert text in found


def test_a_window_that_is_switched_off_is_none(tmp_path: Path) -> None:
    said = {"sliding_window": 4096, "use_sliding_window": False}
    assert configuration(tmp_path, json.dumps(said)).contradictions(SITES, 48) == ()


def test_a_window_that_an_exporter_dropped_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """onnxruntime-genai's builder writes Mistral without its window; config.json still has it."""
    assert cli.main(["inspect", str(FIXTURES / "genai" / "mistral.onnx")]) == 0
    told = capsys.readouterr().err
    assert (
        "config.json says sliding_window = 8, the graph has none in any layer; the graph is followed" in told
    )


def test_a_window_that_is_there_is_not_mentioned() -> None:
    facts = kvc.inspect(FIXTURES / "optimum" / "mistral.onnx")
    assert facts.warnings == ()
    assert {site.mask.window for site in facts.sites} == {8}


def test_what_depends_on_other_tokens_needs_a_permission(
    model_file: Callable[..., Path], tmp_path: Path
) -> None:
    """DynamicQuantizeLinear has one scale for all tokens of a batch."""
    path = quantize.dynamic(model_file("llama"), tmp_path / "dynamic.onnx")
    with pytest.raises(
        kvc.UnsupportedModel, match=r"\(DynamicQuantizeLinear\) .* --allow token-scales gives every token"
    ):
        kvc.inspect(path)
    assert kvc.inspect(path, allow="token-scales").allowed == ("token-scales",)
    assert kvc.inspect(model_file("llama"), allow="token-scales").allowed == ()
    with pytest.raises(
        kvc.InputError, match=r"there is no permission 'all'; there are: token-scales, window=N"
    ):
        kvc.inspect(path, allow="all")
