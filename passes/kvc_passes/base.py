"""The one way a pass is written.

A pass is a frozen dataclass in a file of its own. Its fields are its options, plain values. Its docstring
has four parts: Before, After, Needs, Refuses. `run` returns the new module, how many sites it changed,
and what it learned. It never changes the module it was given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

from tvm import IRModule


@dataclass(frozen=True)
class Result:
    """What a pass returns.

    Attributes:
        module: the rewritten module.
        sites: places that changed; 0 means that the module says what it said before.
        facts: what the pass learned, None when it only rewrites.
    """

    module: IRModule
    sites: int
    facts: Any = None


class Pass(Protocol):
    """An IR -> IR transformation."""

    def run(self, mod: IRModule) -> Result: ...


def pass_name(step: Pass) -> str:
    """The pass's name in dumps and timings: its class in kebab-case."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", type(step).__name__).lower()
