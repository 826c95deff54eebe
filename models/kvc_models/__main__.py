"""The command line.

python -m kvc_models list
python -m kvc_models export NAME OUT.onnx [--with-past] [--opset N] [--dtype float16]
python -m kvc_models make-big OUT.onnx --params 7b [--dtype float16] [--sparse]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kvc_models.big import SIZES, make_big
from kvc_models.export import DEFAULT_OPSET, DTYPES, ModelError, assets_folder
from kvc_models.registry import ENTRIES, export_named


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvc_models", description="Export models to ONNX.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the models")
    export = commands.add_parser("export", help="export a model to ONNX")
    export.add_argument("name", metavar="NAME", help="a model of the list")
    export.add_argument("out", metavar="OUT.onnx", type=Path, help="the ONNX file to write")
    export.add_argument("--with-past", action="store_true", help="take and return keys and values")
    export.add_argument("--opset", type=int, default=DEFAULT_OPSET, help="ONNX operator set (%(default)s)")
    export.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="type of the weights (%(default)s)"
    )
    big = commands.add_parser("make-big", help="write a graph of real size with random weights")
    big.add_argument("out", metavar="OUT.onnx", type=Path, help="the ONNX file; weights go beside it")
    big.add_argument("--params", choices=sorted(SIZES), required=True, help="which size")
    big.add_argument("--dtype", choices=DTYPES, default="float16", help="type of the weights (%(default)s)")
    big.add_argument("--sparse", action="store_true", help="weights are zeros that take no room on the disk")
    big.add_argument("--opset", type=int, default=DEFAULT_OPSET, help="ONNX operator set (%(default)s)")
    return parser


def _export(name: str, out: Path, with_past: bool, opset: int, dtype: str) -> None:
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {line}", flush=True)

    _check_name(out)
    export_named(name, out, with_past=with_past, opset=opset, dtype=dtype, say=say)
    for file in (out, out.with_name(out.name + ".data")):
        if file.exists():
            say(f"wrote {file}, {file.stat().st_size / 1e6:.1f} MB")
    say(f"wrote {assets_folder(out)}/")


def _check_name(out: Path) -> None:
    if out.suffix != ".onnx":
        raise ModelError(f"the output file must be named something.onnx, not {out}")


def _make_big(options: argparse.Namespace) -> None:
    _check_name(options.out)
    make_big(options.out, options.params, dtype=options.dtype, opset=options.opset, sparse=options.sparse)
    for file in (options.out, options.out.with_name(options.out.name + ".data")):
        print(f"wrote {file}, {file.stat().st_size / 1e6:.1f} MB")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, or 1 after an error that was explained on stderr."""
    options = _parser().parse_args(arguments)
    if options.command == "list":
        for entry in ENTRIES:
            print(f"{entry.name:14} {entry.about}")
        return 0
    try:
        if options.command == "make-big":
            _make_big(options)
            return 0
        _export(options.name, options.out, options.with_past, options.opset, options.dtype)
    except (ModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
