"""Predicted seconds of a workload: attention by what layers keep, everything else by the kernels' work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from kvc_passes.plans import Times, Workload
from kvc_passes.sites import AttentionSite, Reach

from ..kernels.knobs import AttentionTimes
from .rates import Rates
from .work import Work

_ANSWER: Final = 256
"""A quarter of a request's tokens are its answer, this many at most: what a chat does."""
_REKEYED: Final = 2
"""To make a key of a value takes about as long as this many queries take with both: it is read as one vector
after the other, multiplied, turned and written. In prefill many queries share that."""


@dataclass(frozen=True)
class Site:
    """An attention with what it keeps, and as it stands in the graph."""

    kept: AttentionSite
    plain: AttentionSite
    factors: tuple[float, float] = (1.0, 1.0)
    """What its kernels take, in prefill and in decode, over what rates say: 1 where nothing was measured."""
    operations: tuple[int, int] | None = None
    """Of a query token and a key, in prefill and in decode; None if none is repeated."""
    rebuilds: bool = True
    """Whether prefill makes keys and values of what both are projections of."""
    together: int | None = None
    """Query tokens of prefill that share keys and values which are made again; None for all of a call."""

    def _pair(self, phase: int) -> int:
        """Operations of a query token and a key that it sees."""
        if self.operations is not None:
            return self.operations[phase]
        return 2 * self.kept.heads * (self.kept.query_dim + self.kept.value_dim)

    def as_measured(self, rates: Rates, times: AttentionTimes) -> Site:
        """The site with its factors, the mean of what was measured."""
        reach = self.kept.mask.reach
        prefill = [s / self.prefill(rates, _last_pairs(reach, n, keys), 0.0) for n, keys, s in times[0]]
        decode = [s / self.decode(rates, n, _seen(reach, keys)) for n, keys, s in times[1]]
        return replace(self, factors=(_mean(prefill), _mean(decode)))

    def decode(self, rates: Rates, batch: int, keys: float) -> float:
        """Seconds of one step of `batch` sequences that each see so many keys."""
        kept = replace(self.kept, owner=None)
        more = _REKEYED * kept.kv_heads if kept.rekeyed is not None else 0
        flops = (self._pair(1) + 2 * more * (kept.query_dim + kept.value_dim)) * keys * batch
        rate = (rates.shared if kept.shared and kept.row is None else rates.attention)[1]
        made = _products(kept, kept.remade.depth) * keys * batch if kept.remade is not None else 0.0
        share = rates.codes[kept.stored][1] if kept.stored else 1.0
        read = kept.token_bytes() * keys * batch / (rates.read * share)
        return (rates.kernel + made / rates.rebuild + max(read, flops / rate)) * self.factors[1]

    def prefill(self, rates: Rates, pairs: float, rebuilt: float) -> float:
        """Seconds for so many pairs of a query and a key that it sees; `rebuilt`: keys made again."""
        site = self.kept
        if site.kept in ("x_absorbed", "mla_latent", "encoder_output", "x_gemm") and rebuilt:
            plain = self.plain
            depth = site.value_dim if site.remade is None else site.remade.depth
            products = _products(plain, depth) * rebuilt
            pair = 2 * plain.heads * (plain.head_dim + plain.value_dim)
            return rates.kernel + products / rates.rebuild + pair * pairs / rates.attention[0]
        rate = (rates.shared if site.shared and site.row is None else rates.attention)[0]
        rate *= rates.codes[site.stored][0] if site.stored else 1.0
        seconds = rates.kernel + self._pair(0) * pairs / rate
        return seconds * self.factors[0]


