"""How the dimensions of a reshape correspond."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.sym import Analyzer

from .conditions import Unprovable
from .graph import static


def regroup(
    analyzer: Analyzer, source: Sequence[Any], target: Sequence[Any]
) -> list[tuple[int, int, int, int]]:
    """Split two shapes with the same number of elements into the smallest ranges of equal product.

    Returns (source start, source end, target start, target end) of every range, in order. Raises Unprovable
    if one shape ends before the other.
    """
    groups = []
    i = j = 0
    while i < len(source) or j < len(target):
        low, first = i, j
        if i < len(source) and static(source[i]) == 1:
            i += 1
        elif j < len(target) and static(target[j]) == 1:
            j += 1
        elif i == len(source) or j == len(target):
            shapes = " to ".join(f"[{', '.join(map(str, shape))}]" for shape in (source, target))
            raise Unprovable(f"reshapes {shapes}, which are not proved to have as many elements")
        else:
            left, right = source[i], target[j]
            i, j = i + 1, j + 1
            while static(analyzer.simplify(left - right)) != 0:
                if i < len(source) and (
                    j == len(target) or static(analyzer.simplify(tirx.floormod(right, left))) == 0
                ):
                    left, i = left * source[i], i + 1
                elif j < len(target):
                    right, j = right * target[j], j + 1
                else:
                    break
        groups.append((low, i, first, j))
    return groups
