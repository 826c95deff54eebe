"""A real compiled module through TVM's runtime alone, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)])}

PRELUDE = """
    import sys
    from pathlib import Path
    import numpy as np
    import kvc.runtime
    from kvc.artifact import Artifact
    from kvc.runtime.executor import Executor, Segment
    from kvc.runtime.sizes import logits_bytes, pool_bytes, table_bytes
    from kvc_passes.errors import InputError, PlanningError, TargetError

    def mapped(name):
        return any(name in line for line in open("/proc/self/maps"))

    def expected(history):
        sums = sum(2 * x + p * (p + 1) for p, x in enumerate(history))
        return [(c + 1) * sums + c for c in range(10)]

    def rows(*histories):
        return np.array([expected(h) for h in histories], np.float32)
"""


def _run(script: str, *arguments: str) -> str:
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(script)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny") / "tiny.kvc"
    command = [sys.executable, str(HERE / "tiny_model.py"), str(folder), "x86-64"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return str(folder)


def test_calls_compute_what_the_functions_define(tiny: str) -> None:
    _run(
        """
        x = Executor(Artifact.open(sys.argv[1]))
        assert x.prefill([Segment([1, 2, 3], 0, [[4]], wanted=False)]).shape == (0, 10)
        got = x.prefill([
            Segment([4, 5], 3, [[4, 1]]),
            Segment([7], 0, [[0]]),
            Segment([9, 8, 7, 6, 5], 0, [[5, 2]], wanted=False),
        ])
        np.testing.assert_array_equal(got, rows([1, 2, 3, 4, 5], [7]))
        got = x.decode([Segment([0], 5, [[5, 2]]), Segment([6], 1, [[0]]), Segment([9], 5, [[4, 1]])])
        np.testing.assert_array_equal(got, rows([9, 8, 7, 6, 5, 0], [7, 6], [1, 2, 3, 4, 5, 9]))
        assert not mapped("libtvm_compiler") and "tvm" not in sys.modules and "torch" not in sys.modules
        """,
        tiny,
    )


def test_memory_lasts_and_is_taken_at_load(tiny: str) -> None:
    _run(
        """
        x = Executor(Artifact.open(sys.argv[1]))
        plan, facts = x.plan, x.facts
        view = x.prefill([Segment([1], 0, [[0]])])
        again = x.decode([Segment([1], 0, [[0]])] * 3)
        assert view.ctypes.data == again.ctypes.data and again.nbytes <= logits_bytes(plan, facts)
        assert pool_bytes(plan, facts) == 2 * 128  # 6 pages of 4 floats, on 64-byte boundaries
        assert table_bytes(plan, facts) == 64 + 64 + 64 + 128 + 64 + 64 + 256 * 6
        maps = open("/proc/self/smaps").read().split("weights.safetensors")[1]
        private = next(line for line in maps.splitlines() if line.startswith("Private_Dirty"))
        assert private.split()[1] == "0", private  # the weights were mapped, not copied
        x.close()
        assert not mapped("weights.safetensors")
        """,
        tiny,
    )


def test_wrong_calls_are_refused(tiny: str) -> None:
    _run(
        """
        x = Executor(Artifact.open(sys.argv[1]))
        def refuses(kind, words, call, *segments):
            try:
                call(list(segments))
            except kind as error:
                assert words in str(error), error
            else:
                raise AssertionError(words)
        one = Segment([1], 0, [[0]])
        absent = "token id 10 does not exist: the model has 0 .. 9"
        refuses(InputError, absent, x.prefill, Segment([1, 10], 0, [[0]]))
        refuses(InputError, "token id -1", x.decode, Segment([-1], 0, [[0]]))
        refuses(PlanningError, "exceeds the plan", x.prefill)
        refuses(PlanningError, "exceeds the plan", x.prefill, Segment([1] * 9, 0, [[0, 1, 2]]))
        refuses(PlanningError, "exceeds the plan", x.prefill, one, one, one, one)
        refuses(PlanningError, "exceeds the plan", x.decode, one, one, one, one)
        refuses(PlanningError, "exceeds the plan", x.decode, Segment([1, 2], 0, [[0]]))
        refuses(PlanningError, "do not fit", x.prefill, Segment([1], 4, [[0]]))
        refuses(PlanningError, "do not fit", x.prefill, Segment([], 0, [[0]]))
        refuses(PlanningError, "do not fit", x.prefill, Segment([1], 0, [[0, 1, 2, 3, 4]]))
        """,
        tiny,
    )


def test_session_equals_the_definition(tiny: str) -> None:
    """More requests than places and pages, with sampling: each gets what it would get alone."""
    _run(
        """
        from kvc.runtime.sampler import SamplingParams, sample
        session = kvc.runtime.load(sys.argv[1])
        prompts = [[1, 2, 3], [4] * 9, [5], [6, 7], [8] * 12, [0, 9]]
        answers = session.generate(prompts, max_new_tokens=4, temperature=60.0, seed=3)
        for prompt, answer in zip(prompts, answers):
            tokens, rng = list(prompt), np.random.default_rng(3)
            for _ in range(4):
                row = np.array(expected(tokens), np.float32)
                tokens.append(sample(row, SamplingParams(temperature=60.0), rng))
            assert answer.prompt_tokens + answer.tokens == tokens
            assert (answer.finish_reason, answer.text) == ("length", "")
        assert session.stats.pages_used == (0,)
        session.close()
        """,
        tiny,
    )


def test_compiler_can_be_imported_after_a_model_was_loaded(tiny: str) -> None:
    _run(
        """
        session = kvc.runtime.load(sys.argv[1])
        before = session.generate([[1, 2]], max_new_tokens=3)[0].tokens
        assert not mapped("libtvm_compiler")
        import tiny_model
        assert mapped("libtvm_compiler")
        tiny_model.build(Path(sys.argv[2]), "x86-64")
        for path in sys.argv[1:]:
            assert kvc.runtime.load(path).generate([[1, 2]], max_new_tokens=3)[0].tokens == before
        assert session.generate([[1, 2]], max_new_tokens=3)[0].tokens == before
        """,
        tiny,
        str(Path(tiny).with_name("second.kvc")),
    )


def test_artifact_for_another_cpu_or_with_a_broken_library_is_refused(tiny: str) -> None:
    _run(
        """
        import json
        folder = Path(sys.argv[1])
        plan = json.loads((folder / "plan.json").read_text())
        plan["target"]["mattr"] = ["+avx512fp16", "+avx512bf16", "+avxvnni", "+avx512vp2intersect"]
        library = (folder / "model.so").read_bytes()
        from dataclasses import replace
        artifact = Artifact.open(folder)
        try:
            Executor(replace(artifact, plan=replace(artifact.plan, target=plan["target"])))
        except TargetError as error:
            assert "this CPU lacks" in str(error)
        else:
            assert {"avx512_fp16", "avx_vnni"} <= set(open("/proc/cpuinfo").read().split())
        (folder / "model.so").write_bytes(b"x" * len(library))
        try:
            kvc.runtime.load(folder, verify=False)
        except InputError as error:
            assert "model.so: cannot be loaded" in str(error)
        else:
            raise AssertionError
        finally:
            (folder / "model.so").write_bytes(library)
        """,
        tiny,
    )
