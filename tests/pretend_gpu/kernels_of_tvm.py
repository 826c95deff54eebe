"""A Relax module of the kernels that TVM generates for a decoder, next to what numpy says they compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.op import nn
from tvm.s_tir import dlight
from tvm.target import Target

WIDTH, INNER, HEADS, EXPERTS, WORDS, TOKENS = 576, 192, 9, 8, 50, 16


def target(arch: str = "sm_90") -> Target:
    """A GPU that isn't here, with a host that is."""
    limits = {"max_num_threads": 1024, "max_threads_per_block": 1024, "max_shared_memory_per_block": 49152}
    host = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}
    return Target({"kind": "cuda", "arch": arch, "thread_warp_size": 32, **limits}, host=host)


def module(dtype: str) -> tvm.IRModule:
    """The function `main` over a symbolic number of tokens."""
    op, builder = relax.op, relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    kinds: dict[str, tuple[list[Any], str]] = {
        "x": ([n, WIDTH], dtype),
        "weight": ([WIDTH], dtype),
        "bias": ([WIDTH], dtype),
        "gate": ([n, INNER], dtype),
        "up": ([n, INNER], dtype),
        "cosine": ([n, WIDTH // HEADS], "float32"),
        "sine": ([n, WIDTH // HEADS], "float32"),
        "scores": ([n, EXPERTS], dtype),
        "table": ([WORDS, WIDTH], dtype),
        "tokens": ([n], "int64"),
    }
    variables = {name: relax.Var(name, relax.TensorType(*kind)) for name, kind in kinds.items()}
    x, weight, bias, gate, up, cosine, sine, scores, table, tokens = variables.values()
    half = WIDTH // HEADS // 2
    with builder.function("main", list(variables.values())):
        with builder.dataflow():
            wide = op.reshape(x, [n, HEADS, 2 * half])
            low, high = (
                op.strided_slice(wide, [2], [first], [first + half], assume_inbound=True)
                for first in (0, half)
            )
            turned = op.concat([op.negative(high), low], axis=2)
            angles = [op.expand_dims(angle, 1) for angle in (cosine, sine)]
            rotated = op.astype(wide, "float32") * angles[0] + op.astype(turned, "float32") * angles[1]
            wider = [op.astype(each, "float32") for each in (x, weight, bias)]  # it takes no bfloat16
            outputs = [
                nn.rms_norm(x, weight, axes=[-1], epsilon=1e-5),
                op.astype(nn.layer_norm(*wider, axes=[-1], epsilon=1e-5), dtype),
                nn.silu(gate) * up,
                op.permute_dims(op.astype(rotated, dtype), [1, 0, 2]),
                nn.softmax(op.astype(scores, "float32"), axis=-1),
                op.take(table, tokens, axis=0, mode="clip"),
                op.argmax(op.astype(x, "float32"), axis=-1),
                x + bias,
                op.astype(x, "float32"),
                nn.gelu(gate),
                op.tanh(gate) + op.exp(up),
                op.astype(tokens, dtype),
            ]
            result = builder.emit_output(relax.Tuple([builder.emit(output) for output in outputs]))
        builder.emit_func_output(result)
    return builder.finalize()


def chain() -> tvm.IRModule:
    """The function `main` with two kernels whose results stay inside: they get into a CUDA graph."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([TOKENS, WIDTH], "float32"))
    weight = relax.Var("weight", relax.TensorType([WIDTH], "float32"))
    # None of the arguments is an input: they stay where they are from call to call.
    with builder.function("main", [x, weight], attrs={"num_input": 0}):
        with builder.dataflow():
            part = builder.emit(nn.softmax(x, axis=-1))
            normed = builder.emit(nn.rms_norm(part, weight, axes=[-1], epsilon=1e-5))
            result = builder.emit_output(nn.softmax(normed, axis=-1))
        builder.emit_func_output(result)
    return builder.finalize()


def scheduled(mod: tvm.IRModule, where: Target) -> tvm.IRModule:
    """The module with fused kernels, each with a schedule for the GPU."""
    with where:
        for step in (
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            dlight.ApplyDefaultSchedule(
                dlight.gpu.Reduction(), dlight.gpu.GeneralReduction(), dlight.gpu.Fallback()
            ),
        ):
            mod = step(mod)
    return mod


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    """The arguments of `main` in float32, and the tokens in int64."""
    random = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype("float32")

    angles = random.uniform(0, 6, (TOKENS, WIDTH // HEADS)).astype("float32")
    return {
        "x": values(TOKENS, WIDTH),
        "weight": values(WIDTH),
        "bias": values(WIDTH),
        "gate": values(TOKENS, INNER),
        "up": values(TOKENS, INNER),
        "cosine": np.cos(angles),
        "sine": np.sin(angles),
        "scores": values(TOKENS, EXPERTS),
        "table": values(WORDS, WIDTH),
        "tokens": random.integers(0, WORDS, TOKENS),
    }


def expected(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What `main` gives, in float64, for arguments that are already rounded to its type."""
    from math import erf

    a = {name: array.astype("float64") for name, array in arrays.items()}
    x, gate = a["x"], a["gate"]
    centred = x - x.mean(-1, keepdims=True)
    heads = x.reshape(TOKENS, HEADS, -1)
    low, high = np.split(heads, 2, axis=-1)
    turned = np.concatenate([-high, low], -1)
    rotated = heads * a["cosine"][:, None] + turned * a["sine"][:, None]
    powers = np.exp(a["scores"] - a["scores"].max(-1, keepdims=True))
    return [
        x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * a["weight"],
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * a["weight"] + a["bias"],
        gate / (1 + np.exp(-gate)) * a["up"],
        rotated.transpose(1, 0, 2),
        powers / powers.sum(-1, keepdims=True),
        a["table"][arrays["tokens"]],
        x.argmax(-1),
        x + a["bias"],
        x,
        gate * 0.5 * (1 + np.vectorize(erf)(gate / np.sqrt(2))),
        np.tanh(gate) + np.exp(a["up"]),
        a["tokens"],
    ]
