"""CUDA's products and embeddings as the passes ask for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tvm import tirx
from tvm.tirx import PrimFunc

from kvc_passes.kernel_sets import TensorType
from kvc_passes.weight_format import WeightFormat

from ..emit import Emitter, argument, i64, size_var
from . import products, rows
from .knobs import Knobs, Product, ProductKnobs
from .launches import Matrix, Variants, parts


@dataclass(frozen=True)
class CudaProducts:
    """Implements kvc_passes.kernel_sets.MatmulKernels.

    Attributes:
        variants: what the functions launch, and how they are made.
        overwrites: a program loads what is added to its block of y just before it stores the block; blocks do
            not overlap, and of the threads that hold an element one stores it.
    """

    variants: Variants = field(repr=False, compare=False)
    panel: int = 16
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    adds: bool = True
    overwrites: bool = True

    def packed(self, columns: int, depth: int, format: WeightFormat) -> tuple[TensorType, ...]:
        return rows.packed_tensors(columns, depth, format)

    def matmul(
        self,
        columns: int,
        depth: int,
        format: WeightFormat,
        *,
        bias: bool,
        flat: bool,
        dtype: str,
        residual: bool = False,
    ) -> PrimFunc:
        arguments = (columns, depth, format, bias, residual, flat, dtype)
        return self.variants.function(("matmul", *arguments), partial(self._matmul, *arguments))

    def variant(self, product: Product) -> PrimFunc:
        """The function that launches one variant of a product for any number of rows."""
        p, own = product, self.variants
        arguments = (p.columns, p.depth, p.format, p.bias, p.residual, p.flat, p.dtype)
        return self._matmul(*arguments, own.arch, own.knobs, only=p.most)

    def _matmul(
        self,
        columns: int,
        depth: int,
        format: WeightFormat,
        bias: bool,
        residual: bool,
        flat: bool,
        dtype: str,
        arch: int,
        knobs: Knobs,
        only: int | None = None,
    ) -> PrimFunc:
        """The function; `only`: with the variant for at most so many rows alone, for any number of them."""
        e, m = Emitter(), size_var("m")
        out_dtype = "float32" if flat else dtype
        x = argument("x", (1, m, depth), dtype)
        weight = self._weight(columns, depth, format)
        added = {"bias": argument("bias", (columns,), dtype)} if bias else {}
        if residual:
            added["residual"] = argument("residual", (1, m, columns), dtype)
        y = argument("y", (m, columns) if flat else (1, m, columns), out_dtype)
        inputs = {"x": x, **weight, **added}
        values = {**inputs, "y": y, "m": m, "columns": i64(columns), "depth": i64(depth)}
        values |= {"xbox": Matrix(x, m, depth), "wbox": Matrix(weight["w"], i64(columns), depth)}

        def tuned(most: int) -> ProductKnobs:
            return knobs.product(arch, Product(columns, depth, format, bias, residual, flat, dtype, most))

        least = 0
        for most, kernel, tall, wide in products.product_kernels(
            columns, depth, format, dtype, out_dtype, bias, arch, residual, tuned
        ):
            grid = (parts(m, tall) * -(-columns // wide),)
            if only is not None:
                if only == (most or 0):
                    self.variants.launch(e, kernel, values, grid)
                continue
            fits = m > least if most is None else tirx.And(m > least, m <= most)
            with e.when(fits):
                self.variants.launch(e, kernel, values, grid)
            least = most or least
        return e.function([*inputs.values(), y], list(inputs.values()), [y])

    def head_packed(self, heads: int, columns: int, depth: int, format: WeightFormat) -> TensorType:
        return TensorType(format.dtype, (heads * columns, depth))

    def head_product(
        self,
        heads: int,
        group: int,
        columns: int,
        depth: int,
        format: WeightFormat,
        *,
        absorbed: bool,
        dtype: str,
    ) -> PrimFunc:
        arguments = (heads, group, columns, depth, format, absorbed, dtype)
        return self.variants.function(("head_product", *arguments), partial(self._head_product, *arguments))

    def _head_product(
        self,
        heads: int,
        group: int,
        columns: int,
        depth: int,
        format: WeightFormat,
        absorbed: bool,
        dtype: str,
        arch: int,
        knobs: Knobs,
    ) -> PrimFunc:
        e, m = Emitter(), size_var("m")

        def operand(name: str, size: int) -> Any:
            return argument(name, (1, heads, m, size) if absorbed else (1, m, heads, size), dtype)

        tensor = self.head_packed(heads // group, columns, depth, format)
        x, y, w = operand("x", depth), operand("y", columns), argument("w", tensor.shape, tensor.dtype)
        values = {"x": x, "w": w, "y": y, "m": m, "columns": i64(columns), "depth": i64(depth)}
        least = 0
        for most, kernel, tall, wide in products.head_product_kernels(
            heads, group, columns, depth, format, dtype, absorbed, arch
        ):
            fits = m > least if most is None else tirx.And(m > least, m <= most)
            with e.when(fits):
                self.variants.launch(e, kernel, values, (parts(m, tall) * -(-columns // wide), heads))
            least = most or least
        return e.function([x, w, y], [x, w], [y])

    def embedding(self, columns: int, depth: int, format: WeightFormat, dtype: str) -> PrimFunc:
        e, n = Emitter(), size_var("n")
        weight = self._weight(columns, depth, format)
        ids = argument("ids", (1, n), "int64")
        y = argument("y", (1, n, depth), dtype)
        kernel, wide = products.embedding_kernel(depth, format, dtype)
        inputs = {**weight, "ids": ids}
        values = {**inputs, "y": y, "n": n, "depth": i64(depth)}
        self.variants.launch(e, kernel, values, (n, -(-depth // wide)))
        return e.function([*inputs.values(), y], list(inputs.values()), [y])

    def _weight(self, columns: int, depth: int, format: WeightFormat) -> dict[str, Any]:
        names = ("w", "scales", "zeros")
        tensors = self.packed(columns, depth, format)
        return {name: argument(name, t.shape, t.dtype) for name, t in zip(names, tensors)}
