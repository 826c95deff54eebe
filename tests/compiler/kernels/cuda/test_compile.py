"""The kernels compiled for GPUs, which needs none: what the code holds, and what it takes."""

import dataclasses
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from kvc.kernels.attention import AttentionShape
from kvc.kernels.cuda import boxes, device, rekeyed, remade, sampling, shared
from kvc.kernels.cuda.attention import (
    append_kernel,
    choose_tile,
    decode_kernel,
    merge_kernel,
    prefill_kernel,
)
from kvc.kernels.cuda.device import Compiled, DeviceKernel, compile_kernel, parameters_of
from kvc.kernels.cuda.knobs import BY_ENGINE, PrefillKnobs, ProductKnobs
from kvc.kernels.cuda.products import embedding_kernel, head_product_kernels, product_kernels
from kvc_passes.errors import PlanningError, TargetError
from kvc_passes.sites import Rekeyed, Remade, Sliced
from kvc_passes.views import Angle, View
from kvc_passes.weight_format import WeightFormat

pytest.importorskip("triton")

SHAPE = AttentionShape(32, 8, 128, 128, 0.0884, kv_dtype="float16", page_size=64)
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 4096},
    "narrow window, sinks": {"window": 128, "sink_scores": True},
    "sink keys": {"window": 1024, "sink_keys": 4},
    "chunks": {"chunk": 8192},
    "softcap, guarded": {"softcap": 30.0, "guarded": True},
    "slopes": {"slopes": True},
    "learned bias": {"distances": 129},
    "an encoder's output": {"whole": True},
    "predicate": {"predicate": "k <= q and ((k + h) % 3 < 2 or (q - k) // 7 == 1)"},
}
WEIGHTS = [
    WeightFormat("float16"),
    WeightFormat("uint4", 32, "float16"),
    WeightFormat("uint4", 128, "float32", zeros=True),
    WeightFormat("uint8", 32, "float16", zeros=True),
    WeightFormat("uint8", 4096, "float32"),
]
BOXES = r"cp\.async\.bulk\.tensor"
COPY, WGMMA, MMA = r"cp\.async\.c[ag]\.shared", r"wgmma\.mma_async", r"mma\.sync\.aligned"


def holds(code: Compiled, pattern: str) -> bool:
    return re.search(pattern, code.ptx) is not None


def prefill(shape: AttentionShape, dtype: str, arch: int) -> DeviceKernel:
    return prefill_kernel(shape, choose_tile(shape.group, shape.head_dim), dtype, arch)


@pytest.mark.parametrize("page", [16, 64])
def test_prefill_and_large_products_use_the_units_of_their_architecture(page: int) -> None:
    large = product_kernels(4096, 4096, WeightFormat("float16"), "float16", "float16", True, 90)[-1][1]
    shape = dataclasses.replace(SHAPE, page_size=page)
    for arch in (80, 90):
        for kernel in (prefill(shape, "float16", arch), large):
            code = compile_kernel(kernel, arch)
            assert holds(code, COPY)
            assert holds(code, WGMMA) == (arch == 90)
            assert holds(code, MMA) == (arch == 80)
            assert f".entry {kernel.name}(" in code.ptx
            assert code.cubin[:4] == b"\x7fELF"
            assert code.warps == kernel.warps


@pytest.mark.parametrize("arch", [80, 90])
def test_decode_and_products_of_few_rows_copy_ahead(arch: int) -> None:
    kernels = [decode_kernel(SHAPE, 8, "float16")]
    kernels += [product_kernels(4096, 4096, f, "float16", "float16", False, arch)[0][1] for f in WEIGHTS]
    for kernel in kernels:
        code = compile_kernel(kernel, arch)
        assert holds(code, COPY)
        assert holds(code, MMA)


