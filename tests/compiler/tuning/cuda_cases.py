"""Kernels of a GPU to be tuned, and records about them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvc.kernels.attention import AttentionShape
from kvc.tuning.cuda import CudaTarget
from kvc.tuning.database import Record
from kvc.tuning.tasks import Bucket, Task, product_parameters, shape_parameters
from kvc_passes.weight_format import WeightFormat

from .tuning_cases import record

TARGET = CudaTarget("sm_90")
HALF = WeightFormat("float16")
CODES = WeightFormat("uint4", 32, "float16")
SHAPE = AttentionShape(32, 8, 128, 128, 0.0884, kv_dtype="float16", page_size=64)
MORE = {"bias": False, "residual": False, "flat": False, "dtype": "float16", "most": 16}


def product(
    columns: int = 4096, depth: int = 4096, format: WeightFormat = HALF, rows: int = 4, **more: Any
) -> Task:
    return Task(
        "gpu_product", product_parameters(columns, depth, format, **{**MORE, **more}), (Bucket(rows, 0, 9.0),)
    )


def prefill(shape: AttentionShape = SHAPE, tile: int = 32) -> Task:
    return Task("gpu_prefill", shape_parameters(shape, tile=tile), (Bucket(100, 70, 3.0),))


def decode(shape: AttentionShape = SHAPE, splits: int = 33) -> Task:
    return Task("gpu_decode", shape_parameters(shape, splits=splits), (Bucket(3, 100, 8.0),))


TASKS = {
    "few": product(),
    "some": product(most=64, residual=True, rows=40),
    "many": product(most=0, bias=True, rows=300),
    "codes": product(format=CODES),
    "logits": product(flat=True),
    "float32": product(format=WeightFormat(), dtype="float32", most=0),
    "prefill": prefill(),
    "prefill of wide heads": prefill(replace(SHAPE, head_dim=256, value_dim=256), 16),
    "decode": decode(),
    "codes as keys": decode(replace(SHAPE, stored="int8")),
    "bfloat16": decode(replace(SHAPE, kv_dtype="bfloat16")),
}


def measured(task: Task, target: str = "sm_90", **changes: Any) -> Record:
    fields: dict[str, Any] = {"target": target, "version": TARGET.version, "knobs": {"stages": 2}}
    return record(task, **{**fields, **changes})
