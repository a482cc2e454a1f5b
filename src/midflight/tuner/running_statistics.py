"""BatchNorm's running statistics, through which the training pass reaches the validation loss as well.

    r' = (1 - m) r + m s(theta, lambda),   s = mean and variance of the training batch at a BatchNorm layer

Validation reads r'. So beside the way through the weights there is

    m dC2/dr' . ds/dlambda

Noise before a BatchNorm layer, say, widens its statistics: most of its hypergradient comes this way.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from midflight.trees import Tensors

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Layer -> something shaped like its running mean, and like its running variance."""


@dataclass(frozen=True)
class Tracking:
    """A BatchNorm layer that trains, and whose running statistics validation will read.

    Attributes:
        layer: the module.
        momentum: what a training pass counts, before the tuner's own passes.
    """

    layer: _BatchNorm
    momentum: float


Layers = dict[str, Tracking]


def tracking(model: nn.Module) -> Layers:
    """All such layers of a model, by name."""
    return {
        name: Tracking(m, _momentum(m))
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None
    }


@dataclass
class _Pass:
    """Input and output of a layer in one forward pass."""

    x: Tensor
    y: Tensor


class Passes:
    """What went through some layers."""

    def __init__(self) -> None:
        self.of: dict[str, _Pass] = {}

    @contextmanager
    def watching(self, layers: Layers) -> Iterator[None]:
        """Note the forward passes of the layers within the block; of several the last."""

        def note(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                self.of[name] = _Pass(inputs[0], output)

            return hook

        hooks = [t.layer.register_forward_hook(note(name)) for name, t in layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def gradient_of_statistics(layers: Layers, passes: Passes, delta: Tensors) -> Statistics:
    """dC2/dr of an evaluation pass, from y = (x - mean) / sqrt(var + eps) weight + bias.

    Args:
        layers: that were watched.
        passes: of the evaluation.
        delta: dC2/dy, layer -> tensor.
    """
    found: Statistics = {}
    for name, g in delta.items():
        layer, x = layers[name].layer, passes.of[name].x
        mean, var = layer.running_mean, layer.running_var
        assert mean is not None
        assert var is not None
        others = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        weight = torch.ones_like(mean) if layer.weight is None else layer.weight
        scale = weight / (var + layer.eps).sqrt()
        centred = x - mean.view(shape)
        of_mean = -scale * g.sum(others)
        of_var = -0.5 * scale / (var + layer.eps) * (g * centred).sum(others)
        found[name] = of_mean, of_var
    return found


def moved_statistics(layers: Layers, passes: Passes, along: Statistics, times: int) -> Tensor | None:
    """m <dC2/dr, s> of a training pass, differentiable in what the pass read; None if it met no layer.

    Args:
        layers: that were watched.
        passes: of the training.
        along: dC2/dr.
        times: forward passes of one optimiser step, each of which moves the statistics.
    """
    total: Tensor | None = None
    for name, (of_mean, of_var) in along.items():
        if name not in passes.of:
            continue
        x = passes.of[name].x
        others = [d for d in range(x.ndim) if d != 1]
        share = 1 - (1 - layers[name].momentum) ** times
        part = share * ((of_mean * x.mean(others)).sum() + (of_var * x.var(others, unbiased=True)).sum())
        total = part if total is None else total + part
    return total


def _momentum(layer: _BatchNorm) -> float:
    """What a pass counts; None in torch is the mean over all passes so far."""
    if layer.momentum is not None:
        return layer.momentum
    count = layer.num_batches_tracked
    return 1.0 / max(1, int(count)) if count is not None else 0.0
