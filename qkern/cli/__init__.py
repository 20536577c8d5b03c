# SPDX-License-Identifier: Apache-2.0
"""The command line. One module per command: `add_arguments(parser)` and `run(args) -> int`.

Exit status: 0 success, 1 a sentence on standard error says what was wrong, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

from qkern import _link

COMMANDS = {
    "info": "what this build and machine can do, and which layers are active",
    "demo": "a real model, quantized in several formats, in one table",
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
    for name, summary in COMMANDS.items():
        modules[name] = importlib.import_module(f"qkern.cli.{name}")
        command = commands.add_parser(name, help=summary, description=modules[name].__doc__)
        modules[name].add_arguments(command)
        command.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    if bool(args.facts) == bool(args.command):
        parser.error("expected a command, or flags such as --cflags --libs, but not both")
    try:
        if args.facts:
            print(*(FACTS[name][0]() for name in args.facts))
            return 0
        return modules[args.command].run(args)
    except (ValueError, TypeError, ImportError, OSError, NotImplementedError) as error:
        print(f"qkern {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
