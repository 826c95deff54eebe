"""Three Triton kernels, compiled to cubins and called by a Relax module, as kvc attaches its own."""

import json
from typing import Any

import triton
import triton.language as tl

TILE, DEPTH = 32, 64

ADD = [("a", "*fp16"), ("b", "*bf16"), ("out", "*fp32"), ("n", "i32"), ("scale", "fp32")]
ADD_CONSTANTS = {"BLOCK": 128}
DOT = [("a", "*fp16"), ("b", "*fp16"), ("out", "*fp16"), ("rows", "i32")]
DOT_CONSTANTS = {"TILE": TILE, "DEPTH": DEPTH}
MOVE = [("a", f"tensordesc<fp16[{TILE}, {DEPTH}]>"), ("out", f"tensordesc<fp16[{TILE}, {DEPTH}]>")]
MOVE_CONSTANTS = {"TILE": TILE}


@triton.jit
def add(a, b, out, n, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = tl.load(a + at, inside).to(tl.float32) + tl.load(b + at, inside).to(tl.float32)
    tl.store(out + at, total * scale, inside)


@triton.jit
def dot(a, b, out, rows, TILE: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column, deep = tl.arange(0, TILE), tl.arange(0, DEPTH)
    inside = row[:, None] < rows
    left = tl.load(a + row[:, None] * DEPTH + deep[None, :], inside, 0.0)
    right = tl.load(b + deep[:, None] * TILE + column[None, :])
    tl.store(out + row[:, None] * TILE + column[None, :], tl.dot(left, right).to(tl.float16), inside)


@triton.jit
def move(a, out, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE
    out.store([row, 0], a.load([row, 0]) * 2)


def compiled(function: Any, types: list[tuple[str, str]], constants: dict[str, Any]) -> Any:
    """The kernel's machine code for sm_90a."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict(types) | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, (_, kind) in enumerate(types) if kind[0] == "*"}
    return triton.compile(
        ASTSource(function, signature, constants, aligned), target=GPUTarget("cuda", 90, 32)
    )


def cuda_module(kernel: Any, types: list[str]) -> Any:
    """A module of TVM around a cubin. The types are TVM's, "tensormap" for a descriptor's first parameter."""
    import tvm
    import tvm_ffi

    name = kernel.metadata.name
    types = [*types, "handle", "handle"]  # the hidden pointers to scratch memory
    tags = ["threadIdx.x", "blockIdx.x", "tirx.use_dyn_shared_memory"]
    info = {
        "name": name,
        "arg_types": ["handle" if kind == "tensormap" else kind for kind in types],
        "launch_param_tags": tags,
        "arg_extra_tags": [int(kind == "tensormap") for kind in types],
    }
    text = json.dumps({"tvm_version": tvm.__version__, "func_info": {name: info}})
    functions = tvm_ffi.get_global_func("runtime.LoadMetaDataFromJSON")(text)
    create = tvm_ffi.get_global_func("ffi.Module.create.cuda")
    return create(bytes(kernel.asm["cubin"]), "cubin", functions, {})


def module() -> Any:
    """Functions `sum`, `product` and `twice` over the kernels."""
    from tvm import relax
    from tvm.script import ir as I
    from tvm.script import relax as R
    from tvm.script import tirx as T

    adding, dotting = compiled(add, ADD, ADD_CONSTANTS), compiled(dot, DOT, DOT_CONSTANTS)
    moving = compiled(move, MOVE, MOVE_CONSTANTS)
    block = ADD_CONSTANTS["BLOCK"]
    threads = [kernel.metadata.num_warps * 32 for kernel in (adding, dotting, moving)]
    shared = [kernel.metadata.shared for kernel in (adding, dotting, moving)]
    swizzles = [each["swizzle"] for each in moving.metadata.tensordesc_meta]

    @I.ir_module(s_tir=True)
    class Module:
        @T.prim_func(s_tir=True)
        def call_add(a: T.handle, b: T.handle, o: T.handle):
            T.func_attr({"tirx.is_scheduled": True})  # runs on the host: not for dlight
            n = T.int64()
            A = T.match_buffer(a, (n,), "float16")
            B = T.match_buffer(b, (n,), "bfloat16")
            C = T.match_buffer(o, (n,), "float32")
            with T.sblock("root"):
                T.reads(A[0:n], B[0:n])
                T.writes(C[0:n])
                T.call_packed(
                    "add", A.data, B.data, C.data, T.Cast("int32", n), T.float32(0.5),
                    T.reinterpret("handle", T.uint64(0)), T.reinterpret("handle", T.uint64(0)),
                    threads[0], T.ceildiv(n, block), shared[0],
                )  # fmt: skip

        @T.prim_func(s_tir=True)
        def call_dot(a: T.handle, b: T.handle, o: T.handle):
            T.func_attr({"tirx.is_scheduled": True})  # runs on the host: not for dlight
            n = T.int64()
            A = T.match_buffer(a, (n, DEPTH), "float16")
            B = T.match_buffer(b, (DEPTH, TILE), "float16")
            C = T.match_buffer(o, (n, TILE), "float16")
            with T.sblock("root"):
                T.reads(A[0:n, 0:DEPTH], B[0:DEPTH, 0:TILE])
                T.writes(C[0:n, 0:TILE])
                T.call_packed(
                    "dot", A.data, B.data, C.data, T.Cast("int32", n),
                    T.reinterpret("handle", T.uint64(0)), T.reinterpret("handle", T.uint64(0)),
                    threads[1], T.ceildiv(n, TILE), shared[1],
                )  # fmt: skip

        @T.prim_func(s_tir=True)
        def call_move(a: T.handle, o: T.handle):
            T.func_attr({"tirx.is_scheduled": True})  # runs on the host: not for dlight
            n = T.int64()
            A = T.match_buffer(a, (n, DEPTH), "float16")
            C = T.match_buffer(o, (n, DEPTH), "float16")
            with T.sblock("root"):
                T.reads(A[0:n, 0:DEPTH])
                T.writes(C[0:n, 0:DEPTH])
                am: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
                om: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
                # sizes fastest first, strides in bytes, box, steps, interleave, swizzle, promotion, fill
                T.call_packed(
                    "runtime.cuTensorMapEncodeTiled", am, "float16", 2, A.data, DEPTH, n, DEPTH * 2,
                    DEPTH, TILE, 1, 1, 0, swizzles[0], 2, 0,
                )  # fmt: skip
                T.call_packed(
                    "runtime.cuTensorMapEncodeTiled", om, "float16", 2, C.data, DEPTH, n, DEPTH * 2,
                    DEPTH, TILE, 1, 1, 0, swizzles[1], 2, 0,
                )  # fmt: skip
                T.call_packed(
                    "move", am, T.Cast("int32", n), DEPTH, T.int64(DEPTH), T.int64(1),
                    om, T.Cast("int32", n), DEPTH, T.int64(DEPTH), T.int64(1),
                    T.reinterpret("handle", T.uint64(0)), T.reinterpret("handle", T.uint64(0)),
                    threads[2], T.ceildiv(n, TILE), shared[2],
                )  # fmt: skip

        @R.function
        def sum(a: R.Tensor(("n",), "float16"), b: R.Tensor(("n",), "bfloat16")):
            n = T.int64()
            with R.dataflow():
                out = R.call_tir(Module.call_add, [a, b], relax.TensorType((n,), "float32"))
                R.output(out)
            return out

        @R.function
        def product(a: R.Tensor(("n", DEPTH), "float16"), b: R.Tensor((DEPTH, TILE), "float16")):
            n = T.int64()
            with R.dataflow():
                out = R.call_tir(Module.call_dot, [a, b], relax.TensorType((n, TILE), "float16"))
                R.output(out)
            return out

        @R.function
        def twice(a: R.Tensor(("n", DEPTH), "float16")):
            n = T.int64()
            with R.dataflow():
                out = R.call_tir(Module.call_move, [a], relax.TensorType((n, DEPTH), "float16"))
                R.output(out)
            return out

    descriptor = ["tensormap", "int32", "int32", "int64", "int64"]
    modules = [
        cuda_module(adding, ["handle"] * 3 + ["int32", "float32"]),
        cuda_module(dotting, ["handle"] * 3 + ["int32"]),
        cuda_module(moving, descriptor * 2),
    ]
    return Module.with_attr("external_mods", modules)
