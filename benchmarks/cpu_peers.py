"""Decode and prefill speed of kvc and of its peers on SmolLM2-135M, fp32 against fp32, in one run.

Every engine is a process of its own and only one computes at a time. Rounds alternate between the engines, so
that a machine that becomes slower or faster meets them all alike: compare ratios within a run. Decode starts
at the named context and goes on from round to round; a step is one token of every sequence, chosen greedily.
Peers that are not installed, or do not run, are listed with the reason.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import peer_models
from benchmarks.common import (
    BUILD,
    ROOT,
    WORK,
    destination,
    parser,
    show,
    write_results,
)
from benchmarks.peers import PEERS, Worker

PAUSE = 0.3
"""Seconds between two engines: the threads of the one before have gone to sleep by then."""


@dataclass(frozen=True)
class Case:
    """What is measured: decode steps of a batch at a context, or the prefill of one prompt."""

    kind: str
    batch: int
    length: int

    @property
    def name(self) -> str:
        shape = f"batch {self.batch}, context {self.length}" if self.kind == "decode" else f"{self.length}"
        return f"{self.kind} {shape}"

    @property
    def tokens(self) -> int:
        """Tokens that one measured time stands for."""
        return self.batch if self.kind == "decode" else self.length


CASES = [
    Case("decode", 1, 128),
    Case("decode", 8, 128),
    Case("decode", 1, 2048),
    Case("decode", 8, 2048),
    Case("prefill", 1, 512),
    Case("prefill", 1, 2048),
]


class Benchmark:
    """The engines that run, the reasons why others do not, and the seconds measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rounds: int = options.rounds
        self.steps: int = options.steps
        self.workers: dict[str, Worker] = {}
        self.missing: dict[str, str] = {}
        self.peaks: dict[str, int] = {}
        self.first_tokens: dict[str, dict[str, int]] = {}
        self.seconds: dict[Case, dict[str, list[list[float]]]] = {}

    def start(self) -> None:
        """Make every model, then start every engine."""
        WORK.mkdir(parents=True, exist_ok=True)
        for peer in PEERS:
            if self.options.engines and peer.name not in self.options.engines:
                continue
            try:
                model = peer.model(self.options)
                log = WORK / f"{peer.module}-{peer.options.get('kv', 'log')}.txt"
                worker = Worker(peer, model, self.options.peer_python, self.options.threads, log)
            except (peer_models.Missing, RuntimeError, ImportError, OSError) as error:
                self.missing[peer.name] = str(error)
            else:
                self.workers[peer.name] = worker
                print(f"{peer.name} {worker.about['version']}: {worker.about['configuration']}", flush=True)

    def measure(self, case: Case) -> None:
        """All rounds of a case; an engine that fails in it is left out of that case."""
        names = list(self.workers)
        results: dict[str, list[list[float]]] = {name: [] for name in names}
        self.seconds[case] = results
        for number in range(-1, self.rounds):  # the first only warms up
            for name in names[number % len(names) :] + names[: number % len(names)]:
                if name not in results:
                    continue
                try:
                    taken = self._once(name, case, number)
                except RuntimeError as error:
                    self.missing[f"{name}: {case.name}"] = str(error)
                    del results[name]
                    continue
                if number >= 0:
                    results[name].append(taken)
                time.sleep(PAUSE)
        for name in results:  # gives the memory of the contexts back
            self._forget(name)

    def _once(self, name: str, case: Case, number: int) -> list[float]:
        worker = self.workers[name]
        if case.kind == "prefill":
            answer = worker.ask("prefill", length=case.length, seed=100 + number)
            self.first_tokens.setdefault(f"{case.name}, round {number}", {})[name] = int(answer["token"])
        else:
            if number < 0:
                room = self.steps * (self.rounds + 1)
                sizes = {"batch": case.batch, "context": case.length, "seed": case.length, "room": room}
                (seconds,) = worker.ask("fill", **sizes)["seconds"]
                print(f"{case.name}: {name} computed the contexts in {seconds:.1f} s", file=sys.stderr)
            answer = worker.ask("decode", steps=self.steps)
        return [float(second) for second in answer["seconds"]]

    def _forget(self, name: str) -> None:
        try:
            self.workers[name].ask("prefill", length=8, seed=0)
        except RuntimeError as error:
            self.missing[name] = str(error)

    def stop(self) -> None:
        """End every engine, after it said how much memory it took."""
        for name, worker in self.workers.items():
            try:
                self.peaks[name] = int(worker.ask("peak")["bytes"])
            except RuntimeError as error:
                self.missing[name] = str(error)
            worker.stop()

    def disagreements(self) -> dict[str, dict[str, int]]:
        """Prompts after which the engines did not choose the same token: they should run the same model."""
        return {case: found for case, found in self.first_tokens.items() if len(set(found.values())) > 1}

    def cases(self) -> list[dict[str, Any]]:
        """Tokens a second of each case and engine, and kvc's ratio to each peer."""
        return [self._case(case, results) for case, results in self.seconds.items()]

    def _case(self, case: Case, results: dict[str, list[list[float]]]) -> dict[str, Any]:
        rates: dict[str, dict[str, Any]] = {
            name: {
                "best": case.tokens / min(min(taken) for taken in rounds),
                "median": case.tokens / statistics.median(s for taken in rounds for s in taken),
                "round_medians": [round(case.tokens / statistics.median(taken), 2) for taken in rounds],
            }
            for name, rounds in results.items()
        }
        body: dict[str, Any] = {
            "case": case.name,
            "kind": case.kind,
            "batch": case.batch,
            "length": case.length,
            "tokens_per_second": {
                name: {k: round(v, 2) if isinstance(v, float) else v for k, v in rate.items()}
                for name, rate in rates.items()
            },
        }
        if "kvc" in rates:
            body["kvc_to"] = {
                name: {kind: round(rates["kvc"][kind] / rate[kind], 3) for kind in ("median", "best")}
                for name, rate in rates.items()
                if name != "kvc"
            }
        return body


