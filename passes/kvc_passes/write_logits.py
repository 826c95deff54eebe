"""The logits are written where the caller wants them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import IRModule, relax, te

from .base import Result
from .graph import dims, graph_of, op_name
from .kernel_sets import MatmulKernels
from .pack_matmuls import MATMUL
from .page_attention import is_input
from .rebuild import insert_params, rebuild
from .weights import PackedWeight, WeightPart


@dataclass(frozen=True)
class WriteLogits:
    """No memory of the function's own leaves it: logits go into a tensor of the caller's.

    Before: `main(...) -> logits [1, r, V]`, a fresh tensor.
    After: a parameter `logits` [r, V] before the pools, written in place and returned.
    Needs: PackMatmuls, to let the last product write there directly; any other last operation is copied.
    Refuses: nothing.
    """

    kernels: MatmulKernels
    recipes: Mapping[str, WeightPart]

    def run(self, mod: IRModule) -> Result:
        function = mod["main"]
        graph = graph_of(function)
        last = graph.alias(function.body.body)
        _, r, columns = dims(last)
        logits = relax.Var("logits", relax.TensorType((r, columns), "float32"))

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if var != last:
                return None
            first = value.args[1].fields[1].name if self._is_product(value) else ""
            weight = self.recipes[first].weight if first in self.recipes else None
            if isinstance(weight, PackedWeight):
                args = list(value.args[1].fields)
                packed = self.kernels.packed(weight.columns, weight.depth, weight.format)
                kernel = self.kernels.matmul(
                    weight.columns,
                    weight.depth,
                    weight.format,
                    bias=len(args) > 1 + len(packed),
                    flat=True,
                    dtype=str(args[0].ty.dtype.dtype),
                )
                call = builder.add_func(kernel, "packed_matmul_logits")
                return relax.op.call_tir_inplace(call, [*args, logits], [len(args)], logits.ty)
            source = builder.emit(value)
            copy = builder.add_func(_copy(r, columns, str(source.ty.dtype.dtype)), "copy_logits")
            return relax.op.call_tir_inplace(copy, [source, logits], [1], logits.ty)

        behind = [p.name for p in function.params if is_input(p.name)][-1]
        module = rebuild(mod, insert_params(function, behind, [logits]), place)
        return Result(module, 1)

    def _is_product(self, value: relax.Expr) -> bool:
        return op_name(value) == "call_tir" and value.args[0].name_hint.startswith(MATMUL)


def _copy(rows: object, columns: object, dtype: str) -> object:
    source = te.placeholder((1, rows, columns), dtype, name="source")
    target = te.compute((rows, columns), lambda i, j: source[0, i, j].astype("float32"), name="target")
    opaque = 8  # fused with what comes before, the logits would be written to a tensor that is then copied
    function = te.create_prim_func([source, target]).without_attr("global_symbol")  # "main", like ours
    return function.with_attr("op_pattern", opaque)
