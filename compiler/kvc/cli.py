"""The `kvc` command. Exit status 0: done; 1: a check failed or kvc is at fault; 2: the input is at fault.

Nothing heavy is imported at the top: a process that runs a model pays for what it imports.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from kvc_passes.errors import Error, InputError, PlanningError
from kvc_passes.facts import ModelFacts
from kvc_passes.plans import Plan

from . import __version__
from .arguments import (
    add_budget,
    add_encoder,
    add_model,
    add_plan,
    add_records,
    add_run,
    add_tune,
    encoder_dims,
)

if TYPE_CHECKING:
    from .tuning.records import Choice


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows another
    warnings.formatwarning = lambda message, *about, **more: f"kvc: note: {message}\n"
    with _signals() as interrupts:
        try:
            status: int = options.run(options)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (Exception, KeyboardInterrupt) as error:
            return _failed(error, interrupts, options.debug)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Unwind at SIGTERM and SIGINT, so that nothing half-made stays. Yields the interrupts that came.

    An interrupt inside a callback of TVM arrives as another exception.
    """
    interrupts: list[int] = []

    def interrupt(number: int, _: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, interrupt), signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # only the main thread can; elsewhere the caller handles signals
        yield interrupts
        return
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def _failed(error: BaseException, interrupts: Sequence[int], debug: bool) -> int:
    """Say what went wrong; returns the exit status."""
    if debug:
        traceback.print_exc()
    if interrupts or isinstance(error, KeyboardInterrupt):
        return _fail("interrupted", 128 + (interrupts[-1] if interrupts else signal.SIGINT))
    if isinstance(error, Error) and not isinstance(error, PlanningError):
        return _fail(str(error), 2)
    hint = "" if debug else "; run it again with --debug for a traceback"
    return _fail(f"this is a fault of kvc, not of the input: {type(error).__name__}: {error}{hint}", 1)


def _joined(arguments: Sequence[str]) -> list[str]:
    """Let `--budget -1GB` reach the check that explains it: argparse takes -1GB for an option."""
    result: list[str] = []
    for argument in arguments:
        if (
            result
            and result[-1] in ("--budget", "--workload")
            and argument[:1] == "-"
            and argument[1:2].isdigit()
        ):
            result[-1] += f"={argument}"
        else:
            result.append(argument)
    return result


def _fail(message: str, status: int) -> int:
    print(f"kvc: {message}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"kvc: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kvc", description="Compile decoder language models under a memory budget, and run them."
    )
    parser.add_argument("--version", action="version", version=f"kvc {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        added.add_argument("--debug", action="store_true", help="show a traceback when something fails")
        return added

    compile_ = command("compile", _compile, "compile an ONNX decoder into an artifact that keeps to a budget")
    add_model(compile_)
    add_budget(compile_)
    add_encoder(compile_)
    add_records(compile_)
    compile_.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="compile as this file of kvc plan --save says, instead of a budget",
    )
    compile_.add_argument("-o", "--output", type=Path, help="the artifact's folder (MODEL.kvc)")
    compile_.add_argument("--force", action="store_true", help="replace an artifact that is there already")
    compile_.add_argument("--dump", type=Path, metavar="DIR", help="write the IR after every pass to DIR")
    compile_.add_argument("--time-passes", action="store_true", help="show the time of every pass")
    plan = command("plan", _plan, "show how a budget would be spent, without compiling")
    add_model(plan)
    add_budget(plan)
    add_encoder(plan)
    add_records(plan)
    add_plan(plan)
    tune = command("tune", _tune, "measure candidates for a model's kernels, and record the best")
    add_model(tune, "[MODEL.onnx|MODEL.kvc]")
    add_budget(tune)
    add_tune(tune)
    profile = command("profile", _profile, "measure how fast this machine is, for the times of plans")
    profile.add_argument("--target", default="cpu", help="cpu, or cpu:NAME of a CPU that LLVM knows (cpu)")
    inspect = command("inspect", _inspect, "show what can be proved about an ONNX model")
    add_model(inspect)
    inspect.add_argument("--json", action="store_true", help="print the facts as JSON")
    verify = command("verify", _verify, "compare a compiled model with its ONNX file and its promise")
    verify.add_argument("artifact", type=Path, metavar="MODEL.kvc")
    verify.add_argument("--against", type=Path, required=True, metavar="MODEL.onnx")
    verify.add_argument(
        "--encoder", type=Path, metavar="ENCODER.onnx", help="compare the encoder in the artifact, too"
    )
    verify.add_argument(
        "--tolerance",
        type=float,
        help="largest difference of a logit (1e-3; with 16-bit keys and values 2e-2, 2e-1)",
    )
    verify.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="measure the perplexity of this text, too (with --allow: of one that comes with kvc)",
    )
    add_run(command("run", _run, "generate text with a compiled model"))
    return parser


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on the terminal that says what is being done; silent where there is none."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda name: None
        return
    with console.status("starting") as status:
        yield status.update


