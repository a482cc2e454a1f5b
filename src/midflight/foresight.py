"""Where the validation loss is judged, so that a one-step hypergradient serves the whole run.

    v = dC2/dtheta at   average + caution (theta' - average),   average = of the recent weights

Judged at theta', the weights after the step (caution 1), the loss holds what the optimiser's own
wandering costs at this moment, and beyond (caution over 1) more of it. More regularisation always
lowers that cost, also where it harms the trained model. Judged at the average (caution 0) the cost is
gone, but a step sees the present only: while the network learns what generalises, less
regularisation looks better, and memorising comes later.

Which of the two errs shows in C1 / C2, training over validation loss at the average. Caution rises as it
falls below a line from 1 at the start to MEMORISED at the end of the run. docs/LOG.md has what
was measured on the way to this.

This is for what regularises. Options that say how a step is taken, such as the learning rate, pay or
cost at once and are judged at theta'.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from midflight.trees import Tensors

WINDOW = 0.1
"""The average reaches back over this share of the hyper-steps so far."""
LOOK = 4
"""C1 and C2 are taken at every so many hyper-steps."""
RECENT = 0.15
"""They are averaged over this share of the hyper-steps so far."""
MEMORISED = 0.35
"""C1 / C2 below this at the end of a run, and a model counts as memorising."""
OPEN_END = 0.5
"""The same where the length of the run is not known."""
GAIN = 10.0
"""Caution per unit of C1 / C2 below the line."""
MOST = 3.0
"""The most caution there is; the sign of a weak hypergradient needs more than 1 to come through."""


class Foresight:
    """The averaged weights, and how far judgement leans from them to the weights after the step.

    Attributes:
        caution: in [0, MOST]; 0 judges at the average, 1 at the weights after the step.
    """

    def __init__(self) -> None:
        self.caution = 0.0
        self._seen = 0
        self._average: Tensors = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._losses: deque[tuple[int, float, float]] = deque()

    @torch.no_grad()
    def follow(self, params: Mapping[str, Tensor]) -> bool:
        """Count these weights into the average.

        Returns:
            whether it is time to `observe`.
        """
        self._seen += 1
        share = min(1.0, 1 / (WINDOW * self._seen))
        # halves would not add up
        now = {n: p.detach().to(torch.promote_types(p.dtype, torch.float32)) for n, p in params.items()}
        self._dtypes = {name: p.dtype for name, p in params.items()}
        if self._average:
            torch._foreach_lerp_([self._average[name] for name in now], list(now.values()), share)
        else:
            self._average = {name: p.clone() for name, p in now.items()}
        return self._seen % LOOK == 1 % LOOK

    def average(self) -> Tensors:
        """The averaged weights, in the weights' own types; not to be changed."""
        return {name: a.to(self._dtypes.get(name, a.dtype)) for name, a in self._average.items()}

    def forget(self) -> None:
        """The weights have jumped: begin the average and the losses anew; the caution stays."""
        self._average, self._seen = {}, 0
        self._losses.clear()

    def observe(self, train_loss: float, valid_loss: float, progress: float | None) -> None:
        """C1 and C2 on one batch each, at the average; sets the caution.

        Args:
            train_loss: C1.
            valid_loss: C2.
            progress: share of the run that is over, in [0, 1]; None if its length is not known.
        """
        self._losses.append((self._seen, train_loss, valid_loss))
        while self._losses[0][0] <= (1 - RECENT) * self._seen:
            self._losses.popleft()
        c1, c2 = (sum(entry[i] for entry in self._losses) for i in (1, 2))
        if c2 > 0:
            self.caution = min(MOST, max(0.0, GAIN * (_line(progress) - c1 / c2)))

    @torch.no_grad()
    def judged(self, where: Callable[[], Tensors]) -> Tensors:
        """Where v is taken instead of at the weights that `where` gives; not asked at caution 0."""
        if self.caution == 0:
            return self.average()
        return {
            name: self._average[name].lerp(p.to(self._average[name]), self.caution).to(p)
            for name, p in where().items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume."""
        return {
            "caution": self.caution,
            "seen": self._seen,
            "average": {name: a.clone() for name, a in self._average.items()},
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        self.caution = state["caution"]
        self._seen = state["seen"]
        self._average = {name: a.clone() for name, a in state["average"].items()}
        self._losses = deque(tuple(entry) for entry in state["losses"])


def _line(progress: float | None) -> float:
    return OPEN_END if progress is None else 1 - (1 - MEMORISED) * math.sqrt(progress)
