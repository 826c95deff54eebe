"""The whole pipeline: tiny models compiled and run call by call, logits against ONNX Runtime.

Tolerance: float32 sums of at most 256 products in another order, through two layers, on logits of up to 6:
about 3e-6 are seen.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tvm import IRModule, relax

import kvc
from kvc.pipeline import Runner
from kvc.runtime.executor import Executor
from kvc.runtime.overhead import measure
from kvc.runtime.sequences import Sequences
from kvc_passes.base import Result
from kvc_passes.errors import PlanningError
from kvc_passes.sites import AttentionSite
from support import OnnxRuntime, module_of, param, symbol

ATOL = 2e-5
WINDOW = 8  # of the tiny mistral
FAMILIES = ("llama", "gpt2", "qwen2", "mistral")
MODELS = [*itertools.product(FAMILIES, (False, True)), ("gemma2", False)]
"""gemma2: bounded scores and logits, windows in every other layer."""


@dataclass(frozen=True)
class Case:
    """A compiled model and its ONNX file in ONNX Runtime."""

    executor: Executor
    reference: OnnxRuntime
    sites: tuple[AttentionSite, ...]

    @property
    def sequences(self) -> Sequences:
        """Nothing is kept yet; a sequence's pages stand anywhere."""
        return Sequences(self.executor, share=False, shuffle=np.random.default_rng(1))

    def tokens(self, length: int, seed: int = 0) -> list[int]:
        vocab = self.executor.facts.vocab
        return list(np.random.default_rng(seed).integers(0, vocab, length))


@pytest.fixture(scope="session")
def compiled(
    model_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, bool], Case]:
    """`compiled(family, with_past)`: every model is compiled once."""
    overhead = functools.cache(lambda: measure(None))

    @functools.cache
    def make(family: str, with_past: bool) -> Case:
        path = model_file(family, with_past)
        output = tmp_path_factory.mktemp("compiled") / f"{path.stem}.kvc"
        with pytest.MonkeyPatch.context() as patch:  # it takes 2 s, and is the same for all models
            patch.setattr("kvc.machine.measure", lambda *args, **options: overhead())
            artifact = kvc.compile(path, budget="400MB", workload="4x64", output=output)
        return Case(Executor(artifact), OnnxRuntime(path), artifact.facts.sites)

    return make


@pytest.fixture(params=MODELS, ids=[f"{f}{'-past' if p else ''}" for f, p in MODELS])
def case(request: pytest.FixtureRequest, compiled: Callable[[str, bool], Case]) -> Case:
    return compiled(*request.param)


def close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=ATOL)


def test_a_whole_prompt(case: Case) -> None:
    tokens, sequences = case.tokens(61), case.sequences
    got = sequences.prefill([(sequences.open(tokens), 61)])
    close(got[0], case.reference.logits(tokens)[-1])


def test_chunks_of_odd_lengths_then_single_tokens(case: Case) -> None:
    tokens, sequences = case.tokens(60, seed=1), case.sequences
    expected, kept = case.reference.logits(tokens), sequences.open(tokens)
    for count in (1, 7, 13, 3, 17, 5):
        got = sequences.prefill([(kept, count)])
        close(got[0], expected[kept.length - 1])
    while kept.length < len(tokens):
        got = sequences.decode([kept])
        close(got[0], expected[kept.length - 1])


def test_sequences_side_by_side(case: Case) -> None:
    """Prompts, later pieces and single tokens in one call, then decoding together, in shuffled pages."""
    lengths, first, served = (45, 3, 16, 33), (20, 2, 16, 32), case.sequences
    texts = [case.tokens(n + 6, seed=n) for n in lengths]
    expected = [case.reference.logits(tokens) for tokens in texts]
    kept = [served.open(tokens) for tokens in texts]
    served.prefill(list(zip(kept, first)))
    pieces = [(k, m - n) for k, n, m in zip(kept, first, lengths) if n < m]
    for row, (each, _) in zip(served.prefill(pieces), pieces, strict=True):
        which = kept.index(each)
        close(row, expected[which][lengths[which] - 1])
    for step in range(6):
        for row, logits, n in zip(served.decode(kept), expected, lengths, strict=True):
            close(row, logits[n + step])


def test_pages_are_reused_without_a_trace(case: Case) -> None:
    sequences = case.sequences
    before = sequences.open(case.tokens(64, seed=5))
    sequences.prefill([(before, 64)])
    sequences.close(before)
    tokens = case.tokens(19, seed=6)
    got = sequences.prefill([(sequences.open(tokens), 19)])
    close(got[0], case.reference.logits(tokens)[-1])


