"""Libraries of single kernels for tools/gpu_check.py: one function of the virtual machine for each case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.gpu_cases import ATTENTION, PAGE, PRODUCTS, AttentionCase, ProductCase
from tvm import IRModule, relax, tirx

from kvc.cuda_machine import CudaMachine
from kvc.pipeline import Runner
from kvc_passes.sites import AttentionSite, MaskFact
from kvc_passes.weight_format import WeightFormat

CONTEXT = 1 << 17
"""Most tokens of a sequence, which says how many shares decode splits it into."""


def build_kernels(archs: tuple[str, ...], folder: Path, runner: Runner) -> int:
    """Write model.ARCH.so with all cases into `folder`, and tiles.json with their prefill tiles; how many."""
    machine = CudaMachine(archs)
    builder = relax.BlockBuilder()
    for attention in ATTENTION:
        _attention(builder, machine, attention)
    for product in PRODUCTS:
        _product(builder, machine, product)
    module: IRModule = builder.get()
    with machine.target:
        for step in (
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ):
            module = step(module)
    machine.build(module, folder, runner)
    tiles = {c.name: machine.attention((site_of(c),), CONTEXT).tile for c in ATTENTION}
    (folder / "tiles.json").write_text(json.dumps(tiles))
    return len(ATTENTION) + len(PRODUCTS)


def site_of(case: AttentionCase) -> AttentionSite:
    """What the kernel is asked for."""
    window = case.options.get("window")
    mask = MaskFact("window" if window else "causal", window, "given")
    return AttentionSite(
        index=0,
        node=case.name,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.dim,
        value_dim=case.dim,
        scale=case.dim**-0.5,
        softcap=case.options.get("softcap"),
        mask=mask,
        rope=None,
        kv_dtype=case.dtype,  # type: ignore[arg-type]
    )


def format_of(case: ProductCase) -> WeightFormat:
    """How the case's weight is stored."""
    if not case.stored:
        return WeightFormat(case.dtype)  # type: ignore[arg-type]
    return WeightFormat(case.stored, 32, case.dtype, False)  # type: ignore[arg-type]


def _attention(builder: relax.BlockBuilder, machine: CudaMachine, case: AttentionCase) -> None:
    site = site_of(case)
    kernels = machine.attention((site,), CONTEXT)
    assert kernels.page_size == PAGE
    n, pages, t, b, m = (tirx.Var(name, "int64") for name in ("n", "pages", "t", "b", "m"))
    decode = case.phase == "decode"
    rows = b if decode else n
    q = _tensor("q", (1, case.heads, rows, case.dim), case.dtype)
    state = site.state(PAGE, kernels.keys_transposed)
    k, v = (_tensor(name, (pages, *shape), dtype) for name, (dtype, shape) in state.items())
    positions, tiles = _tensor("positions", (rows,), "int64"), _tensor("tiles", (t, 3), "int32")
    table = _tensor("table", (b, m), "int32")
    params = [q, k, v, positions, table] if decode else [q, k, v, positions, tiles, table]
    out = relax.TensorType((1, rows, case.heads, case.dim), case.dtype)
    with builder.function(case.name, params):
        if decode:
            part = relax.TensorType((b, kernels.splits(site), case.heads, case.dim + 2), "float32")
            kernel = builder.add_func(kernels.decode(site, case.dtype), f"{case.name}_kernel")
            both = builder.emit(relax.op.call_tir(kernel, params, [part, out]))
            result = builder.emit(relax.TupleGetItem(both, 1))
        else:
            kernel = builder.add_func(kernels.prefill(site, case.dtype), f"{case.name}_kernel")
            result = builder.emit(relax.op.call_tir(kernel, params, out))
        builder.emit_func_output(result)


def _product(builder: relax.BlockBuilder, machine: CudaMachine, case: ProductCase) -> None:
    format = format_of(case)
    m = tirx.Var("m", "int64")
    x = _tensor("x", (1, m, case.depth), case.dtype)
    tensors = machine.products.packed(case.columns, case.depth, format)
    weight = [_tensor(f"w{i}", tensor.shape, tensor.dtype) for i, tensor in enumerate(tensors)]
    function = machine.products.matmul(
        case.columns, case.depth, format, bias=False, flat=False, dtype=case.dtype
    )
    with builder.function(case.name, [x, *weight]):
        kernel = builder.add_func(function, f"{case.name}_kernel")
        out = relax.TensorType((1, m, case.columns), case.dtype)
        builder.emit_func_output(builder.emit(relax.op.call_tir(kernel, [x, *weight], out)))


def _tensor(name: str, shape: tuple[Any, ...], dtype: str) -> relax.Var:
    return relax.Var(name, relax.TensorType(shape, dtype))
