# SPDX-License-Identifier: Apache-2.0
"""The command line. One module per command: `add_arguments(parser)` and `run(args) -> int`.

Exit status: 0 success, 1 a sentence on standard error says what was wrong, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "info": "what this build and machine can do, and which layers are active",
    "demo": "a real model, quantized in several formats, in one table",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="qkern", description="Low-bit kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {}
    for name, summary in COMMANDS.items():
        modules[name] = importlib.import_module(f"qkern.cli.{name}")
        command = commands.add_parser(name, help=summary, description=modules[name].__doc__)
        modules[name].add_arguments(command)
        command.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    try:
        return modules[args.command].run(args)
    except (ValueError, TypeError, ImportError, OSError, NotImplementedError) as error:
        print(f"qkern {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
