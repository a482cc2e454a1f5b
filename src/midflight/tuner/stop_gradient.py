"""Find hyperparameters whose values a training loss takes out of the graph, and their mixed partial.

The gradient g may depend on a hyperparameter through a value that autograd does not see. It may be a target
computed under `no_grad`, as in self-distillation, or a detached weight in the loss. A derivative by autograd
leaves this out and may have the wrong sign. The derivative of the step that the loop takes is

    d/draw <w, g>  =  (<w, g(raw + h)> - <w, g(raw - h)>) / 2h
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from midflight._tensors import Tensors, dot
from midflight.errors import warn
from midflight.hypergrad.graph import graph_leaves
from midflight.space import Space
from midflight.tuner.sharded import WHOLE, Parts

STEP = 0.01
"""h, in unit coordinates."""
MOST = 8
"""The most entries of a hyperparameter that is differenced, because each needs two gradients."""
WRONG = 0.1
"""A derivative is wrong if its relative distance from the difference is larger than this."""
SUSPECT = 0.02
"""The same where the loss has a backward pass of the user's own."""
CERTAIN = 0.1
"""The difference is trusted if half its step changes this distance by at most this share."""

_STOPS = {
    torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__, torch.Tensor.item, torch.Tensor.tolist,  # type: ignore[attr-defined]
    torch.Tensor.__float__,
}  # fmt: skip
"""Functions whose result has no graph."""

Loss = Callable[[], Tensor]
Slope = Callable[[Tensors], tuple[Tensor, Tensors]]
"""leaves -> a loss and its gradient at them, without leaves that it does not reach"""


class StoppedReads(TorchFunctionMode):
    """Records the hyperparameters whose values leave the graph within this block.

    The layers of `midflight.nn` detach values on purpose, as part of an estimator. These do not count.

    Args:
        space: the hyperparameters.

    Attributes:
        names: those whose values leave the graph. Some may not matter, such as one that is only logged.
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
    """Return whether this library called torch, and not the user's loss.

    Args:
        stops: whether the call is one of `_STOPS`. Otherwise it runs under `no_grad`; there a layer of
            `midflight.nn` belongs to the loss that calls it.
    """
    frame = sys._getframe(2)
    while frame is not None:  # skips torch's modes and the operators of `Space`
        name = str(frame.f_globals.get("__name__"))
        if not name.startswith(("midflight.tuner.", "midflight.space.", "torch.")):
            return name.startswith("midflight." if stops else "midflight.hypergrad.")
        frame = frame.f_back  # type: ignore[assignment]
    return False


class ByDifference:
    """Differences the mixed partial of hyperparameters whose values the loss takes out of the graph.

    Args:
        space: the hyperparameters.
        parts: sums over the processes, if the weights are sharded.

    Attributes:
        names: those whose derivative by autograd is wrong.
    """

    def __init__(self, space: Space, parts: Parts = WHOLE) -> None:
        self._space, self._parts = space, parts
        self.names: list[str] = []

    def judge(self, suspects: set[str], loss: Loss, slope: Slope, rounding: Callable[[], float]) -> None:
        """Add to `names` the suspects whose derivative by autograd is wrong.

        The derivative of the loss is compared with its difference. Differences of gradients would not do,
        because the gradients of a ReLU network jump.

        Args:
            suspects: `StoppedReads.names`.
            loss: the training loss, with the same batch and random numbers at each call.
            slope: returns the same loss and its derivatives by autograd.
            rounding: returns the relative rounding of the loss.
        """
        for name in sorted(suspects):
            if self._parts.any([self._is_wrong(name, loss, slope, rounding)])[0]:
                self._difference_or_warn(
                    name, f"takes values of {name} out of the graph, by detach or no_grad"
                )

    def judge_backward(
        self, found: Tensors, gradient: Callable[[], Tensors], w: Tensors, rounding: float
    ) -> None:
        """Add to `names` the hyperparameters whose mixed partial contradicts the difference of gradients.

        A backward pass of the user's own may not be the derivative of the forward pass: gradient reversal,
        hooks that change gradients, kernels that autograd cannot differentiate again. Gradients of ReLU
        networks jump, so a right mixed partial may be called wrong here. This costs time only.

        Args:
            found, gradient, w: as in `__call__`.
            rounding: the relative rounding of the loss.
        """
        along = self._along(gradient, w)
        for name in [name for name in self._space if name not in self.names]:
            (first, _), (second, predicted) = self._slopes(name, along, found)
            off, noise = abs(second - predicted), 10 * rounding / STEP * abs(float(along()))
            if off > SUSPECT * abs(second) + noise and abs(first - second) <= off / 2:
                self._difference_or_warn(name, "has a backward pass of its own")

    def __call__(self, found: Tensors, gradient: Callable[[], Tensors], w: Tensors) -> Tensors:
        """Return d/draw <w, g>, name -> tensor shaped like raw, with differences for `names`.

        Args:
            found: d/draw <w, g> by autograd.
            gradient: returns g, with the same batch and random numbers at each call.
            w: a direction in the space of weights, name -> tensor.
        """
        along = self._along(gradient, w)
        return found | {name: self._difference(name, along) for name in self.names}

    def _along(self, gradient: Callable[[], Tensors], w: Tensors) -> Callable[[], Tensor]:
        """Return the function () -> <w, g>."""

        def along() -> Tensor:
            g = {name: t for name, t in gradient().items() if name in w}
            own = dot({name: w[name] for name in g}, g)
            return own if self._parts.count == 1 else own.new_tensor(self._parts.sum(float(own)))

        return along

    def _difference_or_warn(self, name: str, what: str) -> None:
        if self._space[name].raw.numel() <= MOST:
            self.names.append(name)
        else:
            warn(
                f"the training loss {what}, so the hypergradient of {name} is wrong; with at most {MOST} "
                "entries it would be right."
            )

    def _is_wrong(self, name: str, loss: Loss, slope: Slope, rounding: Callable[[], float]) -> bool:
        """Return whether a central difference of the loss along `_signs` contradicts autograd."""
        value, known = slope({name: self._space[name].raw})
        (first, predicted), (second, predicted_second) = self._slopes(name, loss, known)
        off = abs(first - predicted)
        noise = 10 * rounding() / STEP * abs(float(value))
        certain = abs(off - abs(second - predicted_second)) <= CERTAIN * off
        return certain and off > WRONG * abs(first) + noise

    def _slopes(self, name: str, f: Callable[[], Tensor], found: Tensors) -> list[tuple[float, float]]:
        """Return (difference of f along `_signs`, the same by `found`), for STEP and for half of it."""
        raw = self._space[name].raw.detach()
        derivative, slopes = found.get(name, torch.zeros_like(raw)), []
        for h in (STEP, STEP / 2):
            sides = [(raw + h * _signs(raw)).clamp(0, 1), (raw - h * _signs(raw)).clamp(0, 1)]
            up, down = (float(self._at(name, side, f)) for side in sides)
            slopes.append(((up - down) / h, float((derivative * (sides[0] - sides[1])).sum()) / h))
        return slopes

    def _at(self, name: str, raw: Tensor, f: Callable[[], Tensor]) -> Tensor:
        with self._space.seeing({name: self._space[name].transform.value(raw)}):
            return f().detach()

    def _difference(self, name: str, f: Callable[[], Tensor]) -> Tensor:
        """Return d/draw f by central differences, shaped like raw."""
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
    """Return a random direction with entries 1 and -1, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(2, raw.shape, generator=generator) * 2 - 1).to(raw)
