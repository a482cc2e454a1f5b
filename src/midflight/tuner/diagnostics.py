"""Diagnose a run: hyperparameters that are unreached, at a bound or without a signal, and overfitted T2."""

import math
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np

from midflight._tensors import Tensors
from midflight.errors import UnreachedHyperparameter
from midflight.space import Space
from midflight.tuner.saved import Saved

PINNED, NEAR = 0.25, 0.05
"""A hyperparameter is reported if it stayed at its bound, or within NEAR of its range, for the share PINNED
of the hyper-steps, up to the last: a step from a bound inward is often taken back."""
SIGNIFICANT = 3.0
"""T2 is reported as overfitted if the loss on a third split is higher by this many standard errors."""
AGREEMENT, DECISIONS = 2.0, 30
"""A hyperparameter is reported if, over at least DECISIONS hypergradients, |sum of signs| / sqrt(count)
stayed below AGREEMENT."""
PATIENCE = 10
"""An error is raised if none of the first PATIENCE hyper-steps reached a hyperparameter, or if the gradient
was unknown in all of them."""


class Reach(Saved):
    """Counts the hyper-steps that did not reach a hyperparameter, until one does.

    Args:
        space: names of the hyperparameters.

    Attributes:
        options: names of the optimisers' options that can be tuned, for messages.
    """

    SAVED = ("_unreached",)

    def __init__(self, space: Iterable[str]) -> None:
        self._unreached = dict.fromkeys(space, 0)
        self.options: Iterable[str] = ()

    def observe(self, found: Tensors) -> None:
        """Record which hyperparameters a hyper-step reached. One miss is no error, as a branch may be random.

        Args:
            found: hypergradients, name -> tensor, of the hyperparameters that were reached.

        Raises:
            UnreachedHyperparameter: a hyperparameter was not reached in the first PATIENCE hyper-steps.
        """
        for name in list(self._unreached):
            if name in found:
                del self._unreached[name]
            else:
                self._unreached[name] += 1
        missing = [name for name, count in self._unreached.items() if count >= PATIENCE]
        if missing:
            raise UnreachedHyperparameter(
                f"each hyperparameter must reach the gradient of the training loss or a tuned option, but "
                f"{', '.join(missing)} did not in {PATIENCE} hyper-steps. {self._causes(missing)}"
            )

    def report(self) -> list[str]:
        """Return a sentence on the hyperparameters that were never reached; empty if there are none."""
        never = [name for name, count in self._unreached.items() if count]
        if not never:
            return []
        return [
            f"{', '.join(never)} reached neither the training loss nor the optimiser at any hyper-step. "
            f"{self._causes(never)}"
        ]

    def _causes(self, names: Iterable[str]) -> str:
        """Return what may be wrong, and what to do."""
        options = sorted(self.options)
        meant = {name: match[0] for name in names if (match := get_close_matches(name, options, 1))}
        return "".join(f"Is {name} meant as the option {option}? " for name, option in meant.items()) + (
            "Use it in the model or in loss_fn, and read it anew in each pass. Noise and dropout are off "
            "after model.eval(): call model.train(). The options of this optimiser that can be tuned are "
            f"{', '.join(options)}; bind= takes other names for them."
        )


