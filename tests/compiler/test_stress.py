"""Arrival load on real models with tiny pools: no page leaked, no token wrong, memory as promised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvc
from kvc_passes.errors import BudgetError


def _tight(model: Path, output: Path, allow: str = "") -> kvc.Artifact:
    """Compiled for the smallest budget that serves six requests of 60 tokens."""
    options: dict[str, Any] = {"workload": "6x60", "allow": allow}
    with pytest.raises(BudgetError) as refused:
        kvc.plan(model, budget="1MB", **options)
    return kvc.compile(model, budget=refused.value.needed, output=output, **options)


@pytest.mark.parametrize(
    ("family", "allow"),
    [("gemma2", ""), pytest.param("llama", "", marks=pytest.mark.slow), ("llama", "window=32,sinks=3")],
)
def test_500_requests_in_few_pages(
    model_file: Callable[..., Path], tmp_path: Path, family: str, allow: str
) -> None:
    """gemma2 has a group of layers with a window, and one without."""
    model = model_file(family, False)
    artifact = _tight(model, tmp_path / "tight.kvc", allow)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__).with_name("stress_run.py")), str(artifact.path), "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    plan = artifact.plan
    assert found["held"] == 0
    assert found["most"] <= found["pages"] == sum(group.pages for group in plan.groups)
    assert found["peak"] <= plan.bytes.total <= plan.budget
    assert found["preemptions"] > 10 or allow  # windows of six requests take what the plan has
    assert found["shared"] > 100 or allow
    ends = [each["end"] for each in found["requests"]]
    assert len(ends) >= 500
    assert set(ends) == {"length", "context", "cancelled"}
    _check_tokens(model, tmp_path, allow, found["requests"][::4])


def _check_tokens(model: Path, tmp_path: Path, allow: str, requests: list[dict[str, Any]]) -> None:
    """Every fourth request alone, in an artifact with room for all, gets the same tokens."""
    kvc.compile(model, budget="400MB", workload="1x250", allow=allow, output=tmp_path / "wide.kvc")
    with kvc.load(tmp_path / "wide.kvc", share=False) as session:
        for each in requests:
            (alone,) = session.generate([each["prompt"]], max_new_tokens=each["new"], ignore_eos=True)
            if each["end"] == "length":
                assert each["tokens"] == alone.tokens
            else:
                assert each["tokens"] == alone.tokens[: len(each["tokens"])]
