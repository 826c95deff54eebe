"""Some rows of docs/coverage.md: exported, compiled and compared with ONNX Runtime by the tool's functions.

`python tools/coverage.py` runs all rows, those that are refused among them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from tools.coverage import compare_file, cover, judged, limit_of  # noqa: E402
from tools.coverage_page import Outcome, write_page  # noqa: E402
from tools.coverage_rows import Row, all_rows, model_file  # noqa: E402
from tools.onnx_graph import Graph  # noqa: E402

from kvc.runtime.overhead import measure  # noqa: E402

ROWS = [
    "gemma2/optimum/float32",
    "gpt2/optimum/float32",
    "gemma/genai/float32",
    "gemma2/genai/int4",
    "llama4/dynamo-20/float32",
    "gpt-oss/dynamo-20/float32",
    "mixtral/dynamo-20/float32",
    "mpt/torchscript-17-past/float32",
    "bloom/dynamo-23/bfloat16",
    "gpt2/dynamo-20-past/float16",
    "llama/dynamo-21/qdq-int4-block",
    "llama/dynamo-21/dynamic-tensor",
    "llama/dynamo-21/qdq-uint8-tensor",
]
SLOW_ROWS = [
    "bloom/dynamo-20-past/float32",
    "deepseek/dynamo-23/float32",
    "gemma3/dynamo-20-past/float32",
    "llama4-moe/dynamo-20/float32",
    "llama3/dynamo-20-past/float32",
    "olmoe/dynamo-20/float32",
    "opt/dynamo-20-past/float32",
    "phi/dynamo-20-past/float32",
    "phi3-long/dynamo-20-past/float32",
    "phi3/dynamo-23-past/float32",
    "qwen2-moe/dynamo-20/float32",
    "qwen3/dynamo-20-past/float32",
    "starcoder2/dynamo-20-past/float32",
    "mistral/torchscript-17/float32",
    "gemma2/dynamo-20-past/bfloat16",
    "gemma2/dynamo-21/nbits8-64-zero",
    "gpt2/dynamo-21/nbits4-32",
    "llama/dynamo-21/float16+nbits4-32-zero",
    "llama/dynamo-21/qdq-uint8-channel",
    "llama/dynamo-21/static",
]


@pytest.fixture(scope="module")
def work(pytestconfig: pytest.Config) -> Path:
    """Exported files are kept between runs."""
    assert pytestconfig.cache is not None
    return Path(pytestconfig.cache.mkdir("coverage"))


@pytest.fixture(autouse=True)
def _one_overhead() -> Iterator[None]:
    """Measuring a process takes 2 s and is the same for all models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvc.machine.measure", lambda *args, **options: _overhead())
        yield


@functools.cache
def _overhead() -> int:
    return measure(None)


@pytest.mark.parametrize("text", [*ROWS, *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW_ROWS)])
def test_a_row(text: str, work: Path) -> None:
    row = Row.parse(text)
    errors = compare_file(row, model_file(row, work), work)
    assert set(errors) >= {"prompt of 1", "prompt of 61", "chunks, then decode", "ragged batch"}
    assert ("left-padded batch" in errors) is (row.with_past and row.exporter != "genai")
    assert {name: x for name, x in judged(row, errors).items() if not x <= limit_of(row)} == {}


def test_every_row_has_a_name_of_its_own() -> None:
    rows = all_rows()
    assert len({str(row) for row in rows}) == len(rows) > 200
    assert all(Row.parse(str(row)) == row for row in rows)
    assert {str(row) for row in rows} >= {*ROWS, *SLOW_ROWS}


def test_padding_at_the_left_changes_nothing_in_onnx_runtime(work: Path) -> None:
    """So that what is compared with it is the row alone."""
    graph = Graph(model_file(Row("mistral", "dynamo-20-past", "float32"), work))
    random = np.random.default_rng(0)
    sequences = [[int(x) for x in random.integers(0, 512, n)] for n in (23, 6, 14)]
    for rows, tokens in zip(graph.left_padded(sequences, 3), sequences, strict=True):
        np.testing.assert_allclose(np.stack(rows), graph.logits(tokens)[-4:], rtol=0, atol=1e-5)


def test_a_row_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kvc
    from kvc_models import ModelError

    def fail(error: Exception) -> Outcome:
        def instead(row: Row, work: Path) -> Path:
            raise error

        monkeypatch.setattr("tools.coverage.model_file", instead)
        return cover(Row("llama", "dynamo-20", "float32"), tmp_path)

    assert fail(ModelError("no such operator")).result == "not exported"
    refused = fail(kvc.UnsupportedModel(f"{tmp_path}/x.onnx: node 'a' is odd\nmore"))
    assert (refused.result, refused.reason) == ("refused", "node 'a' is odd")
    crashed = fail(KeyError("boom"))
    assert (crashed.result, crashed.reason) == ("crashed", "KeyError: 'boom'")


def test_logits_that_differ_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("llama", "dynamo-20", "float32")
    monkeypatch.setattr("tools.coverage.model_file", lambda row, work: tmp_path / "x.onnx")
    for error, result in ((1e-6, "proved"), (0.5, "wrong"), (float("nan"), "wrong")):
        monkeypatch.setattr(
            "tools.coverage.compare_file", lambda *args, e=error: {"prompt of 1": e, "b": 1e-7}
        )
        assert cover(row, tmp_path).result == result


def test_the_page_shows_numbers_and_reasons(tmp_path: Path) -> None:
    rows = [
        Row("llama", "dynamo-20", "float32"),
        Row("llama", "optimum", "float32"),
        Row("opt", "dynamo-20", "float32"),
    ]
    outcomes = [
        Outcome(str(rows[0]), "proved", 3e-6),
        Outcome(str(rows[1]), "refused", float("nan"), "node 'a' is odd"),
        Outcome(str(rows[2]), "wrong", 0.5, "prompt of 1: 5e-01"),
    ]
    write_page(tmp_path / "page.md", outcomes, rows)
    text = (tmp_path / "page.md").read_text()
    assert "| llama | 3e-06 | r1 |" in text
    assert "| opt | **WRONG 5e-01** |  |" in text
    assert "1. refused: node 'a' is odd (llama/optimum/float32)" in text
    assert "1 of 3 files" in text
