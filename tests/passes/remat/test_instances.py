"""The random graphs have what their parameters say; files are read or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvc_passes.errors import InputError
from kvc_passes.remat import Problem
from kvc_passes.remat.instances import layered_graph, read_graph


@pytest.mark.parametrize(("count", "width"), [(100, 0.27), (500, 0.36)])
def test_layered_graphs(count: int, width: float) -> None:
    problem = layered_graph(count, width, seed=3)
    assert problem == layered_graph(count, width, seed=3)
    assert problem != layered_graph(count, width, seed=4)
    assert len(problem.sizes) == count
    read = {i for inputs in problem.inputs for i in inputs}
    assert read == set(range(count - 1))  # everything but the target is read
    assert all(problem.inputs[1:])
    assert not problem.inputs[0]
    assert all(size % 10 == 0 and size > 0 for size in problem.sizes)
    assert problem.costs[0] == problem.costs[-1] == 0


def test_denser_graphs_have_more_edges() -> None:
    sparse, dense = (sum(map(len, layered_graph(200, 0.3, density=d).inputs)) for d in (0.1, 0.6))
    plain, skipping = (sum(map(len, layered_graph(200, 0.3, skips=s).inputs)) for s in (0.0, 0.3))
    assert sparse < 0.6 * dense
    assert 1.25 * plain < skipping < 1.45 * plain


def test_node_link_files(tmp_path: Path) -> None:
    file = tmp_path / "graph.json"
    nodes = [{"name": 5, "out_cost": 10, "duration": 1}, {"name": 7, "out_cost": 20, "duration": 2}]
    body = {"graph": {"order": [7, 5]}, "nodes": nodes, "links": [{"0": 7, "1": 5}]}
    file.write_text(json.dumps(body))
    assert read_graph(file) == Problem((20, 10), (2, 1), ((), (0,)))
    nodes = [{"id": 0, "cost_ram": 10, "cost_cpu": 1}, {"id": 1, "cost_ram": 20, "cost_cpu": 2}]
    file.write_text(json.dumps({"graph": {}, "nodes": nodes, "links": [{"source": 0, "target": 1}]}))
    assert read_graph(file) == Problem((10, 20), (1, 2), ((), (0,)))


@pytest.mark.parametrize("text", ["{", "[]", '{"nodes": []}', '{"nodes": [{}], "links": [], "graph": {}}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "graph.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"graph\.json is no graph of operations"):
        read_graph(file)