def main() -> int:
    options = _options()
    benchmark = Benchmark(options)
    try:
        benchmark.start()
        if not benchmark.workers:
            raise SystemExit("no engine runs: " + "; ".join(benchmark.missing.values()))
        for case in CASES[:: 4 if options.quick and not options.cases else 1]:
            if options.cases not in case.name:
                continue
            benchmark.measure(case)
            _show(benchmark, benchmark.cases()[-1])
    finally:
        benchmark.stop()
    body = {
        "model": "SmolLM2-135M-Instruct, float32",
        "threads": options.threads,
        "rounds": options.rounds,
        "steps_a_round": options.steps,
        "quick": options.quick,
        "engines": {
            name: {**worker.about, "peak_bytes": benchmark.peaks.get(name)}
            for name, worker in benchmark.workers.items()
        },
        "missing": benchmark.missing,
        "different_first_tokens": benchmark.disagreements(),
        "cases": benchmark.cases(),
    }
    path = write_results("cpu_peers", body, destination(options, "cpu_peers"))
    for name, reason in benchmark.missing.items():
        print(f"missing: {name}: {reason}")
    print(f"written: {path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path}")
    return 0


def _options() -> argparse.Namespace:
    result = parser(__doc__, "cpu_peers")
    result.add_argument(
        "--past", type=Path, default=BUILD / "smollm2-135m-past.onnx", help="export with past"
    )
    result.add_argument("--peer-python", default=sys.executable, help="the Python that has the peers")
    result.add_argument("--threads", type=int, default=2, help="threads of every engine (%(default)s)")
    result.add_argument("--rounds", type=int, default=7, help="measured rounds of a case (%(default)s)")
    result.add_argument("--steps", type=int, default=16, help="decode steps of a round (%(default)s)")
    result.add_argument("--engines", nargs="*", choices=[p.name for p in PEERS], help="only these")
    result.add_argument("--cases", default="", metavar="TEXT", help="only cases whose name holds this")
    result.add_argument("--budget", default="2GB", help="kvc's budget (%(default)s)")
    result.add_argument("--workload", default="8x2304", help="kvc's workload (%(default)s)")
    result.add_argument("--reuse", action="store_true", help="do not compile again for kvc")
    options = result.parse_args()
    if options.quick:
        options.rounds, options.steps = min(options.rounds, 2), min(options.steps, 6)
    return options


def _show(benchmark: Benchmark, case: dict[str, Any]) -> None:
    ratios = case.get("kvc_to", {})
    rows = [
        (
            name,
            f"{rate['median']:.1f}",
            f"{rate['best']:.1f}",
            f"{ratios[name]['median']:.2f}x" if name in ratios else "",
        )
        for name, rate in case["tokens_per_second"].items()
    ]
    title = f"{case['case']}: tokens a second, {benchmark.options.threads} threads"
    show(title, ["engine", "median", "best", "kvc is"], rows)


if __name__ == "__main__":
    sys.exit(main())
