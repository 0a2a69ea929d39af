"""Parses a command's flags as the command does: `python -m tests.parsed_flags MODULE ARGUMENT...`.

Prints JSON: what is wrong, "" if nothing is; the arguments that are no flags; the names of all
flags that there are.
"""

import json
import runpy
import sys
from collections.abc import Callable
from unittest import mock

from absl import app, flags


def main(module: str, *arguments: str) -> None:
    """Lets the command come to where it would begin."""
    rest = []

    def run(main: Callable, argv: list[str] | None = None, flags_parser: Callable = flags.FLAGS):
        rest.extend(flags_parser(sys.argv)[1:])

    wrong = ""
    with mock.patch.object(app, "run", run), mock.patch.object(sys, "argv", [module, *arguments]):
        try:
            runpy.run_module(module, run_name="__main__")
        except (SystemExit, flags.Error) as error:
            wrong = str(error)
    print(json.dumps([wrong, rest, list(flags.FLAGS)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
