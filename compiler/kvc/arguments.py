"""The options of the `kvc` commands."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvc_passes.errors import InputError


def add_model(parser: argparse.ArgumentParser, metavar: str = "MODEL.onnx") -> None:
    """The model, which may be left out where `metavar` is in brackets, and what may be changed of it."""
    parser.add_argument("model", type=Path, metavar=metavar, nargs="?" if metavar[0] == "[" else None)
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="NAME",
        help="permissions to change results beyond rounding: window=N, sinks=N, token-scales; kv-int8, "
        "kv-fp8, kv-int4: for layers that must be in codes to fit, or gain enough by it",
    )


def add_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encoder",
        type=Path,
        metavar="ENCODER.onnx",
        help="the encoder whose output the model reads: compiled into the same artifact and budget",
    )
    parser.add_argument(
        "--encoder-dim",
        action="append",
        default=[],
        metavar="NAME=N",
        help="an extent of the encoder's inputs that the file leaves open, fixed",
    )


def encoder_dims(options: argparse.Namespace) -> dict[str, int]:
    """The extents of --encoder-dim by name. Raises InputError for what is none."""
    found = {}
    for text in options.encoder_dim:
        name, _, number = text.rpartition("=")
        if not name or not number.isdecimal() or not 0 < int(number) < 1 << 31:
            raise InputError(f"--encoder-dim {text}: write it as NAME=N, an extent of at least 1")
        found[name] = int(number)
    return found


def add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", help="most memory to use: 8GB, 512MiB, bytes, or auto: what is free now")
    parser.add_argument(
        "--workload",
        help="batch x context: 8x256, alternatives 8x256,1x2048, a common prefix 8x256/100, rows of an "
        "encoder's output 4x448+1500",
    )
    parser.add_argument(
        "--state",
        metavar="FORM",
        help="keep the state of all layers in one form: paged_kv, x_absorbed, mla_latent, v_only, k_only, "
        "k_plus_r, x_gemm, and what is allowed of kv-int8, kv-fp8, kv-int4; of cross-attention: "
        "encoder_output; v_only,paged_kv: K and V where it is not legal (the fastest that fits)",
    )
    parser.add_argument(
        "--target",
        default="cpu",
        help="cpu, cpu:NAME of a CPU that LLVM knows, cuda, or cuda:sm_80,sm_90 (cpu)",
    )


def add_records(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tune-db", type=Path, metavar="DIR", help="use what kvc tune found for kernels, as recorded there"
    )


def add_plan(parser: argparse.ArgumentParser) -> None:
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument(
        "--max-context",
        metavar="REQUESTS",
        help="not a workload: the longest context of so many requests (beside an --encoder as it stands, if "
        "anything fits so)",
    )
    wanted.add_argument(
        "--max-batch",
        metavar="TOKENS",
        help="instead of a workload: the most requests of so many tokens; as --max-context",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the plan, for kvc compile --plan")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw memory against time: FILE.svg, .png or .html",
    )
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page that shows the plan")


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="MODEL.kvc")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times"
    )
    prompts.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="one prompt a line, all served at once"
    )
    parser.add_argument(
        "--memory",
        action="append",
        default=[],
        type=Path,
        metavar="FILE.npy",
        help="the encoder's output [rows, width] that a prompt comes with, for decoders that read one; once "
        "for every prompt",
    )
    parser.add_argument(
        "--encoder-input",
        action="append",
        default=[],
        metavar="NAME=FILE.npy",
        help="an input of the encoder in the artifact, instead of its output: for all prompts along the "
        "first axis, or once for every prompt",
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put prompts into the model's chat template, or not (default: if it has one)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--top-k", type=int, default=0, help="only the K likeliest tokens; 0: all (0)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="only the likeliest tokens of this share (1)"
    )
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text")


def add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--db", type=Path, metavar="DIR", help="the folder of records")
    parser.add_argument(
        "--trials", type=int, default=200, metavar="N", help="most candidates to measure (200)"
    )
    parser.add_argument("--time", metavar="30m", help="most time to measure for: 90s, 30m, 2h (no limit)")
    parser.add_argument(
        "--kernels", default="gemm,attention", metavar="NAMES", help="what to tune (gemm,attention)"
    )
    parser.add_argument("--rpc", metavar="HOST:PORT", help="measure on servers of a tracker of TVM's RPC")
    parser.add_argument("--key", metavar="NAME", help="the key of the servers")
    parser.add_argument(
        "--timeout", type=float, default=60, metavar="S", help="seconds until a candidate is given up (60)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the best so far: FILE.svg or .png")
    parser.add_argument(
        "--merge",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="instead of measuring: add the records of other databases to --db",
    )