@pytest.mark.parametrize(("dtype", "arch"), [("float16", 90), ("bfloat16", 90), ("float16", 100)])
def test_products_of_boxes_use_the_copy_engine(dtype: str, arch: int) -> None:
    format = WeightFormat(dtype)  # type: ignore[arg-type]
    for most, kernel, tall, wide in product_kernels(
        4096, 4096, format, dtype, dtype, True, arch, True, lambda most: ProductKnobs(copy=BY_ENGINE)
    ):
        code = compile_kernel(kernel, arch)
        assert holds(code, BOXES)
        assert not holds(code, COPY)
        if most is None or most > 64:
            assert holds(code, WGMMA if arch == 90 else r"tcgen05\.mma")
        matrix = ["u8", "u32", "u32", "u64", "u64"]
        assert parameters_of(code.ptx) == [*matrix, *matrix, *["u64"] * 3, *["u32"] * 3, "u64", "u64"]
        assert code.shared >= 2 * 64 * (tall + wide)


BOXABLE = {
    "plain": {},
    "window": {"window": 4096},
    "odd heads, softcap": {"head_dim": 80, "value_dim": 80, "softcap": 30.0},
    "bfloat16": {"kv_dtype": "bfloat16"},
    "wide heads": {"heads": 8, "head_dim": 256, "value_dim": 256},
}


@pytest.mark.parametrize("name", BOXABLE)
def test_prefill_of_boxes_uses_the_copy_engine(name: str) -> None:
    shape = dataclasses.replace(SHAPE, **BOXABLE[name])  # type: ignore[arg-type]
    tile = choose_tile(shape.group, shape.head_dim)
    kernel = prefill_kernel(shape, tile, shape.kv_dtype, 90, PrefillKnobs(copy=BY_ENGINE))
    code = compile_kernel(kernel, 90)
    assert holds(code, BOXES)
    assert holds(code, COPY)  # of blocks with masks
    assert holds(code, WGMMA)
    assert parameters_of(code.ptx).count("u8") == 2


NOT_BOXABLE = {
    "no blocks are whole": ({"window": 128}, 90, 0),
    "predicate": ({"predicate": "k <= q"}, 90, 0),
    "codes": ({"stored": "int8"}, 90, 0),
    "float32": ({"kv_dtype": "float32"}, 90, 0),
    "pages smaller than blocks": ({"page_size": 16}, 90, 0),
    "blocks larger than pages": ({}, 90, 128),
    "keys of 200 bytes": ({"head_dim": 100}, 90, 0),
    "no copy engine": ({}, 80, 0),
}


@pytest.mark.parametrize("name", NOT_BOXABLE)
def test_keys_that_the_engine_cannot_copy_are_loaded(name: str) -> None:
    fields, arch, keys = NOT_BOXABLE[name]
    shape = dataclasses.replace(SHAPE, **fields)  # type: ignore[arg-type]
    boxed, plain = (
        prefill_kernel(shape, 32, shape.kv_dtype, arch, PrefillKnobs(keys=keys, copy=copy))
        for copy in (BY_ENGINE, 0)
    )
    assert boxed == plain


def test_boxes_that_the_launch_does_not_encode_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, (_, kernel, _, _) = product_kernels(
        4096, 4096, WeightFormat("float16"), "float16", "float16", False, 90, False,
        lambda most: ProductKnobs(copy=BY_ENGINE),
    )  # fmt: skip
    monkeypatch.setattr(boxes, "copied", lambda type: (128, 32, 2))
    with pytest.raises(PlanningError, match=r"copies boxes \[\(128, 64, 3\)"):
        compile_kernel(kernel, 90)


@pytest.mark.parametrize("features", FEATURES)
def test_every_feature_compiles(features: str) -> None:
    shape = dataclasses.replace(SHAPE, **FEATURES[features])
    for kernel in (prefill(shape, "float16", 90), decode_kernel(shape, 8, "float16")):
        compile_kernel(kernel, 90)


