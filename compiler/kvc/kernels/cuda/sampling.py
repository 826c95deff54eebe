"""Choosing tokens on a GPU: what kvc.runtime.sampler does, for rows of logits that stay there.

Two kernels: the largest logit of every block of a row, then a program a row. That takes the lowest id of the
largest logits or, where a row is drawn, writes weights in the place of the logits, finds what top-k and top-p
leave by bisection over the bits of the weights, and draws with the row's own number between 0 and 1.

The result is deterministic, and that of `sampler.sample` with the same generator, except where rounding
decides. A weight's relative error is below 2^-21 + 2^-23 |ln(weight)|; less than 2^(1 - shift) of it, and
weights below 2^-shift of the largest, are lost in sums, which are of integers and otherwise exact.
"""

from __future__ import annotations

from typing import Any, Final

from tvm import IRModule, relax, tirx
from tvm.tirx import PrimFunc

from kvc.runtime.choices import BLOCK, CHOSEN, WORDS, blocks_of

from ..emit import Emitter, argument, size_var
from .attention import power
from .device import DeviceKernel
from .launches import Variants

_CHUNK: Final = 4096
"""Weights that a program has in registers at once."""


def shift_of(vocab: int) -> int:
    """Bits behind the point of a sum of `vocab` weights of at most 1 that is below 2^62."""
    return 62 - max(vocab - 1, 1).bit_length()


def peaks_kernel(vocab: int, columns: int) -> DeviceKernel:
    """The largest logit of every block of a row, as a word whose order is that of logits, then of low ids.

    Arguments: logits f32[r, columns], of which the first `vocab` columns count, parts i64[r, blocks].
    Grid (r, blocks).
    """
    return DeviceKernel(
        "sampling.peaks",
        (("logits", "*fp32"), ("parts", "*i64")),
        (("VOCAB", vocab), ("STRIDE", columns), ("BLOCK", BLOCK)),
        ("logits", "parts"),
    )


def choose_kernel(vocab: int, columns: int) -> DeviceKernel:
    """The next token of every row, from what `peaks_kernel` found.

    Arguments: logits f32[r, columns], overwritten where a row is drawn, parts i64[r, blocks],
    draws i64[r, WORDS] and chosen i32[r, CHOSEN] as kvc.runtime.choices has them. Grid (r,).
    """
    chunk = min(_CHUNK, max(power(vocab), 128))
    constants = {
        "VOCAB": vocab,
        "STRIDE": columns,
        "BLOCKS": blocks_of(vocab),
        "BP": power(blocks_of(vocab)),
        "CHUNK": chunk,
        "SHIFT": shift_of(vocab),
    }
    types = (("logits", "*fp32"), ("parts", "*i64"), ("draws", "*i64"), ("chosen", "*i32"))
    pointers = tuple(name for name, _ in types)
    return DeviceKernel(
        "sampling.choose", types, tuple(constants.items()), pointers, warps=max(4, chunk // 256)
    )


def choosing(vocab: int, columns: int, variants: Variants) -> IRModule:
    """`main(logits f32[r, columns], parts, draws, chosen) -> chosen`, written in place."""
    kernel = variants.function(
        ("choose", vocab, columns), lambda arch, knobs: _function(vocab, columns, variants)
    )
    r = tirx.Var("r", "int64")
    shapes = {
        "logits": ((r, columns), "float32"),
        "parts": ((r, blocks_of(vocab)), "int64"),
        "draws": ((r, WORDS), "int64"),
        "chosen": ((r, CHOSEN), "int32"),
    }
    params = [relax.Var(name, relax.TensorType(*each)) for name, each in shapes.items()]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        function = builder.add_func(kernel, "choose_tokens")
        result = builder.emit(relax.op.call_tir_inplace(function, params, [3], params[3].ty))
        builder.emit_func_output(result)
    return builder.get()


def _function(vocab: int, columns: int, variants: Variants) -> PrimFunc:
    e, r = Emitter(), size_var("r")
    values: dict[str, Any] = {
        "logits": argument("logits", (r, columns)),
        "parts": argument("parts", (r, blocks_of(vocab)), "int64"),
        "draws": argument("draws", (r, WORDS), "int64"),
        "chosen": argument("chosen", (r, CHOSEN), "int32"),
    }
    variants.launch(e, peaks_kernel(vocab, columns), values, (r, blocks_of(vocab)))
    variants.launch(e, choose_kernel(vocab, columns), values, (r,))
    given = list(values.values())
    return e.function(given, given[:3], given)
