"""midflight: tune the hyperparameters while the model trains.

  midflight study PRESET   reproduce the paper: smoke, quick or paper
  midflight report RUN     write figures and one HTML page about a study
  midflight check          compare hypergradients with central differences, in float64
  midflight search SPACE   search hyperparameters without a gradient, tune the others during each trial
  midflight report STUDY --storage URL   write figures and one HTML page about a search

Examples:
  midflight study smoke
  midflight study quick --run mine --starts 20 --estimator default t1t2
  midflight study paper --networks 1000-1000-1000 --device cuda
  midflight report quick --json
  midflight search mlp --data mnist --engine bohb --time 5m
  midflight search mine.py:objective --engine smac --trials 50 --storage postgresql://user@host/database

`midflight COMMAND --help` lists the options. Exit codes: 0 done; 1 a failure (no data, disk full, a
check failed, every trial failed); 2 bad input; 130 interrupted; 141 the reader of the output ended.
"""

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from midflight._reporting.text import printable
from midflight.errors import MidflightError, UnknownName, require_extra

STUDY = dict.fromkeys(("tyro", "rich", "jinja2", "matplotlib", "sklearn", "platformdirs"), "study")
COMMANDS = {
    "study": STUDY,
    "report": STUDY,
    "check": {},
    "search": dict.fromkeys((*STUDY, "optuna"), "search"),
}
"""Command, a module of this package with a function `run` -> the packages it needs, with their extra."""
ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors of the system that the same command may not meet again; any other is about a path of the user's."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `midflight`; default: with the arguments of this process."""
    for stream in (sys.stdout, sys.stderr):  # an encoding that lacks a character shows an escape
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="midflight")
    try:
        code = _run(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
    except MidflightError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:  # the reader, `head` for instance, has enough
        _drop_output()
        sys.exit(141)
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:  # Python would fail again at its end, with another exit code
            _drop_output()
        what = f"{error.filename or 'the system'}: {error.strerror or error}"
        code = 1 if error.errno is None or error.errno in ENVIRONMENT else 2
        _fail(f"{what}; stored results are safe.", code)
    except KeyboardInterrupt:
        _fail("interrupted; finished work is stored, the same command resumes.", 130)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """Return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    command = arguments[0]
    if command not in COMMANDS:
        raise UnknownName("the command", command, COMMANDS)
    if any("\0" in argument for argument in arguments):
        _fail("no argument may hold a null character.", 2)
    for package, extra in COMMANDS[command].items():
        require_extra(package, extra)
    return int(import_module(f"midflight.cli.{command}").run(arguments[1:]))


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(sentence: str, code: int) -> NoReturn:
    print("midflight:", "\n".join(map(printable, sentence.split("\n"))), file=sys.stderr)
    sys.exit(code)
