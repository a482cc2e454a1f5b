"""What a tuner does when something breaks, and what it noticed: failures, bounds, an overfitted T2."""

import math
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean, variance
from typing import Any

import torch
from torch import Tensor, nn

from midflight.space import Space

PATIENCE = 3
"""Failed hyper-steps in a row until the last good snapshot is restored."""
RECOVERY = 10
"""Good hyper-steps in a row after which a shrunk step doubles again."""
PINNED = 0.25
"""A hyperparameter that stood at its bound for the last quarter of the hyper-steps is reported."""
SIGNIFICANT = 3.0
"""Standard errors by which the loss on a third split must exceed that on T2 to be reported."""


class Snapshots:
    """A copy of model, optimiser and hyperparameters, renewed at every n-th good hyper-step.

    Costs the memory of the weights and of the optimiser's state once more.

    Args:
        every: good hyper-steps between two copies, n >= 1.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, space: Space, every: int) -> None:
        if every < 1:
            raise ValueError(f"snapshots >= 1 must hold, but snapshots={every}.")
        self._model, self._optimizer, self._space, self._every = model, optimizer, space, every
        self._good = 0
        self._state: dict[str, Any] | None = None

    def good(self) -> None:
        """A hyper-step at finite values; keep them if it is time."""
        if self._good % self._every == 0:
            parts = self._model.state_dict(), self._optimizer.state_dict(), self._space.state_dict()
            self._state = dict(zip(("model", "optimizer", "space"), map(_copy, parts), strict=True))
        self._good += 1

    def restore(self) -> bool:
        """Go back to the copy and drop all gradients, so that the coming optimiser step does nothing.

        Returns:
            whether there was a copy.
        """
        if self._state is None:
            return False
        self._model.load_state_dict(self._state["model"])
        self._optimizer.load_state_dict(_copy(self._state["optimizer"]))  # it would train the copy
        self._space.load_state_dict(self._state["space"])
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        return True


class Failures:
    """Counts hyper-steps that were not finite, and says how far to shrink the next ones.

    Attributes:
        skipped: failed hyper-steps, all of them left out.
        restored: how often the last good snapshot was restored.
        shrink: the factor on the length of the hyper-steps: halved by a failure, doubled after
            RECOVERY good ones in a row until it is 1 again.
    """

    def __init__(self, snapshots: Snapshots | None) -> None:
        self._snapshots = snapshots
        self.skipped = 0
        self.restored = 0
        self.shrink = 1.0
        self._row = 0  # > 0: failures in a row; < 0: good ones

    def good(self) -> None:
        self._row = min(self._row, 0) - 1
        if self._row % RECOVERY == 0:
            self.shrink = min(1.0, 2 * self.shrink)
        if self._snapshots:
            self._snapshots.good()

    def failed(self) -> bool:
        """Count a failure.

        Returns:
            whether weights, optimiser and hyperparameters are now those of the snapshot.
        """
        self._row = max(self._row, 0) + 1
        self.skipped += 1
        self.shrink /= 2
        if self._row % PATIENCE or not self._snapshots or not self._snapshots.restore():
            return False
        self.restored += 1
        return True

    def report(self) -> list[str]:
        if not self.skipped:
            return []
        went_back = f"; the last good snapshot was restored {self.restored} times" * bool(self.restored)
        return [
            f"{self.skipped} hyper-steps were left out: a loss or hypergradient was not finite{went_back}."
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped, "restored": self.restored, "shrink": self.shrink, "row": self._row
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.restored, self.shrink, self._row = (
            state[name] for name in ("skipped", "restored", "shrink", "row")
        )


class Bounds:
    """How long every entry of a hyperparameter has been at one of its bounds."""

    def __init__(self) -> None:
        self._moves = 0
        self._inside: dict[str, int] = {}  # the last move after which an entry was inside

    def observe(self, space: Space) -> None:
        """After each move."""
        self._moves += 1
        for name, raw in space.raws.items():
            if bool(((raw > 0) & (raw < 1)).any()):
                self._inside[name] = self._moves

    def report(self, space: Space) -> list[str]:
        """One sentence per hyperparameter that has been pinned for long."""
        found = []
        for name, raw in space.raws.items():
            long = self._moves - self._inside.get(name, 0)
            if long > max(10, PINNED * self._moves):
                spec = space[name].spec
                sides = ("lower", raw <= 0, spec.low), ("upper", raw >= 1, spec.high)
                where = " and ".join(
                    f"its {side} bound {bound:g}" + ("" if at.all() else f" ({int(at.sum())} entries)")
                    for side, at, bound in sides
                    if at.any()
                )
                found.append(
                    f"{name} stood at {where} for the last {long} of {self._moves} hyper-steps; "
                    "widen its range if a better value may lie beyond."
                )
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"moves": self._moves, "inside": dict(self._inside)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._moves, self._inside = state["moves"], dict(state["inside"])


def overfitted(loss: Callable[[Any], Tensor], tuned_on: Iterable[Any], third: Iterable[Any]) -> list[str]:
    """A sentence if the loss on T2 is lower than on data that neither trained nor tuned, beyond chance.

    Weights have seen neither split, so without tuning the two losses are alike; Welch's test on the
    losses of the batches, one-sided, at SIGNIFICANT standard errors.

    Args:
        loss: batch -> its mean loss.
        tuned_on: the batches of T2, at least two, of about the same size.
        third: batches of a third split of the same kind, at least two.

    Raises:
        ValueError: one of them has fewer than two batches.
    """
    both = [[float(loss(batch)) for batch in batches] for batches in (tuned_on, third)]
    for name, values in zip(("T2", "the third split"), both, strict=True):
        if len(values) < 2:
            raise ValueError(
                f"{name} must have at least 2 batches to compare the two, but has {len(values)}; "
                "use smaller batches."
            )
    t2, t3 = map(fmean, both)
    error = math.sqrt(sum(variance(values) / len(values) for values in both))
    if t3 - t2 <= SIGNIFICANT * error:
        return []
    return [
        f"T2 is overfitted: its loss is {t2:.4g}, that of the third split {t3:.4g}, "
        f"{(t3 - t2) / error if error else math.inf:.1f} standard errors apart; "
        "tune fewer hyperparameters, or on more validation data."
    ]


def _copy(state: Any) -> Any:
    """A state_dict whose tensors are the caller's own."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: _copy(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copy(value) for value in state)
    return state
