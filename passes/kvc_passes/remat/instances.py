"""Problems to measure the solvers on: random layered graphs, and files of graphs that others published."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..errors import InputError
from .problem import Problem


def layered_graph(
    count: int,
    width: float,
    variability: float = 0.75,
    density: float = 0.2,
    skips: float = 0.14,
    seed: int = 0,
) -> Problem:
    """A random layered graph of `count` operations, as in Gagrani et al. (arXiv 2207.05899, appendix A).

    Layers have 2 * width * sqrt(count) operations on average and vary uniformly by the part `variability` of
    that. Between neighboring layers each operation has an edge, and `density` of the other possible edges are
    there. Of all edges about the part `skips` goes from a random operation to one in a later layer that is
    not the next. A source stands before the first layer and a target behind the last. The order is a random
    topological one. What the description leaves open: bytes are a mixture of two normal distributions, costs
    uniform in 1..1000.
    """
    random = np.random.default_rng(seed)
    layers = _layers(count, 2 * width * count**0.5, variability, random)
    edges: set[tuple[int, int]] = set()
    for upper, lower in pairwise(layers):
        edges |= _between(upper, lower, density, random)
    for _ in range(round(skips / (1 - skips) * len(edges))):
        depth = int(random.integers(len(layers) - 2))
        target = layers[int(random.integers(depth + 2, len(layers)))]
        edges.add((int(random.choice(layers[depth])), int(random.choice(target))))
    large = random.random(count) < 0.5
    sizes = np.where(large, random.normal(300, 170, count), random.normal(100, 60, count))
    costs = random.integers(1, 1001, count)
    costs[[0, -1]] = 0
    return _in_random_order(np.maximum(1, np.abs(sizes)).astype(int) * 10, costs, edges, random)


def _layers(count: int, mean: float, variability: float, random: np.random.Generator) -> list[list[int]]:
    """Consecutive numbers in layers; the first and the last have one."""
    layers, used = [[0]], 1
    while used < count - 1:
        size = max(1, round(mean * random.uniform(1 - variability, 1 + variability)))
        size = min(size, count - 1 - used)
        layers.append(list(range(used, used + size)))
        used += size
    return [*layers, [count - 1]]


def _between(
    upper: list[int], lower: list[int], density: float, random: np.random.Generator
) -> set[tuple[int, int]]:
    """The fewest edges that reach every operation of two layers, and some of the others."""
    if len(upper) == 1 or len(lower) == 1:
        return {(a, b) for a in upper for b in lower}
    most = max(len(upper), len(lower))
    ups, lows = random.permutation(upper), random.permutation(lower)
    edges = {(int(ups[i % len(ups)]), int(lows[i % len(lows)])) for i in range(most)}
    others = [(a, b) for a in upper for b in lower if (a, b) not in edges]
    chosen = random.choice(len(others), round(density * len(others)), replace=False)
    return edges | {others[i] for i in chosen}


def _in_random_order(
    sizes: np.ndarray, costs: np.ndarray, edges: set[tuple[int, int]], random: np.random.Generator
) -> Problem:
    """The problem whose order draws one of the operations that can run, again and again."""
    readers: list[list[int]] = [[] for _ in sizes]
    waits = [0] * len(sizes)
    for a, b in sorted(edges):
        readers[a].append(b)
        waits[b] += 1
    ready = [op for op, wait in enumerate(waits) if not wait]
    order: list[int] = []
    while ready:
        op = ready.pop(int(random.integers(len(ready))))
        order.append(op)
        for reader in readers[op]:
            waits[reader] -= 1
            if not waits[reader]:
                ready.append(reader)
    return _numbered(order, {op: (int(sizes[op]), int(costs[op])) for op in order}, edges)


def read_graph(path: Path) -> Problem:
    """A graph in networkx's node-link JSON, as published with MOCCASIN (Bartan et al., ICML 2023).

    Bytes are `cost_ram` or `out_cost`, costs `cost_cpu` or `duration`. The order is the graph's `order`;
    without one that of the numbers. Raises InputError where the file is not of that form.
    """
    try:
        body = json.loads(path.read_text())
        source, target = ("source", "target") if "source" in (body["links"] or [{}])[0] else ("0", "1")
        nodes = {node.get("id", node.get("name")): node for node in body["nodes"]}
        numbers = {
            name: (
                int(node.get("cost_ram", node.get("out_cost"))),
                int(node.get("cost_cpu", node.get("duration"))),
            )
            for name, node in nodes.items()
        }
        order = body["graph"].get("order") or sorted(nodes)
        return _numbered(order, numbers, {(link[source], link[target]) for link in body["links"]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no graph of operations in node-link JSON: {error!r}") from error


def _numbered(order: list[int], numbers: dict[int, tuple[int, int]], edges: set[tuple[int, int]]) -> Problem:
    """The problem whose operations are numbered by their place in the order."""
    place = {name: i for i, name in enumerate(order)}
    inputs: list[list[int]] = [[] for _ in order]
    for a, b in edges:
        inputs[place[b]].append(place[a])
    return Problem(
        sizes=tuple(numbers[name][0] for name in order),
        costs=tuple(numbers[name][1] for name in order),
        inputs=tuple(tuple(sorted(read)) for read in inputs),
    )
