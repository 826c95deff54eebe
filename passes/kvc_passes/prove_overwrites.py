"""Kernels that may write over what they read, proved from their loops."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import IRModule

from .base import Result
from .loop_nests import OVERWRITES, Kernel


@dataclass(frozen=True)
class ProveOverwrites:
    """Mark the kernels whose output may take the memory of an input; a schedule hides what that rests on.

    Before: PrimFuncs as legalization and fusion make them; products are marked by the pass that calls them.
    After: the same, with the attribute `kvc.overwrites` of numbers of inputs where there are any.
    Needs: FuseTIR; kernels that are not scheduled yet.
    Refuses: nothing; what is not proved is not marked.
    """

    def run(self, mod: IRModule) -> Result:
        functions, count = dict(mod.functions_items()), 0
        for name, function in functions.items():
            kernel = Kernel.of(function)
            if kernel is not None and (places := kernel.overwritable()):
                functions[name] = function.with_attr(OVERWRITES, list(places))
                count += 1
        return Result(IRModule(functions), count)
