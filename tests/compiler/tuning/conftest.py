"""A worker of `kvc tune` that measures nothing."""

from __future__ import annotations

import pytest

from .tuning_cases import FakeWorker, times


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWorker:
    """Nothing is measured; times are made up."""
    worker = FakeWorker(times)
    monkeypatch.setattr("kvc.tuning.api.Worker", lambda *_: worker)
    return worker
