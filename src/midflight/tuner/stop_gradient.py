"""Hyperparameters whose values a training loss takes out of the graph, and their mixed partial.

The gradient may depend on a hyperparameter through a value that autograd does not see. It may be a target
computed under `no_grad`, as in self-distillation, or a detached weight in the loss. A derivative by autograd
leaves this out and may have the wrong sign. The derivative of the step as the loop takes it is

    d/draw <w, g>  =  (<w, g(raw + h)> - <w, g(raw - h)>) / 2h
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from midflight._tensors import Tensors, dot
from midflight.hypergrad.graph import graph_leaves
from midflight.space import Space

STEP = 0.01
"""h, in unit coordinates."""
MOST = 8
"""Entries of a hyperparameter; one with more would cost too many gradients."""
APART = 0.1
"""A derivative is wrong if it is further than this share from the difference."""
ALIKE = 0.1
"""The difference is trusted if half the step changes that distance by less than this share."""

_STOPS = {
    torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__, torch.Tensor.item, torch.Tensor.tolist,  # type: ignore[attr-defined]
    torch.Tensor.__float__,
}  # fmt: skip


Loss = Callable[[], Tensor]
Slope = Callable[[Tensors], tuple[Tensor, Tensors]]
"""leaves -> a loss and its gradient at them, without those that it does not reach"""


class StoppedReads(TorchFunctionMode):
    """Notes the hyperparameters whose values leave the graph within this block.

    The layers of `midflight.nn` do so on purpose, as part of an estimator, and do not count.

    Attributes:
        names: of these hyperparameters. Some may not matter, such as one that is only logged.
    """

    def __init__(self, space: Space) -> None:
        super().__init__()
        self._known = {id(raw): name for name, raw in space.raws.items()}
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stops = func in _STOPS
        if (stops or not torch.is_grad_enabled()) and not _is_own(stops):
            self._note([x for x in args if isinstance(x, Tensor) and x.requires_grad])
        return func(*args, **(kwargs or {}))

    def _note(self, tensors: list[Tensor]) -> None:
        if len(self.names) < len(self._known):
            leaves = [leaf for t in tensors for leaf in (t, *graph_leaves(t))]
            self.names |= {self._known[id(leaf)] for leaf in leaves if id(leaf) in self._known}


def _is_own(stops: bool) -> bool:
    """Whether this library called torch, and not the loss; a layer that runs under `no_grad` is the loss's.

    Args:
        stops: whether the call takes a value out of the graph by itself.
    """
    frame = sys._getframe(2)
    while frame is not None:  # past torch's own modes and the operators of `Space`
        name = str(frame.f_globals.get("__name__"))
        if not name.startswith(("midflight.tuner.", "midflight.space.", "torch.")):
            return name.startswith("midflight." if stops else "midflight.hypergrad.")
        frame = frame.f_back  # type: ignore[assignment]
    return False


class ByDifference:
    """The mixed partial of hyperparameters whose values the loss takes out of the graph.

    Args:
        space: the hyperparameters.

    Attributes:
        names: those whose derivative by autograd is wrong.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self.names: list[str] = []

    def judge(self, suspects: set[str], loss: Loss, slope: Slope, rounding: Callable[[], float]) -> None:
        """Find the wrong ones among those of which a value leaves the graph.

        The loss tells: its derivative by autograd is not its difference. Gradients would not tell, for those
        of a ReLU network jump.

        Args:
            suspects: from `StoppedReads`.
            loss: the training loss; on one batch and with the same random numbers at each call.
            slope: the same loss, and its derivatives by autograd.
            rounding: gives the relative rounding of the loss.
        """
        self.names = [name for name in sorted(suspects) if self._is_wrong(name, loss, slope, rounding)]

    def __call__(self, found: Tensors, gradient: Callable[[], Tensors], w: Tensors) -> Tensors:
        """`found` with the right entries for those hyperparameters.

        Args:
            found: d/draw <w, g> by autograd.
            gradient: g; on one batch and with the same random numbers at each call.
            w: direction in the space of weights.
        """

        def along() -> Tensor:
            g = {name: t for name, t in gradient().items() if name in w}
            return dot({name: w[name] for name in g}, g)

        return found | {name: self._difference(name, along) for name in self.names}

    def _is_wrong(self, name: str, loss: Loss, slope: Slope, rounding: Callable[[], float]) -> bool:
        """Whether the loss changes along a raw coordinate otherwise than autograd says."""
        raw = self._space[name].raw.detach()
        value, known = slope({name: self._space[name].raw})
        derivative = known.get(name, torch.zeros_like(raw))
        changes, predicted = [], []
        for h in (STEP, STEP / 2):
            sides = [(raw + h * _signs(raw)).clamp(0, 1), (raw - h * _signs(raw)).clamp(0, 1)]
            up, down = (float(self._at(name, side, loss)) for side in sides)
            changes.append((up - down) / h)
            predicted.append(float((derivative * (sides[0] - sides[1])).sum()) / h)
        off = abs(changes[0] - predicted[0])
        noise = 10 * rounding() / STEP * abs(float(value))
        certain = abs(off - abs(changes[1] - predicted[1])) <= ALIKE * off
        wrong = certain and off > APART * abs(changes[0]) + noise
        if wrong and raw.numel() > MOST:
            warnings.warn(
                f"the training loss takes values that depend on {name} out of the graph, by detach or "
                f"no_grad; its hypergradient leaves this out. With at most {MOST} entries it would not.",
                stacklevel=2,
            )
        return wrong and raw.numel() <= MOST

    def _at(self, name: str, raw: Tensor, f: Callable[[], Tensor]) -> Tensor:
        with self._space.seeing({name: self._space[name].transform.value(raw)}):
            return f().detach()

    def _difference(self, name: str, f: Callable[[], Tensor]) -> Tensor:
        """d/draw f, shaped like the raw coordinate."""
        raw = self._space[name].raw.detach()
        found = torch.zeros_like(raw)
        for i, at in enumerate(raw.view(-1).tolist()):
            low, high = max(0.0, at - STEP), min(1.0, at + STEP)
            sides = []
            for x in (high, low):
                moved = raw.clone()
                moved.view(-1)[i] = x
                sides.append(self._at(name, moved, f))
            found.view(-1)[i] = ((sides[0] - sides[1]) / (high - low)).to(found)
        return found


def _signs(raw: Tensor) -> Tensor:
    """Some direction with entries of 1 and -1, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(2, raw.shape, generator=generator) * 2 - 1).to(raw)
