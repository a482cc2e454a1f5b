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

from midflight._tensors import Tensors, dot, norm
from midflight.hypergrad.graph import graph_leaves
from midflight.space import Space

STEP = 0.01
"""h, in unit coordinates."""
MOST = 8
"""Entries of a hyperparameter; one with more would cost too many gradients."""
APART, ALIKE = 0.1, 0.1
"""A derivative is wrong if it is so far from the difference, and the difference is certain to this share."""

Gradient = Callable[[], Tensors]
"""The training gradient on one batch and with the same random numbers at each call."""

_STOPS = (torch.Tensor.detach, torch.detach, torch.Tensor.item, torch.Tensor.data.__get__)  # type: ignore[attr-defined]


class StoppedReads(TorchFunctionMode):
    """Notes the hyperparameters whose values leave the graph within this block.

    The layers of `midflight.nn` do so on purpose, as part of an estimator, and do not count.

    Attributes:
        names: of these hyperparameters; they may be of no consequence, as where a loss is logged.
    """

    def __init__(self, space: Space) -> None:
        super().__init__()
        self._known = {id(raw): name for name, raw in space.raws.items()}
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if isinstance(first, Tensor):
            if func in _STOPS and first.requires_grad and not _caller().startswith("midflight."):
                self._note([first, *graph_leaves(first)])
            elif not torch.is_grad_enabled() and not _caller().startswith("midflight.hypergrad."):
                self._note(x for x in args if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))

    def _note(self, tensors: Any) -> None:
        self.names |= {self._known[id(t)] for t in tensors if id(t) in self._known}


def _caller() -> str:
    """The module of the code that called torch, past torch's own modes and the operators of `Space`."""
    frame = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if not name.startswith(("midflight.tuner.", "midflight.space.", "torch.")):
            return name
        frame = frame.f_back  # type: ignore[assignment]
    return ""


class ByDifference:
    """The mixed partial of hyperparameters whose values the loss takes out of the graph.

    Args:
        space: the hyperparameters.
        names: those that may have a wrong derivative, from `StoppedReads`.
    """

    def __init__(self, space: Space, names: set[str]) -> None:
        self._space = space
        self._suspects: set[str] | None = names
        self.names: list[str] = []
        """Those whose derivative by autograd is wrong."""

    def __call__(
        self, found: Tensors, gradient: Gradient, w: Tensors, rounding: Callable[[], float]
    ) -> Tensors:
        """`found` with the right entries for those hyperparameters.

        Args:
            found: d/draw <w, g> by autograd.
            gradient: g at the values that the space gives.
            w: direction in the space of weights.
            rounding: gives the relative rounding of the loss.
        """
        if self._suspects is not None:
            suspects, self._suspects = sorted(self._suspects), None
            self.names = [n for n in suspects if self._is_wrong(n, found.get(n), gradient, w, rounding)]
        return found | {name: self._difference(name, gradient, w, STEP)[0] for name in self.names}

    def _is_wrong(
        self, name: str, found: Tensor | None, gradient: Gradient, w: Tensors, rounding: Callable[[], float]
    ) -> bool:
        raw = self._space[name].raw
        if raw.numel() > MOST:
            warnings.warn(
                f"the training loss takes values that depend on {name} out of the graph, by detach or "
                f"no_grad; its hypergradient leaves them out; only with at most {MOST} entries it would not.",
                stacklevel=2,
            )
            return False
        wide, length = self._difference(name, gradient, w, STEP)
        narrow, _ = self._difference(name, gradient, w, STEP / 2)
        off = (wide - (torch.zeros_like(wide) if found is None else found)).abs().max()
        certain = (wide - narrow).abs().max() <= ALIKE * off
        return bool(certain & (off > APART * wide.abs().max() + 100 * rounding() / STEP * length))

    def _difference(self, name: str, gradient: Gradient, w: Tensors, h: float) -> tuple[Tensor, Tensor]:
        """d/draw <w, g>, shaped like the raw coordinate, and |w| |g|."""
        raw = self._space[name].raw.detach()
        found, length = torch.zeros_like(raw), raw.new_zeros(())
        for i in range(raw.numel()):
            at = float(raw.view(-1)[i])
            low, high = max(0.0, at - h), min(1.0, at + h)
            sides = []
            for x in (high, low):
                moved = raw.clone()
                moved.view(-1)[i] = x
                with self._space.seeing({name: self._space[name].transform.value(moved)}):
                    g = gradient()
                both = {n: t for n, t in g.items() if n in w}
                sides.append(dot({n: w[n] for n in both}, both))
                length = norm(w) * norm(both)
            found.view(-1)[i] = ((sides[0] - sides[1]) / (high - low)).to(found)
        return found, length.to(found)