def test_with_and_without_past_the_same_is_proved(compiled: Callable[[str, bool], Case]) -> None:
    for family in FAMILIES:
        (plain, past) = (compiled(family, p).sites for p in (False, True))
        for a, b in zip(plain, past, strict=True):
            assert (a.heads, a.kv_heads, a.head_dim, a.value_dim) == (
                b.heads,
                b.kv_heads,
                b.head_dim,
                b.value_dim,
            )
            assert a.scale == pytest.approx(b.scale)
            assert (a.mask.kind, a.mask.window) == (b.mask.kind, b.mask.window)
            assert a.mask.window == (WINDOW if family == "mistral" else None)
            assert a.rope == b.rope == (None if family == "gpt2" else "rotate_half")


@pytest.mark.parametrize(("family", "reaches"), [("llama", True), ("mistral", False)])
def test_a_window_hides_what_lies_behind_it(
    compiled: Callable[[str, bool], Case], family: str, reaches: bool
) -> None:
    case = compiled(family, False)
    tokens = case.tokens(3 * WINDOW)
    rows = []
    for first in (tokens[0], (tokens[0] + 1) % case.executor.facts.vocab):
        sequences, changed = case.sequences, [first, *tokens[1:]]
        rows.append(sequences.prefill([(sequences.open(changed), len(changed))])[0].copy())
    assert bool(np.abs(rows[0] - rows[1]).max() > 1e-3) is reaches


def _double() -> IRModule:
    x = param("x", [symbol("n")])
    module, _ = module_of([x], lambda emit, x: emit(relax.op.add(x, x)))
    return module


@dataclass(frozen=True)
class LeaveAlone:
    def run(self, mod: IRModule) -> Result:
        return Result(mod, 0, "learned")


@dataclass(frozen=True)
class BreakIt:
    """Uses a variable that nothing defines."""

    def run(self, mod: IRModule) -> Result:
        stray = param("stray", [symbol("n")])
        body = relax.SeqExpr([], stray)
        function = relax.Function([], body, stray.ty)
        return Result(IRModule({"main": function}), 1)


def test_the_runner_times_reports_and_dumps(tmp_path: Path) -> None:
    reported: list[str] = []
    runner = Runner(dump=tmp_path / "dump", report=reported.append)
    module = _double()
    assert runner.apply(module, LeaveAlone(), "prefill-").facts == "learned"
    runner.apply_tvm(module, "fold", relax.transform.DeadCodeElimination(), relax.transform.LegalizeOps())
    assert reported == ["prefill-leave-alone", "fold"]
    assert [(name, sites) for name, _, sites in runner.timings] == [("prefill-leave-alone", 0), ("fold", 1)]
    files = sorted((tmp_path / "dump").iterdir())
    assert [f.name for f in files] == ["01-prefill-leave-alone.py", "02-fold.py"]
    assert files[0].read_text() == "(unchanged)\n"
    assert "call_tir" in files[1].read_text()


def test_a_pass_that_breaks_the_module_is_a_bug_of_kvc() -> None:
    with pytest.raises(PlanningError, match="the pass break-it left an ill-formed module"):
        Runner().apply(_double(), BreakIt())


def test_the_passes_are_dumped_in_the_order_of_the_list(
    model_file: Callable[..., Path], tmp_path: Path
) -> None:
    reported: list[str] = []
    with pytest.raises(kvc.BudgetError) as refused:
        kvc.compile(
            model_file("llama"),
            budget="1MB",
            workload="2x64",
            output=tmp_path / "x.kvc",
            dump=tmp_path / "dump",
            report=reported.append,
        )
    assert refused.value.needed > 10**6
    assert not (tmp_path / "x.kvc").exists()
    names = [re.fullmatch(r"\d+-(.*)\.py", f.name) for f in sorted((tmp_path / "dump").iterdir())]
    found = [n[1] for n in names if n is not None]
    assert in_order(found, ["recognize-attention", "positions-to-input", "flatten-tokens"])
    assert in_order(found, ["recognize-attention", "prove-tokenwise", "flatten-tokens"])
    for phase in ("prefill", "decode"):
        own = [n.removeprefix(f"{phase}-") for n in found if n.startswith(phase)]
        assert ("select-rows" in own) == (phase == "prefill")
        assert in_order(own, ["page-attention", "pack-matmuls", "write-logits", "fuse", "allocate"])
    assert reported[0] == "import"


def in_order(values: list[str], wanted: list[str]) -> bool:
    rest = iter(values)
    return all(w in rest for w in wanted)


@pytest.mark.parametrize(
    ("name", "reason"), [("cnn", "no integer input"), ("encoder", "the attention is bidirectional")]
)
def test_a_model_that_is_no_decoder_is_refused(
    model_file: Callable[..., Path], tmp_path: Path, name: str, reason: str
) -> None:
    with pytest.raises(kvc.UnsupportedModel, match=reason):
        kvc.compile(model_file(name), budget="1GB", workload="1x64", output=tmp_path / "x.kvc")
    assert not list(tmp_path.iterdir())


def test_scores_and_logits_may_be_bounded(compiled: Callable[[str, bool], Case]) -> None:
    sites = compiled("gemma2", False).sites
    assert [s.softcap for s in sites] == [50.0, 50.0]
    assert [s.mask.window for s in sites] == [WINDOW, None]