@dataclass(frozen=True)
class Clock:
    """Times of one model in one form on one target.

    Attributes:
        prefill, decode: what their kernels do beside attention.
        sites: the attentions.
    """

    prefill: Work
    decode: Work
    sites: tuple[Site, ...]
    rates: Rates

    def times(self, workload: Workload, chunk: int, ffn: int = 0) -> Times:
        """What the workload takes, served as one batch; `ffn`: tokens of a slice of feed-forward parts."""
        rest = self.rest(workload, chunk, ffn)
        found = [self.attention(site, workload, chunk) for site in self.sites]
        prefill = rest[0] + sum(pair[0] for pair in found)
        decode = rest[1] + sum(pair[1] for pair in found)
        answer = answer_of(workload)
        prompts = _computed(workload)
        return Times(prefill, decode, prompts, workload.batch * answer)

    def rest(self, workload: Workload, chunk: int, ffn: int = 0) -> tuple[float, float]:
        """Seconds of everything but attention, in prefill and in decode."""
        computed, answer = _computed(workload), answer_of(workload)
        whole, part = divmod(computed, chunk)
        asked = max(1, min(workload.batch, round(workload.batch * chunk / computed)))
        prefill = whole * self.prefill.seconds(self.rates, chunk, asked, ffn)
        prefill += self.prefill.seconds(self.rates, part, asked, ffn) if part else 0.0
        return prefill, answer * self.decode.seconds(self.rates, workload.batch, workload.batch)

    def attention(self, site: Site, workload: Workload, chunk: int) -> tuple[float, float]:
        """Seconds of one layer's attention, in prefill and in decode."""
        prompt, answer = workload.context - answer_of(workload), answer_of(workload)
        reach = site.kept.mask.reach
        keys = workload.memory if reach.memory else _seen(reach, prompt + answer / 2)
        decode = answer * site.decode(self.rates, workload.batch, keys)
        begin = workload.prefix
        pairs = _pairs(reach, prompt, workload.memory) * workload.batch
        if begin:
            pairs -= (workload.batch - 1) * _pairs(reach, begin, workload.memory)
        calls = max(1.0, _computed(workload) / chunk)
        # A call, or a tile, makes the keys that its tokens see again: on average half of what is there.
        share = min(chunk, site.together or chunk)
        per_request = max(1.0, prompt / share)
        behind = workload.memory if reach.memory else min(_seen(reach, prompt / 2 + share / 2), prompt)
        makes = site.kept.remade is not None or (site.rebuilds and not reach.memory)
        rebuilt = behind * per_request * workload.batch if makes else 0.0
        prefill = site.prefill(self.rates, pairs, rebuilt) + (calls - 1) * self.rates.kernel
        return prefill, decode


def _products(plain: AttentionSite, depth: int) -> int:
    """Operations that make the keys and values of one token from `depth` elements."""
    return 2 * plain.kv_heads * (plain.head_dim + plain.value_dim) * depth


def answer_of(workload: Workload) -> int:
    """Tokens of a request that are taken for its answer."""
    return min(_ANSWER, max(1, workload.context // 4)) if workload.context > 1 else 0


def _computed(workload: Workload) -> int:
    """Prompt tokens that are computed."""
    prompt = workload.context - answer_of(workload)
    shared = min(workload.prefix, prompt)
    return workload.batch * prompt - (workload.batch - 1) * shared


def _seen(reach: Reach, position: float) -> float:
    """Keys that a query at a position sees, on average about it."""
    if reach.window is not None:
        return min(position, reach.window + reach.sinks)
    return min(position, reach.chunk / 2) if reach.chunk is not None else position


def _mean(factors: Sequence[float]) -> float:
    return sum(factors) / len(factors) if factors else 1.0


def _last_pairs(reach: Reach, tokens: int, keys: int) -> float:
    """Pairs of the last `tokens` queries of sequences of `keys` tokens."""
    sequences = max(1, -(-tokens // keys))
    own = tokens / sequences
    return tokens * _seen(reach, keys - own / 2)


def _pairs(reach: Reach, tokens: int, memory: int) -> float:
    """Pairs of a query among the first `tokens` and a key that it sees."""
    if reach.memory:
        return float(tokens) * memory
    if reach.chunk is not None:
        whole, part = divmod(tokens, reach.chunk)
        return (whole * reach.chunk**2 + part**2) / 2
    width = tokens if reach.window is None else min(tokens, reach.window + reach.sinks)
    return width * width / 2 + (tokens - width) * float(width)
