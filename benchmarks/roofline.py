"""What the kernels of a Llama-3-8B cost at least on a GPU: bytes, FLOPs, and the time that they take.

    python -m benchmarks.roofline [--bandwidth 4.8e12] [--flops 790e12]

Prints docs/performance.md's tables. Nothing is measured here: floors are bytes over bandwidth or FLOPs over
the rate of 16-bit matrix products, whichever is more. The defaults are an H200's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

HIDDEN, FEED, LAYERS, HEADS, KV_HEADS, DIM, VOCAB = 4096, 14336, 32, 32, 8, 128, 128256
HALF: Final = 2
"""Bytes of a number."""
PRODUCTS: Final = {
    "q, k, v": (HIDDEN, (HEADS + 2 * KV_HEADS) * DIM),
    "attention output": (HEADS * DIM, HIDDEN),
    "gate, up": (HIDDEN, 2 * FEED),
    "down": (FEED, HIDDEN),
    "logits": (HIDDEN, VOCAB),
}


@dataclass(frozen=True)
class Work:
    """Bytes that pass the memory, and floating-point operations."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def times(self, count: int) -> Work:
        return Work(self.bytes * count, self.flops * count)

    def seconds(self, bandwidth: float, flops: float) -> float:
        return max(self.bytes / bandwidth, self.flops / flops)


def product(depth: int, columns: int, rows: int, bits: int = 16) -> Work:
    """y [rows, columns] = x [rows, depth] w^T; codes of 4 and 8 bits have a 16-bit scale for 32 of them."""
    weight = depth * columns * (bits / 8 + (HALF / 32 if bits < 16 else 0))
    return Work(weight + rows * (depth + columns) * HALF, 2 * rows * depth * columns)


def decode_attention(batch: int, context: int) -> Work:
    """One token a sequence: keys and values are read once."""
    return Work(
        2 * batch * context * KV_HEADS * DIM * HALF + 2 * batch * HEADS * DIM * HALF,
        4 * batch * context * HEADS * DIM,
    )


def prefill_attention(tokens: int) -> Work:
    """A prompt on its own: half of all pairs; a tile of 128 rows reads the keys and values before it."""
    tile = 128 * KV_HEADS // HEADS
    read = 2 * KV_HEADS * DIM * HALF * tokens * (tokens / tile + 1) / 2
    # Tiles of neighbours share what the second-level cache holds: only the first reads of it count.
    least = (2 * KV_HEADS + 2 * HEADS) * DIM * HALF * tokens
    return Work(min(read, least), 2 * tokens * tokens * HEADS * DIM)


def kept_attention(batch: int, keys: int, kept: int, pairs: int) -> Work:
    """One token a sequence over `kept` elements of a key, in `pairs` operations of all heads with a key."""
    return Work(batch * keys * kept * HALF, batch * keys * pairs)


def other_forms() -> Iterator[tuple[str, Work]]:
    """One layer's attention, decode, in what docs/state-forms.md lists."""
    for batch in (1, 32):
        where = f"Whisper-small, cross-attention, {batch} x 1500 rows"
        yield f"{where}, K and V", kept_attention(batch, 1500, 2 * 768, 12 * 4 * 64)
        yield f"{where}, encoder's output", kept_attention(batch, 1500, 768, 12 * 4 * 768)
    heads, angles, rest = 32, 256, 640  # of Llama-2-7B; angles in two numbers each
    for batch, context in ((1, 4096), (8, 4096)):
        where, values = f"Llama-2-7B, {batch} x {context}", heads * 128 + rest
        yield f"{where}, K and V", kept_attention(batch, context, 2 * heads * 128, heads * 4 * 128)
        pairs = heads * 2 * (128 + values)
        yield f"{where}, keys and {rest}", kept_attention(batch, context, values + angles, pairs)
        making = Work(2 * HIDDEN * HIDDEN * HALF, 2 * batch * context * 2 * HIDDEN * HIDDEN)  # W_K, W_V
        made = kept_attention(batch, context, HIDDEN + angles, heads * 4 * 128)
        yield f"{where}, K and V made again", made + making


def decode_step(batch: int, context: int, bits: int = 16) -> Work:
    """All layers and the logits; the norms' and activations' bytes are left out."""
    layer = decode_attention(batch, context)
    for name, (depth, columns) in PRODUCTS.items():
        if name != "logits":
            layer = layer + product(depth, columns, batch, bits)
    return layer.times(LAYERS) + product(*PRODUCTS["logits"], batch, bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second (%(default)g)")
    parser.add_argument("--flops", type=float, default=790e12, help="operations a second (%(default)g)")
    options = parser.parse_args()

    def line(name: str, work: Work) -> None:
        floor = work.seconds(options.bandwidth, options.flops) * 1e6
        bound = "memory" if work.bytes / options.bandwidth > work.flops / options.flops else "arithmetic"
        print(f"| {name} | {work.bytes / 1e6:,.1f} | {work.flops / 1e9:,.1f} | {floor:,.1f} | {bound} |")

    print("| kernel | MB | GFLOP | floor, µs | bound by |\n|---|---:|---:|---:|---|")
    for batch, context in ((1, 2048), (1, 16384), (1, 131072), (8, 16384), (32, 2048), (64, 4096)):
        line(f"decode attention, {batch} x {context}", decode_attention(batch, context))
    for tokens in (1024, 4096, 16384):
        line(f"prefill attention, {tokens} tokens", prefill_attention(tokens))
    for name, (depth, columns) in PRODUCTS.items():
        for rows in (1, 64, 4096):
            line(f"{name} ({columns} x {depth}), {rows} rows", product(depth, columns, rows))
    line("gate, up in 4 bits, 1 row", product(*PRODUCTS["gate, up"], 1, 4))
    print("\n| decode attention of a layer | MB | GFLOP | floor, µs | bound by |\n|---|---:|---:|---:|---|")
    for name, work in other_forms():
        line(name, work)
    print("\n| decode step | MB | GFLOP | floor, µs | bound by |\n|---|---:|---:|---:|---|")
    for batch, context in ((1, 2048), (1, 16384), (1, 131072), (8, 16384), (32, 2048)):
        line(f"{batch} x {context}", decode_step(batch, context))
    line("1 x 2048, weights in 4 bits", decode_step(1, 2048, 4))


if __name__ == "__main__":
    main()
