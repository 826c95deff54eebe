"""The measured memory of the runtime: reproducible, and made of what it should be."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from kvc.runtime import overhead
from kvc_passes.errors import TargetError


@pytest.fixture(autouse=True)
def _measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests measure a process once: see tests/conftest.py."""
    monkeypatch.setattr(overhead, "_run_probe", overhead._run_probe.__wrapped__)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    vocab = {f"word{i}": i for i in range(60_000)}
    Tokenizer(models.WordLevel(vocab, unk_token="word0")).save(str(folder / "tokenizer.json"))
    return folder


def test_measurement_is_reproducible(assets: Path) -> None:
    sizes = [overhead._run_probe(assets, 2) for _ in range(2)]
    assert abs(sizes[0][0] - sizes[1][0]) < 1 << 20
    assert abs(sizes[0][1] - sizes[1][1]) < 1 << 20


def test_tokenizer_counts_and_its_loading_is_covered_by_weights(assets: Path) -> None:
    bare, full = overhead.measure(None), overhead.measure(assets)
    loaded_first = overhead.measure(assets, others=1 << 30)
    assert 16 << 20 < bare < loaded_first <= full < 400 << 20
    assert bare % (1 << 20) == 0


def test_failing_probe_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("not a tokenizer")
    with pytest.raises(TargetError, match=r"cannot be measured: .*tokenizer cannot be read"):
        overhead.measure(tmp_path)