class Bounds(Saved):
    """Counts the hyper-steps for which every entry of a hyperparameter has been at or near a bound."""

    SAVED = ("_moves", "_inside")

    def __init__(self) -> None:
        self._moves = 0
        self._inside: dict[str, int] = {}  # the last move after which some entry was inside the bounds

    def observe(self, space: Space) -> None:
        """Record the values after a move."""
        self._moves += 1
        for name, raw in space.raws.items():
            if bool(((raw > NEAR) & (raw < 1 - NEAR)).any()):
                self._inside[name] = self._moves

    def report(self, space: Space, paid: bool = True) -> list[str]:
        """Return a sentence for each hyperparameter that has been at its bounds for long.

        Args:
            space: the hyperparameters now.
            paid: whether the validation loss fell meanwhile; otherwise no wider range is advised.
        """
        found = []
        for name, raw in space.raws.items():
            long = self._moves - self._inside.get(name, 0)
            if long > max(10, PINNED * self._moves) and not space[name].spec.are_weights:
                spec = space[name].spec
                sides = ("lower", raw <= NEAR, spec.low), ("upper", raw >= 1 - NEAR, spec.high)
                nearness = "at" if bool(((raw <= 0) | (raw >= 1)).all()) else "near"
                where = " and ".join(
                    f"its {side} bound {bound:g}" + ("" if at.all() else f" ({int(at.sum())} entries)")
                    for side, at, bound in sides
                    if at.any()
                )
                natural = bool((raw <= NEAR).all()) and spec.low == 0 and not spec.log
                wider = "" if natural else "; widen its range if a better value may lie beyond"
                advice = wider if paid else ", but validation is no better there; compare with a fixed run"
                found.append(
                    f"{name} stood {nearness} {where} for the last {long} of {self._moves} "
                    f"hyper-steps{advice}."
                )
        return found


class Signal(Saved):
    """Judges whether the signs of a hyperparameter's hypergradients agree more than random ones would."""

    SAVED = ("_sums",)

    FIRST = 5
    """The sum of signs is tested from this count on."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[int, int, float]] = {}
        """Name -> count, sum of signs, the largest |sum| / sqrt(count)."""

    def observe(self, means: Mapping[str, float]) -> None:
        """Take in the mean hypergradients of a hyper-step, by name."""
        for name, mean in means.items():
            if mean == 0:
                continue
            count, total, most = self._sums.get(name, (0, 0, 0.0))
            count, total = count + 1, total + (mean > 0) - (mean < 0)
            if count >= self.FIRST:
                most = max(most, abs(total) / math.sqrt(count))
            self._sums[name] = count, total, most

    def report(self, moves: Mapping[str, str]) -> list[str]:
        """Return a sentence for each hyperparameter whose hypergradients had random signs.

        Args:
            moves: name -> "from its first to its last value", in words.
        """
        return [
            f"{name} went {moves[name]} by hypergradients of random signs, {count} in all: values "
            "between are equally good, or batches of valid_loader are too small to tell."
            for name, (count, _, most) in self._sums.items()
            if count >= DECISIONS and most < AGREEMENT
        ]


def overfitted(loss: Callable[[Any], float], tuned_on: Iterable[Any], third: Iterable[Any]) -> list[str]:
    """Return a sentence if the loss on T2 is significantly lower than on data not used to train or tune.

    The weights were trained on neither split, so without tuning the two losses are alike up to chance. The
    test is Welch's on the losses of the batches, one-sided, at SIGNIFICANT standard errors.

    Args:
        loss: batch -> its mean loss.
        tuned_on: at least two batches of T2, of about the same size.
        third: at least two batches of a third split of the same kind.

    Raises:
        ValueError: one of them has fewer than two batches.
    """
    both = [[loss(batch) for batch in batches] for batches in (tuned_on, third)]
    for name, values in zip(("T2", "the third split"), both, strict=True):
        if len(values) < 2:
            raise ValueError(
                f"{name} must have at least 2 batches to compare the two, but has {len(values)}; "
                "use smaller batches."
            )
    t2, t3 = (float(np.mean(values)) for values in both)
    error = math.sqrt(sum(float(np.var(values, ddof=1)) / len(values) for values in both))
    if t3 - t2 <= SIGNIFICANT * error:
        return []
    return [
        f"T2 is overfitted: its loss is {t2:.4g}, that of the third split {t3:.4g}, "
        f"{(t3 - t2) / error if error else math.inf:.1f} standard errors apart; "
        "tune fewer hyperparameters, or on more validation data."
    ]
