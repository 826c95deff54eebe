"""Which calls become CUDA graphs, and what errors of CUDA become. See also tests/compiler/test_cuda.py."""

from __future__ import annotations

from typing import Any

import pytest

from kvc.runtime.graphs import MOST, Graphs
from kvc_passes.errors import Error


class Cuda:
    """Counts calls of the library's functions; those in `failing` return an error."""

    def __init__(self, **failing: int) -> None:
        self.failing, self.calls = failing, list[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> int:
            self.calls.append(name)
            return self.failing.get(name, 0)

        return call


def test_the_second_call_is_recorded_and_later_ones_are_launches() -> None:
    cuda, ran = Cuda(), list[int]()
    graphs = Graphs(cuda, 1)  # type: ignore[arg-type]
    for _ in range(4):
        graphs.run(("f", 2), lambda: ran.append(2))
    assert ran == [2, 2]  # at first, and while it is recorded
    assert cuda.calls.count("cudaGraphLaunch") == 3
    graphs.run(("f", 3), lambda: ran.append(3))
    assert ran == [2, 2, 3]
    graphs.close()
    assert cuda.calls.count("cudaGraphExecDestroy") == 1


def test_only_so_many_graphs_are_kept() -> None:
    cuda, ran = Cuda(), list[int]()
    graphs = Graphs(cuda, 1)  # type: ignore[arg-type]
    for key in range(MOST + 3):
        for _ in range(3):
            graphs.run(("f", key), lambda key=key: ran.append(key))
    assert cuda.calls.count("cudaGraphInstantiate") == MOST
    assert ran.count(MOST + 1) == 3
    for _ in range(3):  # of each function
        graphs.run(("g", 1), lambda: ran.append(-1))
    assert ran.count(-1) == 2


@pytest.mark.parametrize(
    "function", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphLaunch"]
)
def test_errors_of_cuda_are_said(function: str) -> None:
    graphs = Graphs(Cuda(**{function: 719}), 1)  # type: ignore[arg-type]
    graphs.run(("f", 1), lambda: None)
    with pytest.raises(Error, match="719"):
        graphs.run(("f", 1), lambda: None)


def test_a_recording_ends_where_the_call_fails() -> None:
    cuda = Cuda()
    graphs = Graphs(cuda, 1)  # type: ignore[arg-type]
    graphs.run(("f", 1), lambda: None)
    with pytest.raises(ZeroDivisionError):
        graphs.run(("f", 1), lambda: 1 // 0)
    assert cuda.calls[-1] == "cudaStreamEndCapture"