def _print(*tables: object) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        console.print(table)


def _notes(facts: ModelFacts, plan: Plan | None = None) -> None:
    """What a person should know about how the model was understood, and what a plan uses of permissions."""
    from .permissions import explain, unused
    from .report import ranges

    for text in facts.warnings:
        print(f"kvc: note: {text}", file=sys.stderr)
    for name in facts.allowed:
        layers = [site for site, form in enumerate(plan.forms) if form == name] if plan is not None else []
        where = f", in layers {ranges(layers)}" if layers else ""
        print(f"kvc: allowed: {name}: {explain(name)}{where}", file=sys.stderr)
    for name in unused(facts, plan) if plan is not None else ():
        print(f"kvc: allowed: {name}: not used: no layer needs it, or gains enough by it", file=sys.stderr)


def _compile(options: argparse.Namespace) -> int:
    import time

    from .api import compile
    from .plan_report import plan_tables
    from .report import kernels_table, timing_table

    start = time.perf_counter()
    with _progress() as report:
        timings: list[tuple[str, float, int]] = []
        kernels: list[tuple[str, Choice]] = []
        artifact = compile(
            options.model,
            budget=options.budget,
            workload=options.workload,
            output=options.output,
            target=options.target,
            allow=options.allow,
            state=options.state,
            plan=options.plan,
            encoder=options.encoder,
            encoder_dims=encoder_dims(options),
            tune_db=options.tune_db,
            force=options.force,
            dump=options.dump,
            report=report,
            timings=timings,
            kernels=kernels,
        )
    if options.time_passes:
        _print(timing_table(timings))
    if kernels:
        _print(kernels_table(kernels))
    _print(*plan_tables(artifact.plan, artifact.facts.name))
    _notes(artifact.facts, artifact.plan)
    print(f"{artifact.path}: compiled in {time.perf_counter() - start:.1f} s")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from .plan_command import run

    with _progress() as report:
        tables, status = run(options, report)
    _print(*tables)
    return status


def _tune(options: argparse.Namespace) -> int:
    from .tuning.command import run

    _print(*run(options))
    return 0


def _profile(options: argparse.Namespace) -> int:
    from .plan_command import profile_machine

    with _progress() as report:
        tables = profile_machine(options.target, report)
    _print(*tables)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from kvc_passes.facts import to_json

    from .api import inspect
    from .report import model_tables

    with _progress() as report:
        facts = inspect(options.model, allow=options.allow, report=report)
    if options.json:
        print(to_json(facts), end="")
    else:
        _print(*model_tables(facts))
        _notes(facts)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from .checks import verify
    from .report import check_table

    with _progress() as report:
        report("comparing with ONNX Runtime, then measuring memory")
        checks = verify(
            options.artifact,
            options.against,
            encoder=options.encoder,
            tolerance=options.tolerance,
            text=options.text,
        )
    _print(check_table(checks, f"{options.artifact} against {options.against}"))
    broken = dict.fromkeys(check.name for check in checks if not check.passed)
    if broken:
        return _fail(f"{options.artifact}: {', '.join(broken)}: not as promised", 1)
    return 0


def _run(options: argparse.Namespace) -> int:
    from .chat import answer, converse

    if options.prompt or options.prompts_file:
        return answer(options)
    if options.memory or options.encoder_input:
        raise InputError("--memory and --encoder-input come with prompts: give --prompt or --prompts-file")
    if sys.stdin.isatty() and sys.stdout.isatty():
        return converse(options)
    raise InputError(
        "nothing to run: give --prompt TEXT or --prompts-file FILE, or run it on a terminal to chat"
    )


if __name__ == "__main__":
    sys.exit(main())
