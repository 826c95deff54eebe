"""kvc: an ahead-of-time compiler for decoder language models under a memory budget.

    import kvc
    artifact = kvc.compile("model.onnx", budget="1GB", workload="8x256,1x2048")
    with kvc.load(artifact.path) as session:
        print(session.generate("What is the capital of France?")[0].text)

Importing kvc imports neither TVM nor ONNX: a process that only runs a model loads TVM's runtime alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvc_passes.errors import BudgetError, Error, InputError, PlanningError, TargetError, UnsupportedModel
from kvc_passes.facts import ModelFacts
from kvc_passes.plans import Plan, Workload

if TYPE_CHECKING:
    from .api import compile, inspect, plan, planner
    from .artifact import Artifact
    from .checks import verify
    from .graphs import CompiledGraph, compile_graph
    from .runtime import Completion, SamplingParams, Session, load
    from .tuning.api import tune

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "BudgetError",
    "CompiledGraph",
    "Completion",
    "Error",
    "InputError",
    "ModelFacts",
    "Plan",
    "PlanningError",
    "SamplingParams",
    "Session",
    "TargetError",
    "UnsupportedModel",
    "Workload",
    "compile",
    "compile_graph",
    "inspect",
    "load",
    "plan",
    "planner",
    "tune",
    "verify",
]

_HOMES = {
    **dict.fromkeys(("compile", "inspect", "plan", "planner"), ".api"),
    **dict.fromkeys(("Completion", "SamplingParams", "Session", "load"), ".runtime"),
    "Artifact": ".artifact",
    **dict.fromkeys(("CompiledGraph", "compile_graph"), ".graphs"),
    "tune": ".tuning.api",
    "verify": ".checks",
}


def __getattr__(name: str) -> Any:
    """Import the heavy parts when they are first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kvc' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
