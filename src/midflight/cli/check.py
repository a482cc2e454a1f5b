"""`midflight check`: compare the estimators with central differences."""

import argparse
import json
import os
import sys
from dataclasses import asdict

import torch

from midflight._reporting.text import aligned
from midflight.gradcheck.table import Check, Skipped, as_dicts, run_checks

COLUMNS = ("optimiser", "hyperparameter", "estimator", "relative error", "cosine", "scale", "claim")


def run(arguments: list[str]) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="midflight check",
        description="Compare hypergradients of built-in models with central differences, in float64. For "
        "your own model, call midflight.check in Python.",
        epilog="examples:\n"
        "  midflight check\n"
        "  midflight check --all --optimizers AdamW --estimators unrolled",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="check every estimator, update rule and kind of hyperparameter; takes minutes",
    )
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="check these only, such as AdamW")
    parser.add_argument("--estimators", nargs="+", metavar="NAME", help="check these only, such as one_step")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the networks are too small to profit from more
    rows = []
    workers = (os.cpu_count() or 1) if options.all else 1
    for row in run_checks(options.all, workers, optimizers=options.optimizers, estimators=options.estimators):
        rows.append(row)
        _show(f"comparing with central differences: {row.rule}, {row.hyperparameter}")
    _show("")
    checks = [row for row in rows if isinstance(row, Check)]
    skipped = [row for row in rows if isinstance(row, Skipped)]
    failed = [check for check in checks if check.passed is False]
    if options.json:
        print(json.dumps({"checks": as_dicts(checks), "skipped": [asdict(row) for row in skipped]}, indent=2))
    else:
        print("Hypergradients against the central difference of the one-step map (float64)")
        print(aligned([COLUMNS, *map(_cells, checks)]))
        for reason in dict.fromkeys(row.reason for row in skipped):
            places = [f"{r.rule} {r.hyperparameter} ({r.estimator})" for r in skipped if r.reason == reason]
            more = f"; and {len(places) - 3} more" if len(places) > 3 else ""
            print(f"skipped: {'; '.join(places[:3])}{more}: {reason}")
        claims = sum(check.passed is not None for check in checks)
        print(f"{claims - len(failed)} of {claims} estimates are as accurate as their estimators claim.")
    return 1 if failed else 0


def _cells(check: Check) -> tuple[str, ...]:
    verdict = "" if check.passed is None else f"{'holds' if check.passed else 'FAILS'} {check.tolerance}"
    numbers = f"{check.relative_error:.2g}", f"{check.cosine:.3f}", f"{check.scale:.3g}"
    return check.rule, check.hyperparameter, check.estimator, *numbers, verdict


def _show(line: str) -> None:
    """Replace the progress line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