@pytest.mark.parametrize(("dtype", "arch"), [("float16", 80), ("bfloat16", 90), ("float32", 80)])
@pytest.mark.parametrize("dim", [128, pytest.param(256, marks=pytest.mark.slow)])
def test_what_is_turned_when_it_is_read_compiles_without_spills(dim: int, dtype: str, arch: int) -> None:
    shape = dataclasses.replace(SHAPE, head_dim=dim, value_dim=dim, kv_dtype=dtype)
    angle, columns = Angle("float32", dim, 0), (shape.heads + 2 * shape.kv_heads) * dim
    query, key, value = (View(columns, head * dim, dim, dim // 2, angle, angle) for head in (0, 32, 40))
    tile = choose_tile(shape.group, dim)
    for kernel in (
        prefill_kernel(shape, tile, dtype, arch, view=query),
        decode_kernel(shape, 8, dtype, view=query),
        append_kernel(shape, dtype, key, dataclasses.replace(value, half=0, cosine=None, sine=None)),
    ):
        code = compile_kernel(kernel, arch)
        assert parameters_of(code.ptx)[-2:] == ["u64", "u64"]


def test_bfloat16_compiles() -> None:
    shape = dataclasses.replace(SHAPE, kv_dtype="bfloat16")
    for kernel in (
        prefill(shape, "bfloat16", 90),
        decode_kernel(shape, 8, "bfloat16"),
        merge_kernel(shape, 8, "bfloat16"),
        append_kernel(shape, "bfloat16"),
        embedding_kernel(4096, WEIGHTS[2], "bfloat16")[0],
        product_kernels(4096, 4096, WeightFormat("bfloat16"), "bfloat16", "float32", False, 90)[-1][1],
    ):
        code = compile_kernel(kernel, 90)
        assert parameters_of(code.ptx)[-2:] == ["u64", "u64"]


def kept_keys(heads: int, dim: int, rest: int, half: int) -> AttentionShape:
    kept = Sliced(heads, dim, rest, half, fine=True)
    return AttentionShape(heads, 1, kept.width, kept.value_dim, 0.0884, shared=True, sliced=kept)


SHARED = {
    "Llama-2-7B, keys": kept_keys(32, 128, 640, 64),
    "Phi-3-mini, keys": kept_keys(32, 96, 768, 48),
    "GPT-2": AttentionShape(12, 1, 768, 768, 0.125, shared=True),
    "OPT-6.7B": AttentionShape(32, 1, 4096, 4096, 0.0884, shared=True),
    "DeepSeek-V2-Lite": AttentionShape(16, 1, 576, 512, 0.07, shared=True),
    "DeepSeek-V3": AttentionShape(128, 1, 576, 512, 0.07, shared=True),
    "Whisper-small": AttentionShape(12, 1, 768, 768, 0.125, shared=True, whole=True),
    "BLOOM-560M": AttentionShape(16, 1, 1024, 1024, 0.125, slopes=True, shared=True),
    "T5-base": AttentionShape(12, 1, 768, 768, 1.0, distances=129, shared=True),
}


@pytest.mark.parametrize(("dtype", "arch"), [("float16", 89), ("bfloat16", 90), ("float32", 80)])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if "Phi" in n else n for n in SHARED]
)
def test_what_is_key_and_value_in_one_compiles_without_spills(name: str, dtype: str, arch: int) -> None:
    shape = dataclasses.replace(SHARED[name], kv_dtype=dtype, page_size=64)
    kernels = [
        shared.append_kernel(shape, dtype),
        shared.prefill_kernel(shape, dtype, arch)[0],
        shared.decode_kernel(shape, dtype)[0],
        merge_kernel(shape, 64, dtype),
    ]
    for absorbed in (False, True):
        columns, depth = (shape.value_dim, 64) if absorbed else (64, shape.value_dim)
        variants = head_product_kernels(
            shape.heads, 1, columns, depth, WeightFormat(dtype), dtype, absorbed, arch
        )
        kernels += [kernel for _, kernel, _, _ in variants]
    for kernel in kernels:
        compile_kernel(kernel, arch)


