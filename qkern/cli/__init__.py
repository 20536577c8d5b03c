# SPDX-License-Identifier: Apache-2.0
"""The command line. One module per command: `add_arguments(parser)` and `run(args) -> int`.

Exit status: 0 success, 1 a sentence on standard error says what was wrong, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from qkern import _link
from qkern.errors import QkernError

COMMANDS = {
    "info": "what this build and machine can do, and which layers are active",
    "demo": "a real model, quantized in several formats, in one table",
    "quantize": "a Hugging Face folder into a quantized one, a layer in memory at a time",
    "inspect": "modules, formats and sizes of a saved folder or a safetensors file",
    "report": "size and error of every layer of a quantized folder",
    "bench": "speed of the kernels of this machine, against torch in float32",
    "tune": "the fastest Triton configurations for this GPU",
}


# Facts for build scripts: printed on one line, in the order asked for.
FACTS: dict[str, tuple[Callable[[], str], str]] = {
    "cflags": (_link.cflags, "compiler flags that find <qkern/qkern.h>"),
    "libs": (_link.libs, "linker flags, the run path included"),
    "cmakedir": (_link.get_cmake_dir, "folder of qkernConfig.cmake"),
    "pkgconfigdir": (_link.get_pkgconfig_dir, "folder of qkern.pc"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="qkern", description="Low-bit kernels.")
    for name, (_, summary) in FACTS.items():
        parser.add_argument(
            f"--{name}", dest="facts", action="append_const", const=name, help=f"print {summary}"
        )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    modules = {}
    argv = list(sys.argv[1:] if argv is None else argv)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in argv:  # the others are not even imported
            modules[name] = importlib.import_module(f"qkern.cli.{name}")
            command.description = modules[name].__doc__
            modules[name].add_arguments(command)
        command.add_argument("--json", action="store_true", help="print JSON instead of text")
        command.add_argument("--debug", action="store_true", help="show where an error came from")
    args = parser.parse_args(argv)
    if bool(args.facts) == bool(args.command):
        parser.error("expected a command, or flags such as --cflags --libs, but not both")
    try:
        if args.facts:
            print(*(FACTS[name][0]() for name in args.facts))
            return 0
        return modules[args.command].run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if getattr(args, "debug", False):
            raise
        known = isinstance(error, (ValueError, TypeError, ImportError, OSError, QkernError))
        told = error if known else f"{type(error).__name__}: {error} (--debug shows where)"
        print(f"qkern {args.command or ''}: {told}".replace(" :", ":"), file=sys.stderr)
        return 1
