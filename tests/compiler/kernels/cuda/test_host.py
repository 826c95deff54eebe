"""Functions of the host: what they launch, and that every architecture gets kernels of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tvm import IRModule, tirx
from tvm.ir import Call
from tvm_ffi import structural_walk

from kvc.kernels.cuda.host_attention import CudaAttention
from kvc.kernels.cuda.host_pages import most_parts, shares_of
from kvc.kernels.cuda.host_products import CudaProducts
from kvc.kernels.cuda.knobs import BY_ENGINE, Defaults, Product, ProductKnobs
from kvc.kernels.cuda.launches import SHARED, VARIANT, Variants
from kvc.kernels.emit import size_var
from kvc_passes.loop_nests import overwritten
from kvc_passes.place_arena import evaluate
from kvc_passes.sites import Remade, Sliced
from kvc_passes.weight_format import WeightFormat
from support import site

WIDE = site(heads=32, kv_heads=8, head_dim=128, value_dim=128, kv_dtype="float16")
CONTEXT = 1 << 15


def launches(function: tirx.PrimFunc) -> list[Any]:
    """The calls of packed functions, in order."""
    found: list[Any] = []

    def visit(call: Any) -> None:
        if getattr(call.op, "name", "") == "tirx.tvm_call_packed":
            found.append(call)

    structural_walk(function.body, [(Call, visit)])
    return found


def names(function: tirx.PrimFunc) -> list[str]:
    return [str(call.args[0].value) for call in launches(function)]


def test_a_launch_has_the_kernels_parameters_and_no_shared_memory_yet() -> None:
    variants = Variants(80)
    kernels = CudaAttention.for_sites((WIDE,), CONTEXT, variants)
    (call,) = launches(kernels.prefill(WIDE, "float16"))
    kernel = variants.kernels[str(call.args[0].value)]
    # The name, the parameters, two null pointers, threads, a grid of three, shared memory.
    assert len(call.args) == 1 + len(kernel.types) + 2 + 5
    assert int(call.args[-5].value) == 32 * kernel.warps
    assert int(call.args[-1].value) == SHARED


def test_a_function_is_made_again_with_its_own_tile() -> None:
    """Of several lowerings of a model, whose tiles differ, each has the function that it asked for."""
    variants = Variants(80)
    tall, short = (CudaAttention(variants, tile, CONTEXT, usual_tile=32) for tile in (64, 32))
    module = IRModule({"tall": tall.prefill(WIDE, "float16").with_attr("global_symbol", "tall")})
    short.prefill(WIDE, "float16")
    (name,) = names(variants.remade(module, 90)["tall"])
    assert dict(variants.kernels[name].constants)["TILE"] == 64


def test_a_sum_over_its_residual_stays_one_when_it_is_made_again() -> None:
    variants = Variants(80)
    sizes = (64, 64, WeightFormat("float16"))
    product = CudaProducts(variants).matmul(*sizes, bias=False, flat=False, dtype="float16", residual=True)
    over = overwritten(product, 2).with_attr("global_symbol", "main")
    made = variants.remade(IRModule({"main": over}), 90)["main"]
    assert [p.name for p in made.params] == ["x", "w", "y"]
    for call in launches(made):
        _, _, _, residual, y, *_ = call.args  # behind the name, x and the weight
        assert str(residual) == str(y) == "y.data"


def test_a_layer_reads_what_another_one_keeps() -> None:
    whole = site(
        heads=4, kv_heads=1, head_dim=64, value_dim=64, kv_dtype="float16", kept="encoder_output", sliced=None
    )
    kernels = CudaAttention.for_sites((whole,), CONTEXT, Variants(80))
    sites = (whole, replace(whole, owner=0))
    shapes = [[p.shape for p in kernels.decode(each, "float16").params] for each in sites]
    assert len(shapes[0]) == len(shapes[1])
    assert list(shapes[0][1])[1:] == list(shapes[1][1])[1:]


def test_decode_splits_what_is_worth_it() -> None:
    kernels = CudaAttention.for_sites((WIDE,), CONTEXT, Variants(80))
    # Shares, then their merge: of few, or of more.
    assert [name.rsplit("_", 1)[0] for name in names(kernels.decode(WIDE, "float16"))] == [
        "kvc_attention_decode",
        "kvc_attention_merge",
        "kvc_attention_merge",
    ]
    assert kernels.splits(WIDE) == 33
    assert CudaAttention.for_sites((WIDE,), 300, Variants(80)).splits(WIDE) == 2
    assert CudaAttention.for_sites((WIDE,), 64, Variants(80)).splits(WIDE) == 1


def test_shares_fit_the_number_of_sequences() -> None:
    b = size_var("b")
    shares = [evaluate(shares_of(33, b), {"b": count}) for count in (1, 2, 3, 8, 32, 65, 66, 256)]
    assert shares == [33, 33, 22, 9, 3, 2, 1, 1]
    for splits in (1, 2, 33, 64):
        places = [evaluate(most_parts(splits, b), {"b": count}) for count in range(1, 300)]
        needed = [count * evaluate(shares_of(splits, b), {"b": count}) for count in range(1, 300)]
        # Workspace that is planned for the largest batch holds what a smaller one takes.
        assert all(here >= most for here, most in zip(places, np.maximum.accumulate(needed)))
        assert places == sorted(places)


def test_a_decodes_workspace_is_as_large_as_its_caller_makes_it() -> None:
    kernels = CudaAttention.for_sites((WIDE,), CONTEXT, Variants(80))
    *_, part, out = kernels.decode(WIDE, "float16").params
    (places,) = kernels.workspace(WIDE, size_var("b"))
    assert evaluate(part.shape[0], {"b": 7}) == evaluate(places, {"b": 7}) == 7 + 65
    assert list(part.shape)[1:] == [32, 130]
    assert list(out.shape)[2:] == [32, 128]


def test_operations_are_counted_with_those_that_programs_repeat() -> None:
    kernels = CudaAttention.for_sites((WIDE,), CONTEXT, Variants(90))
    assert kernels.operations(WIDE, decodes=True) == 2 * 32 * 256
    shared = site(heads=12, kv_heads=1, head_dim=768, value_dim=768, kept="x_absorbed", kv_dtype="float16")
    assert kernels.operations(shared, decodes=False) == 2 * 12 * (3 * 768 + 768)  # values in blocks of 256
    assert kernels.operations(shared, decodes=True) == 2 * 12 * (2 * 768 + 768)
    kept = Sliced(32, 128, 640, 64, fine=True)
    keys = replace(shared, heads=32, head_dim=kept.width, value_dim=kept.value_dim, kept="k_plus_r")
    keys = replace(keys, sliced=kept)
    assert kernels.operations(keys, decodes=False) == 2 * 32 * (19 * 128 + 4736)
    # A program of decode has all heads, and multiplies each query with every key.
    assert kernels.operations(keys, decodes=True) == 2 * 32 * (10 * 32 * 128 + 4736)


def test_a_tile_fills_a_program() -> None:
    kept = Sliced(8, 128, 640, 64, fine=True)
    keys = site(heads=16, kv_heads=1, head_dim=kept.width, value_dim=kept.value_dim, kept="k_plus_r")
    keys = replace(keys, sliced=kept, kv_dtype="float16")
    assert CudaAttention.for_sites((keys,), CONTEXT, Variants(80)).tile == 32  # of 2 heads
    absorbed = site(heads=12, kv_heads=1, head_dim=768, value_dim=768, kept="x_absorbed", kv_dtype="float16")
    assert CudaAttention.for_sites((absorbed,), CONTEXT, Variants(80)).tile == 128


def test_rows_of_a_tile_share_what_is_made_again() -> None:
    made = site(heads=32, kv_heads=32, head_dim=128, value_dim=128, kept="x_gemm", kv_dtype="float16")
    made = replace(made, remade=Remade(4096, 64, fine=True))
    for arch, tokens in ((80, 64), (90, 128)):
        kernels = CudaAttention.for_sites((made,), CONTEXT, Variants(arch))
        assert kernels.together(made, made) == tokens
        assert kernels.operations(made, decodes=True) == 2 * 32 * 256


def test_few_rows_take_other_kernels_than_many() -> None:
    variants = Variants(80)
    options: dict[str, Any] = {"bias": False, "flat": False, "dtype": "float16"}
    function = CudaProducts(variants).matmul(4096, 4096, WeightFormat("float16"), **options)
    assert len(set(names(function))) == len(names(function)) > 2


class Engine(Defaults):
    def product(self, arch: int, product: Product) -> ProductKnobs:
        return ProductKnobs(copy=BY_ENGINE)


def test_boxes_are_encoded_before_their_launch() -> None:
    variants = Variants(90, Engine())
    options: dict[str, Any] = {"bias": False, "flat": False, "dtype": "bfloat16"}
    function = CudaProducts(variants).matmul(512, 1024, WeightFormat("bfloat16"), **options)
    *_, first, second, launch = launches(function)
    for call, rows in ((first, 128), (second, 128)):
        name, _, dtype, rank, _, width, _, pitch, *box = call.args
        assert (name.value, dtype.value, int(rank)) == ("runtime.cuTensorMapEncodeTiled", "bfloat16", 2)
        assert (int(width), int(pitch)) == (1024, 2048)
        assert [int(n) for n in box] == [64, rows, 1, 1, 0, 3, 2, 0]  # swizzled, reads of 128 bytes, zeros
    assert launch.args[1].same_as(first.args[1])
    assert launch.args[6].same_as(second.args[1])
    rows, *others = launch.args[7:11]
    assert [int(n) for n in (rows.value, *others)] == [512, 1024, 1024, 1]
    # Two matrices of five parameters, y, three sizes; null pointers, threads, a grid of three, shared memory.
    assert len(launch.args) == 1 + 2 * 5 + 4 + 2 + 5
    made = variants.remade(IRModule({"f": function.with_attr("global_symbol", "f")}), 80)["f"]
    assert "runtime.cuTensorMapEncodeTiled" not in names(made)


@pytest.mark.parametrize("arch", [80, 90])
def test_functions_are_remade_for_an_architecture(arch: int) -> None:
    first, own = Variants(80), Variants(arch)
    made = CudaAttention.for_sites((WIDE,), CONTEXT, first).prefill(WIDE, "float16")
    expected = CudaAttention.for_sites((WIDE,), CONTEXT, own).prefill(WIDE, "float16")
    other = tirx.PrimFunc([], tirx.Evaluate(tirx.const(0, "int32"))).with_attr("global_symbol", "other")
    module = IRModule({"prefill": made.with_attr("global_symbol", "prefill"), "other": other})
    remade = first.remade(module, arch)
    assert names(remade["prefill"]) == names(expected)
    assert (names(remade["prefill"]) == names(made)) is (arch == 80)  # blocks differ
    assert remade["prefill"].attrs["global_symbol"] == "prefill"
    assert remade["prefill"].attrs[VARIANT] == made.attrs[VARIANT]
    assert set(names(remade["prefill"])) <= set(first.kernels)
    assert "other" in {v.name_hint for v in remade.get_global_vars()}


def test_equal_functions_are_named_alike() -> None:
    variants = Variants(80)
    kernels = CudaAttention.for_sites((WIDE,), CONTEXT, variants)
    again = site(index=3, heads=32, kv_heads=8, head_dim=128, value_dim=128, kv_dtype="float16")
    one, two = (kernels.prefill(s, "float16").attrs[VARIANT] for s in (WIDE, again))
    assert one == two
    assert kernels.prefill(WIDE, "float32").attrs[VARIANT] != one