@pytest.mark.parametrize(("dtype", "arch"), [("float16", 80), ("bfloat16", 90), ("float32", 80)])
def test_keys_and_values_made_again_compile_without_spills(dtype: str, arch: int) -> None:
    shape = dataclasses.replace(SHAPE, kv_heads=32, kv_dtype=dtype)
    kept, biased = Remade(4096, 64, fine=dtype != "float32"), dtype == "float16"
    making = remade.Making(kept, dtype, dtype, (biased, biased))
    latent = dataclasses.replace(SHARED["DeepSeek-V2-Lite"], kv_dtype=dtype, page_size=64)
    rebuilt, extra = remade.rebuilt_shape(latent, 16, 128, 128)
    absorbed = remade.Making(Remade(512, 0, False), dtype, dtype, (False, False), absorbed=True, extra=extra)
    masked = dataclasses.replace(shape, window=4096, softcap=30.0, slopes=True)
    kernels = [
        remade.prefill_kernel(shape, making, dtype, arch),
        remade.prefill_kernel(masked, making, dtype, arch),
        remade.decode_kernel(shape, making, dtype, arch),
    ]
    if remade.rebuilds(128, 128, dtype):
        kernels.append(remade.prefill_kernel(rebuilt, absorbed, dtype, arch))
    for kernel in kernels:
        code = compile_kernel(kernel, arch)
        assert holds(code, WGMMA if arch == 90 else MMA)
        assert holds(code, COPY)


MASKED: dict[str, Any] = {"window": 512, "softcap": 30.0, "slopes": True, "sink_scores": True}
REKEYED = {
    "Gemma-4": (AttentionShape(16, 2, 512, 512, 1.0), 64),
    "Gemma-4, masked": (AttentionShape(16, 2, 512, 512, 1.0, **MASKED), 64),
    "turned whole": (AttentionShape(32, 8, 512, 512, 1.0), 256),
    "256": (AttentionShape(8, 4, 256, 256, 0.06, **MASKED), 32),
    "128": (AttentionShape(32, 8, 128, 128, 0.09), 64),
    "64": (AttentionShape(9, 3, 64, 64, 0.125, **MASKED), 0),
}
"""Shapes, and how many pairs of a key are turned."""


