"""Predicted times: what kernels do is read off the functions; attention is what is seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import kvc
from kvc.kernels.traits import CpuTraits
from kvc.planning.rates import Rates, nominal
from kvc.planning.times import Clock, Site, answer_of
from kvc.planning.work import Step, Work
from kvc_passes.plans import Workload
from kvc_passes.sites import AttentionSite, MaskFact, Rekeyed, Remade

ModelFile = Callable[..., Path]
RATES = nominal(CpuTraits(16, 32, 2))
CAUSAL = MaskFact("causal", None, "given")
SITE = AttentionSite(0, "n", 8, 2, 64, 64, 0.1, None, CAUSAL, None)
NOTHING = Work(())


def clock(site: AttentionSite, rates: Rates = RATES) -> Clock:
    return Clock(NOTHING, NOTHING, (Site(site, site),), rates)


def test_decode_reads_what_every_token_sees() -> None:
    """Alone: the pages at bandwidth or the operations at their rate, whichever takes longer."""
    slow = replace(RATES, read=1e6, call=0.0)
    work = Workload(3, 1000)
    answer = answer_of(work)
    assert answer == 250
    bytes_ = sum(SITE.token_bytes() * 3 * (750 + 125) for _ in range(answer))
    assert clock(SITE, slow).times(work, 512).decode_seconds == pytest.approx(bytes_ / 1e6)
    busy = replace(RATES, attention=(1e6, 1e6), call=0.0)
    flops = answer * 3 * (750 + 125) * 2 * 8 * 128
    assert clock(SITE, busy).times(work, 512).decode_seconds == pytest.approx(flops / 1e6)


def test_keys_that_are_made_again_take_their_products_in_every_step() -> None:
    made = replace(SITE, kept="x_gemm", remade=Remade(100, 8, fine=False))
    rates = replace(RATES, rebuild=1e6, read=1e18, attention=(1e18, 1e18), shared=(1.0, 1.0), call=0.0)
    work = Workload(3, 1000)
    each = 2 * 2 * (64 + 64) * 100  # operations of a token's keys and values, of 2 heads
    times = clock(made, rates).times(work, 1000)
    assert times.decode_seconds == pytest.approx(each * 250 * 3 * (750 + 125) / 1e6)
    assert times.prefill_seconds == pytest.approx(each * 750 * 3 / 1e6)
    halves = clock(made, rates).times(work, 375)
    assert halves.prefill_seconds == pytest.approx(each * (375 + 187.5) * 2 * 3 / 1e6)
    # A GPU's tiles make them each, whatever the chunk is.
    tiles = Clock(NOTHING, NOTHING, (Site(made, made, together=125),), rates)
    assert tiles.times(work, 1000).prefill_seconds == pytest.approx(each * (375 + 62.5) * 6 * 3 / 1e6)


def test_operations_that_are_repeated_count() -> None:
    rates = replace(RATES, read=1e18, attention=(1e6, 1e6), call=0.0)
    repeated = Clock(NOTHING, NOTHING, (Site(SITE, SITE, operations=(5, 7)),), rates)
    times = repeated.times(Workload(3, 1000), 512)
    assert times.decode_seconds == pytest.approx(7 * 250 * 3 * (750 + 125) / 1e6)
    assert times.prefill_seconds == pytest.approx(5 * 750 * 750 / 2 * 3 / 1e6)


def test_keys_that_are_made_of_values_take_as_long_as_two_queries_more() -> None:
    made = replace(SITE, kept="v_only", rekeyed=Rekeyed(2, 64, 32, 8, fine=False, scaled=True))
    busy = replace(RATES, read=1e18, attention=(1e6, 1e6), shared=(1.0, 1.0), call=0.0)
    work = Workload(3, 1000)
    times, plain = (clock(site, busy).times(work, 1000) for site in (made, SITE))
    assert times.decode_seconds == pytest.approx(plain.decode_seconds * (8 + 2 * 2) / 8)
    assert times.prefill_seconds == plain.prefill_seconds
    slow = replace(RATES, read=1e6, call=0.0)
    read = 250 * 3 * (750 + 125) * 4 * (2 * 64 + 2 * 8)
    assert clock(made, slow).times(work, 1000).decode_seconds == pytest.approx(read / 1e6)


def test_codes_are_fewer_bytes_that_are_read_more_slowly() -> None:
    codes, work = replace(SITE, stored="int8"), Workload(3, 1000)
    shares = {"int8": (0.5, 0.25)}
    slow = replace(RATES, read=1e6, call=0.0, codes=shares)
    times, plain = (clock(site, slow).times(work, 1000) for site in (codes, SITE))
    share = codes.token_bytes() / SITE.token_bytes()
    assert times.decode_seconds == pytest.approx(plain.decode_seconds * share / 0.25)
    assert times.prefill_seconds == pytest.approx(plain.prefill_seconds / 0.5)


@pytest.mark.parametrize(
    ("mask", "pairs"),
    [
        (CAUSAL, sum(range(1, 751))),
        (MaskFact("window", 100, "given"), sum(min(i, 100) for i in range(1, 751))),
        (MaskFact("chunk", None, "given", chunk=300), 2 * sum(range(1, 301)) + sum(range(1, 151))),
    ],
)
def test_prefill_computes_the_pairs_that_a_mask_shows(mask: MaskFact, pairs: int) -> None:
    """Within a half of a token a query, which the sums leave out."""
    rates = replace(RATES, attention=(1e6, 1e6), call=0.0)
    seconds = clock(replace(SITE, mask=mask), rates).times(Workload(1, 1000), 1000).prefill_seconds
    assert seconds == pytest.approx(pairs * 2 * 8 * 128 / 1e6, rel=0.01)


def test_a_common_prefix_is_computed_once() -> None:
    alone, shared = (clock(SITE).times(w, 512) for w in (Workload(8, 1000), Workload(8, 1000, prefix=700)))
    assert alone.prompt_tokens == 8 * 750
    assert shared.prompt_tokens == 700 + 8 * 50
    assert shared.prefill_seconds < alone.prefill_seconds
    assert shared.decode_seconds == alone.decode_seconds


def test_every_slice_reads_the_weights_again() -> None:
    product = Step("product", 1 << 20, 16, "n", (0, 0, 0))
    other = Step("other", 0, 0, "1", (0, 4096, 0))
    work = Work(((other, 3),), ((product, 2), (other, 1)))
    cut = 3 * other.seconds(RATES, 100, 1)
    for rows in (32, 32, 32, 4):
        cut += 2 * product.seconds(RATES, rows, 1) + other.seconds(RATES, rows, 1)
    whole = work.seconds(RATES, 100, 1)
    assert work.seconds(RATES, 100, 1, 32) == pytest.approx(cut)
    assert whole == pytest.approx(4 * other.seconds(RATES, 100, 1) + 2 * product.seconds(RATES, 100, 1))
    assert work.seconds(RATES, 100, 1, 128) == pytest.approx(whole)
    assert cut > whole


def test_kernels_on_all_threads_wait_for_them() -> None:
    """Products and attention always, generated functions in prefill: small chunks wait more often."""
    product = Step("product", 1 << 20, 16, "n", (0, 0, 0))
    other = Step("other", 0, 0, "1", (0, 4096, 0))
    steps = ((product, 5), (other, 7))
    slow = replace(RATES, launch=1e-3)
    for spread, kernels in ((False, 5), (True, 12)):
        work = Work(steps, spread=spread)
        more = work.seconds(slow, 32, 1) - work.seconds(RATES, 32, 1)
        assert more == pytest.approx(kernels * 1e-3)
    ready, waiting = (clock(SITE, r).times(Workload(1, 1000), 50) for r in (RATES, slow))
    assert waiting.prefill_seconds - ready.prefill_seconds == pytest.approx(15 * 1e-3)
    assert waiting.decode_seconds - ready.decode_seconds == pytest.approx(250 * 1e-3)


def test_the_work_of_a_model_is_its_weights(model_file: ModelFile) -> None:
    """Every weight is multiplied once; the logits for the asked rows alone."""
    model = model_file("llama")
    built = kvc.planner(model)
    variant = built.variant(built.usual()[0])
    sizes = {"prefill": 0, "decode": 0}
    for name, work in (("prefill", variant.clock.prefill), ("decode", variant.clock.decode)):
        products = [(s, count) for s, count in work.steps + work.segments if s.kind == "product"]
        sizes[name] = sum(step.weights * count for step, count in products)
        assert {step.bits for step, _ in products} == {32}
        assert {step.rows for step, _ in products} == ({"n", "r"} if name == "prefill" else {"n"})
    packed = [t for name, t in variant.lowered.tensors.items() if name.endswith("_packed")]
    held = sum(math.prod(t.shape) for t in packed)
    assert sizes["prefill"] == sizes["decode"]
    assert sizes["decode"] == pytest.approx(held, rel=0.01)
