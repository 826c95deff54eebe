"""Libraries of single kernels for tools/gpu_check.py: one function of the virtual machine for each case."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.gpu_cases import (
    ATTENTION,
    BOXED,
    BOXED_ATTENTION,
    FORMS,
    PAGE,
    PRODUCTS,
    AttentionCase,
    ProductCase,
    query_columns,
    weight_shapes,
)
from tvm import IRModule, relax, tirx

from kvc.cuda_machine import CudaMachine, number_of
from kvc.kernels.attention import AttentionShape
from kvc.kernels.cuda import boxes
from kvc.kernels.cuda.host_attention import CudaAttention
from kvc.kernels.cuda.knobs import BY_ENGINE, Defaults, PrefillKnobs, Product, ProductKnobs
from kvc.pipeline import Runner
from kvc_passes.markers import HeadProduct
from kvc_passes.sites import AttentionSite, MaskFact, Remade, Sliced
from kvc_passes.views import Angle, View, Views
from kvc_passes.weight_format import WeightFormat

CONTEXT = 1 << 17
"""Most tokens of a sequence, which says how many shares decode splits it into."""


class Engine(Defaults):
    """Kernels get their operands from the copy engine, where it can bring them."""

    def product(self, arch: int, product: Product) -> ProductKnobs:
        return ProductKnobs(copy=BY_ENGINE)

    def prefill(self, arch: int, shape: AttentionShape, tile: int) -> PrefillKnobs:
        return PrefillKnobs(copy=BY_ENGINE)


def build_kernels(archs: tuple[str, ...], folder: Path, runner: Runner) -> int:
    """Write model.ARCH.so with all cases into `folder`, and tiles.json with their prefill tiles; how many."""
    machine = CudaMachine(archs)
    _build(machine, folder, [*ATTENTION, *FORMS], PRODUCTS, runner)
    tiles = {c.name: machine.attention((site_of(c),), CONTEXT).tile for c in (*ATTENTION, *FORMS)}
    (folder / "tiles.json").write_text(json.dumps(tiles))
    return len(ATTENTION) + len(FORMS) + len(PRODUCTS)


def build_boxed(archs: tuple[str, ...], folder: Path, runner: Runner) -> None:
    """Write model.ARCH.so with the twins that use the copy engine, for architectures that have one."""
    having = tuple(arch for arch in archs if boxes.legal(number_of(arch)))
    if having:
        folder.mkdir()
        _build(CudaMachine(having, knobs=Engine()), folder, BOXED_ATTENTION, BOXED, runner)


def _build(
    machine: CudaMachine,
    folder: Path,
    attentions: Iterable[AttentionCase],
    products: Iterable[ProductCase],
    runner: Runner,
) -> None:
    builder = relax.BlockBuilder()
    for attention in attentions:
        _attention(builder, machine, attention)
    for product in products:
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


def site_of(case: AttentionCase) -> AttentionSite:
    """What the kernel is asked for."""
    window = case.options.get("window")
    sliced, remade = None, None
    if case.state == "x_gemm":
        remade = Remade(case.depth, case.dim // 2, fine=True)
    if case.state == "k_plus_r":
        sliced = Sliced(case.kv_heads, case.dim, case.rest, case.dim // 2, fine=True)
    kv_heads, head_dim, value_dim = case.kv_heads, case.dim, case.dim
    if sliced is not None:
        kv_heads, head_dim, value_dim = 1, sliced.width, sliced.value_dim
    elif case.state == "mla_latent":
        kv_heads, head_dim, value_dim = 1, case.depth + case.rest, case.depth
    mask = MaskFact("memory" if case.of_memory else "window" if window else "causal", window, "given")
    angle = Angle("float32", case.dim // 2, 0)
    view = View(query_columns(case), 0, case.dim, case.dim // 2, angle, angle)
    return AttentionSite(
        index=0,
        node=case.name,
        heads=case.heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        scale=case.dim**-0.5,
        softcap=case.options.get("softcap"),
        mask=mask,
        rope=None,
        kv_dtype=case.dtype,  # type: ignore[arg-type]
        kept=case.state,  # type: ignore[arg-type]
        sliced=sliced,
        remade=remade,
        views=Views(query=view) if case.turned else None,
    )


def format_of(case: ProductCase) -> WeightFormat:
    """How the case's weight is stored."""
    if not case.stored:
        return WeightFormat(case.dtype)  # type: ignore[arg-type]
    return WeightFormat(case.stored, 32, case.dtype, False)  # type: ignore[arg-type]


def _attention(builder: relax.BlockBuilder, machine: CudaMachine, case: AttentionCase) -> None:
    """A function of the arguments of gpu_cases.Attention.inputs; a decode's has no tiles."""
    site = site_of(case)
    kernels = machine.attention((site,), CONTEXT)
    assert kernels.page_size == PAGE
    n, pages, t, b, m = (tirx.Var(name, "int64") for name in ("n", "pages", "t", "b", "m"))
    decode = case.phase == "decode"
    rows = b if decode else n
    q = [_tensor("q", (1, case.heads, rows, case.dim), case.dtype)]
    if case.turned:
        q = [_tensor("q", (1, rows, query_columns(case)), case.dtype)]
        q += [_tensor(name, (1, rows, case.dim // 2), "float32") for name in ("cos", "sin")]
    state = site.state(PAGE, kernels.keys_transposed)
    pools = [_tensor(name, (pages, *shape), dtype) for name, (dtype, shape) in state.items()]
    positions, tiles = _tensor("positions", (rows,), "int64"), _tensor("tiles", (t, 3), "int32")
    table = _tensor("table", (b, m), "int32")
    weights = [_tensor(name, shape, case.dtype) for name, shape in weight_shapes(case).items()]
    params = [*q, *pools, positions, *([] if decode else [tiles]), table, *weights]
    width = case.dim - case.rest if case.state == "mla_latent" else site.value_dim
    out = relax.TensorType((1, rows, case.heads, width), "float32" if site.sliced else case.dtype)
    with builder.function(case.name, params):
        kernel = builder.add_func(_kernel(kernels, site, case, decode), f"{case.name}_kernel")
        if decode:
            places = kernels.workspace(site, b)
            part = relax.TensorType((*places, case.heads, site.value_dim + 2), "float32")
            both = builder.emit(relax.op.call_tir(kernel, params, [part, out]))
            result = builder.emit(relax.TupleGetItem(both, 1))
        else:
            result = builder.emit(relax.op.call_tir(kernel, params, out))
        builder.emit_func_output(result)


def _kernel(kernels: CudaAttention, site: AttentionSite, case: AttentionCase, decodes: bool) -> tirx.PrimFunc:
    format, dtype = WeightFormat(case.dtype), case.dtype  # type: ignore[arg-type]
    if site.remade is not None:
        return kernels.remade(site, format, format, biases=(False, False), decodes=decodes, dtype=dtype)
    if case.state == "mla_latent":
        part = HeadProduct(case.heads, 1, case.dim - case.rest, 0, 0)
        return kernels.rebuilt(site, part, part, format, format, dtype=dtype)
    return kernels.decode(site, case.dtype) if decodes else kernels.prefill(site, case.dtype)


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