@pytest.mark.parametrize(("dtype", "arch"), [("float16", 80), ("bfloat16", 90), ("float32", 80)])
@pytest.mark.parametrize(
    "name", [n if n.startswith("Gemma") else pytest.param(n, marks=pytest.mark.slow) for n in REKEYED]
)
def test_keys_made_of_values_compile_without_spills(name: str, dtype: str, arch: int) -> None:
    shape, pairs = REKEYED[name]
    shape = dataclasses.replace(shape, kv_dtype=dtype, page_size=64)
    dim, fine = shape.head_dim, dtype != "float32"
    kept = Rekeyed(shape.kv_heads, dim, dim // 2 if pairs else 0, pairs, fine, scaled=True)
    for kernel, programs in (
        rekeyed.prefill_kernel(shape, kept, dtype, arch),
        rekeyed.decode_kernel(shape, kept, dtype),
    ):
        assert programs % shape.kv_heads == 0
        code = compile_kernel(kernel, arch)
        assert holds(code, WGMMA if arch == 90 and "prefill" in kernel.name else MMA)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("columns", [512, 50257, 128256, 262144])
def test_choosing_tokens_compiles_without_spills(columns: int, arch: int) -> None:
    for kernel in (sampling.peaks_kernel(columns, columns), sampling.choose_kernel(columns, columns)):
        compile_kernel(kernel, arch)


def test_results_whose_rows_are_not_aligned_do_not_spill() -> None:
    """A result is added to and stored element by element there."""
    kernels = product_kernels(1001, 512, WeightFormat("float16"), "float16", "float16", True, 90, True)
    for _, kernel, _, _ in kernels:
        compile_kernel(kernel, 90)


def test_names_tell_variants_apart() -> None:
    one = decode_kernel(SHAPE, 8, "float16")
    others = [
        decode_kernel(dataclasses.replace(SHAPE, window=9), 8, "float16"),
        dataclasses.replace(one, warps=8),
        dataclasses.replace(one, aligned=()),
    ]
    assert re.fullmatch("kvc_attention_decode_[0-9a-f]{8}", one.name)
    assert len({k.name for k in (one, *others)}) == 4
    assert decode_kernel(SHAPE, 8, "float16").name == one.name


def test_code_that_spills_or_takes_other_parameters_is_refused() -> None:
    spilling = dataclasses.replace(prefill(SHAPE, "float16", 80), warps=1)
    with pytest.raises(PlanningError, match=rf"{spilling.name} for sm_80 spills"):
        compile_kernel(spilling, 80)
    append = append_kernel(SHAPE, "float16")
    with pytest.raises(PlanningError, match="but its function has"):
        compile_kernel(dataclasses.replace(append, types=append.types[:-1]), 80)
    with pytest.raises(PlanningError, match="another order"):
        compile_kernel(dataclasses.replace(append, types=append.types[::-1]), 80)


def test_fewer_blocks_are_under_way_where_shared_memory_is_small() -> None:
    kernel = dataclasses.replace(decode_kernel(SHAPE, 8, "float16"), stages=8)
    large, small = (compile_kernel(kernel, arch) for arch in (90, 89))
    assert large.shared > 99 * 1024 >= small.shared


def test_what_fell_back_to_the_code_of_another_kernel_has_its_own_name() -> None:
    """Triton keeps what it compiled by its source, whatever the function is called."""
    kernel = dataclasses.replace(decode_kernel(SHAPE, 8, "float16"), stages=8)
    for stages in range(1, 9):
        each = dataclasses.replace(kernel, stages=stages)
        assert f".visible .entry {each.name}(" in compile_kernel(each, 89).ptx


def test_no_triton_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(TargetError, match=r"pip install 'kvc\[cuda\]'"):
        compile_kernel(append_kernel(SHAPE, "float16"), 80)


def test_planning_does_not_import_triton() -> None:
    names = ", ".join(f"kvc.kernels.cuda.{m}" for m in ("attention", "products", "device"))
    check = f"import sys, {names}; assert 'triton' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", check], check=True, env=environment)


def test_shared_memory_of_every_architecture_is_known() -> None:
    assert {80, 86, 89, 90, 100} <= set(device._SHARED_KIB)


HEADS = [(48, 1), (64, 4), (72, 3), (80, 2), (96, 8), (128, 16), (160, 1), (192, 4), (256, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("dim", "group"), HEADS)
def test_attention_compiles_without_spills(dim: int, group: int, dtype: str, arch: int) -> None:
    every = list(FEATURES.values()) if dim in (64, 128, 256) else [{}]
    for page, features in [(16, {}), *((64, features) for features in every)]:
        shape = AttentionShape(2 * group, 2, dim, dim, dim**-0.5, kv_dtype=dtype, page_size=page, **features)
        compile_kernel(prefill(shape, dtype, arch), arch)
        compile_kernel(decode_kernel(shape, 8, dtype), arch)
    compile_kernel(merge_kernel(shape, 8, dtype), arch)
    compile_kernel(append_kernel(shape, dtype), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("format", WEIGHTS)
def test_products_compile_without_spills(format: WeightFormat, dtype: str, arch: int) -> None:
    for columns, depth in ((1024, 4096), (8192, 1001), (50257, 1000), (16384, 11008)):
        for _, kernel, _, _ in product_kernels(columns, depth, format, dtype, dtype, True, arch, True):
            compile_kernel(kernel, arch)
    compile_kernel(embedding_kernel(4096, format, dtype)[0], arch)
