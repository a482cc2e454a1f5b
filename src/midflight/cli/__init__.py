"""midflight: tune the hyperparameters while the model trains.

  midflight study PRESET   reproduce the paper: smoke, quick or paper
  midflight report RUN     figures and one HTML page from the stored rows of a study
  midflight check          hypergradients against central differences, in float64
  midflight search SPACE   search what has no gradient, tune the rest while each trial trains
  midflight report STUDY --storage URL

Examples:
  midflight study smoke
  midflight study quick --run mine --starts 20 --estimator default t1t2
  midflight study paper --networks 1000-1000-1000 --device cuda
  midflight report quick --json
  midflight search mlp --data mnist --engine bohb --time 5m
  midflight search mine.py:objective --engine smac --trials 50 --storage postgresql://user@host/database

`midflight COMMAND --help` lists the options. Exit codes: 0 done; 1 the environment failed (no data
to be had, disk full), a check did not pass or every trial failed; 2 bad input; 130 interrupted.
"""

import sys
from importlib import import_module

from midflight.errors import MidflightError, require_extra

STUDY = dict.fromkeys(("tyro", "rich", "jinja2", "matplotlib", "sklearn", "platformdirs"), "study")
VERBS = {"study": STUDY, "report": STUDY, "check": {}, "search": dict.fromkeys((*STUDY, "optuna"), "search")}
"""Verb, which is a module here with a function `run` -> the packages that it needs, and their extras."""


def main() -> None:
    """Entry point of the command `midflight`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    verb = arguments[0]
    if verb not in VERBS:
        _fail(f"the command must be one of {', '.join(VERBS)}; got {verb!r}.", 2)
    try:
        for package, extra in VERBS[verb].items():
            require_extra(package, extra)
        sys.exit(import_module(f"midflight.cli.{verb}").run(arguments[1:]))
    except MidflightError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        what = f"{error.filename or 'the system'}: {error.strerror or error}"
        _fail(f"{what}; nothing that was stored is lost.", 1)
    except KeyboardInterrupt:
        _fail("interrupted; what was finished is stored, the same command goes on from there.", 130)


def _fail(sentence: str, code: int) -> None:
    print(f"midflight: {sentence}", file=sys.stderr)
    sys.exit(code)
