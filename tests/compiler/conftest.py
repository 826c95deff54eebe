"""One tiny model, compiled once, for the tests of the command."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvc import cli
from kvc.kernels.traits import CpuTraits
from kvc.machine import CpuMachine
from kvc.planning.rates import nominal

from .cli_fixtures import BUDGET, Result, kvc

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def llama(model_file: Callable[..., Path]) -> Path:
    """A Llama with 512 tokens and 256 positions, its tokenizer beside it. Not to be changed."""
    return model_file("llama")


@pytest.fixture(scope="module")
def fixed_rates() -> Iterator[None]:
    """Plans of this process are for one CPU's rates: the same forms and chunks wherever tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuMachine, "rates", nominal(CpuTraits(8, 16, 2)))
        yield


@pytest.fixture(scope="session")
def artifact(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` compiled by the command. Not to be changed."""
    path = tmp_path_factory.mktemp("artifact") / "llama.kvc"
    result = kvc("compile", llama, *BUDGET, "-o", path)
    assert result.status == 0, result.err
    return path


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of `llama` in a folder of its own."""
    shutil.copytree(llama.with_suffix(".assets"), tmp_path / "model.assets")
    return Path(shutil.copyfile(llama, tmp_path / "model.onnx"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("plan", ...)` runs the command in this process."""

    def command(*arguments: str | Path) -> Result:
        capsys.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # from the parser of arguments
            status = int(stop.code or 0)
        return Result(status, *capsys.readouterr())

    return command
