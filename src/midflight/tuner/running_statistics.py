"""Running statistics, such as BatchNorm's, through which the training pass reaches the validation loss as
well.

    r' = (1 - m) r + m s(theta, lambda),   s = mean and variance of the training batch at a layer

Validation reads r'. So beside the way through the weights there is

    m dC2/dr' . ds/dlambda

Noise before a BatchNorm layer, say, widens its statistics: most of its hypergradient comes this way.

A layer that is used several times in one pass moves its statistics at each use, in their order. So does each
training pass since the last optimiser step: one more micro-batch, a step that was left out, or a forward pass
for a log. The layer's own counter tells how many there were. What went through them is not known: each counts
as a pass of `loss_fn` on the batch of the hyper-step.

Other buffers are left out, such as those of a norm written by hand. Where hyperparameters reach the
validation loss through them, the tuner warns.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from midflight._tensors import Tensors


@dataclass(frozen=True)
class Layer:
    """A layer that trains, and whose running statistics validation will read.

    Attributes:
        module: BatchNorm, InstanceNorm, or what else hands its `running_mean` to torch.
        counted: passes since the last optimiser step, by the layer's own counter; None without one.
        writes: how often its buffers were written in place since then; None if nobody knows.
        total: passes so far where the statistics are the mean over all of them; None where they are not.
    """

    module: Any
    counted: int | None
    writes: int | None
    total: int | None

    def times(self, uses: int, passes: int) -> int:
        """How often the loop moved its statistics.

        Args:
            uses: of the layer in one call of `loss_fn`.
            passes: how often `backward` added to the gradient, where nothing else is known.
        """
        if self.writes is None or (self.counted is None and not self.writes):
            return uses * passes
        if self.counted is None or self.counted <= 0:  # InstanceNorm has a counter and does not use it
            return self.writes
        loaded = self.counted > self.writes * uses  # the counter jumped, with one of the writes
        return self.writes - 1 if loaded else self.counted


Layers = dict[str, Layer]
Statistics = dict[str, tuple[Tensor, Tensor]]
"""Layer -> something shaped like its running mean, and like its running variance."""


class Watched:
    """Buffers of a model that the loop moves between two optimiser steps.

    Args:
        model: the model being trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._owners: dict[str, nn.Module] = {}
        """Modules with buffers of their own, by name."""
        self._before: dict[str, tuple[Tensor, int]] = {}
        self._counters: Tensors = {}
        self._known: set[str] = set()
        self._said_hidden = False
        self.layers: Layers = {}
        """All layers with running statistics that train, by name."""
        self._moved: set[str] = set()
        self._judged: set[str] = set()

    def begin(self) -> None:
        """The last optimiser step is over: count from here."""
        self._owners = {name: m for name, m in self._model.named_modules() if len(m._buffers)}
        self._before = {name: (b, _version(b)) for name, b in self._buffers().items()}
        self._counters = {
            name: self._before[name][0].clone() for name in self._before if name.endswith(_COUNTER)
        }

    def end(self) -> None:
        """An optimiser step is about to be taken: note what moved until here."""
        buffers = {name: b for name, b in self._buffers().items() if name in self._before}
        self._moved = {n for n, b in buffers.items() if b.is_floating_point() and self._writes(n, b)}
        steps = {n: buffers[n] - before for n, before in self._counters.items() if n in buffers}
        device = next(iter(steps.values())).device if steps else None
        counts = torch.stack([n.to(device) for n in steps.values()]).tolist() if steps else []
        counted = dict(zip(steps, counts, strict=True))  # all at once: a GPU is waited for
        self.layers = {
            name: self._layer(f"{name}." if name else "", module, counted)
            for name, module in self._owners.items()
            if module.training and isinstance(getattr(module, "running_mean", None), Tensor)
        }

    def others(self) -> set[str]:
        """Buffers that the loop moved and that are left out, by name; each is told once."""
        for name, layer in self.layers.items():
            own = {f"{name}.{kind}" if name else kind for kind in ("running_mean", "running_var")}
            if name in self._known:
                self._moved -= own
            elif layer.writes:  # torch does not say that it writes to them
                self._moved |= own & self._before.keys()
        found = self._moved - self._judged
        self._judged |= found
        return found

    def taken(self, passes: "Passes", found: Tensors) -> Statistics:
        """Take the gradient at running statistics out of what an evaluation pass found."""
        taken = {name: found.pop(name) for name in passes.read if name in found}
        self._known |= {name for name in passes.layers if _MEAN + name in passes.read}
        if passes.hidden and not self._said_hidden:
            self._said_hidden = True
            warnings.warn(
                f"validation reads the running statistics of {', '.join(sorted(passes.hidden))} without a "
                "gradient, as in a reentrant checkpoint; the hypergradient leaves out what they do.",
                stacklevel=2,
            )
        return {
            name: (taken[_MEAN + name], taken[_VAR + name])
            for name in passes.layers
            if _MEAN + name in taken and _VAR + name in taken
        }

    @contextmanager
    def only(self, others: set[str]) -> Iterator[None]:
        """All buffers but these are put back."""
        kept = {n: (b, b.clone()) for n, b in self._buffers().items() if n not in others}
        try:
            yield
        finally:
            for buffer, value in kept.values():
                buffer.data = value

    def _buffers(self) -> Tensors:
        return {
            f"{prefix}.{name}" if prefix else name: b
            for prefix, module in self._owners.items()
            for name, b in module._buffers.items()
            if b is not None
        }

    def _layer(self, prefix: str, module: Any, counted: dict[str, int]) -> Layer:
        counter = getattr(module, _COUNTER, None)
        writes = [
            self._writes(prefix + key, b)
            for key, b in (("running_mean", module.running_mean), (_COUNTER, counter))
            if isinstance(b, Tensor) and prefix + key in self._before
        ]
        mean_of_all = isinstance(counter, Tensor) and getattr(module, "momentum", 0) is None
        total = int(counter) if mean_of_all else None  # type: ignore[arg-type]
        return Layer(module, counted.get(prefix + _COUNTER), max(writes, default=None), total)

    def _writes(self, name: str, now: Tensor) -> int:
        buffer, version = self._before[name]
        return _version(now) - version if now is buffer else 1


_MEAN, _VAR = "running mean of ", "running variance of "
_COUNTER = "num_batches_tracked"


def _version(buffer: Tensor) -> int:
    """How often it was written in place, where torch says."""
    return 0 if nn.parameter.is_lazy(buffer) or buffer.is_inference() else buffer._version


@dataclass(frozen=True)
class _Call:
    """Arguments of `F.batch_norm` or `F.instance_norm`, whose order is the same."""

    x: Tensor
    mean: Tensor | None = None
    var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    by_batch: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    each: bool = False
    """Whether each example has a variance of its own; the running one moves by their mean."""

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance by which the running ones move."""
        x = self.x.to(like)
        others = [d for d in range(x.ndim) if d != 1]
        var = x.var(others[1:], unbiased=True).mean(0) if self.each else x.var(others, unbiased=True)
        return x.mean(others), var


class _Reads(torch.autograd.Function):
    """x as it is, which is about to be normalised by running statistics, whose gradient comes with its own.

    What it keeps is no business of checkpoints: they compute again without it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        ctx.kept = x.detach(), mean.detach(), var.detach() + eps
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var = ctx.kept
        g, others = grads[0].to(mean), [d for d in range(x.ndim) if d != 1]
        centred = x - mean.view(1, -1, *[1] * (x.ndim - 2))
        return grads[0], -g.sum(others), -0.5 / var * (g * centred).sum(others), None


def _of_batch_norm(input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
                   training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> _Call:  # fmt: skip
    return _Call(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _of_instance_norm(input: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None,
                      bias: Any = None, use_input_stats: bool = True, momentum: float = 0.1,
                      eps: float = 1e-5) -> _Call:  # fmt: skip
    return _Call(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, each=True)


_KNOWN: Mapping[Any, Callable[..., _Call]] = {
    F.batch_norm: _of_batch_norm,
    F.instance_norm: _of_instance_norm,
}


class Passes(TorchFunctionMode):
    """Within the block, notes what layers do with their running statistics, wherever they call torch.

    A training pass is noted use by use. An evaluation pass reads the statistics as leaves.

    Args:
        layers: to be noted.
    """

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = layers
        self._names = {id(layer.module.running_mean): name for name, layer in layers.items()}
        self.uses: dict[str, list[_Call]] = {}
        self.hidden: set[str] = set()
        """Layers that an evaluation pass used without recording a gradient."""
        self.read: Tensors = {}
        """What an evaluation pass read, as leaves: running means and variances, by names of their own."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _KNOWN:
            call = _KNOWN[func](*args, **(kwargs or {}))
            name = self._names.get(id(call.mean))
            if name is not None and call.by_batch:
                self.uses.setdefault(name, []).append(call)
            elif name is not None and call.mean is not None and call.var is not None:
                for kind, b in ((_MEAN, call.mean), (_VAR, call.var)):
                    if kind + name not in self.read:
                        self.read[kind + name] = b.detach().clone().requires_grad_()
                if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
                    self.hidden.add(name)
                    return func(*args, **(kwargs or {}))
                x = _Reads.apply(call.x, self.read[_MEAN + name], self.read[_VAR + name], call.eps)  # type: ignore[no-untyped-call]
                args, kwargs = (x, *args[1:]), {k: v for k, v in (kwargs or {}).items() if k != "input"}
        return func(*args, **(kwargs or {}))


def moved_statistics(layers: Layers, passes: Passes, along: Statistics, accumulated: int) -> Tensor | None:
    """<dC2/dr', r'>, differentiable in what a training pass read; None if it met no layer.

    Args:
        layers: that were noted.
        passes: of the training.
        along: dC2/dr', layer -> (of the mean, of the variance).
        accumulated: how often `backward` added to the gradient.
    """
    total: Tensor | None = None
    for name, (of_mean, of_var) in along.items():
        uses, layer = passes.uses.get(name, []), layers[name]
        times = layer.times(len(uses), accumulated) if uses else 0
        for call, share in zip(uses, _shares([u.momentum for u in uses], times, layer.total), strict=True):
            mean, var = call.statistics(of_mean)
            part = share * ((of_mean * mean).sum() + (of_var * var).sum())
            total = part if total is None else total + part
    return total


def _shares(momenta: list[float], times: int, total: int | None) -> list[float]:
    """What each use in a pass counts in the end, where the last so many uses of the loop repeat the pass.

    Args:
        momenta: of the uses, in their order.
        times: uses of the loop.
        total: uses ever, where the statistics are their mean.
    """
    shares, left = [0.0] * len(momenta), 1.0
    for back in range(times):
        use = -1 - back % len(momenta)
        momentum = momenta[use] if total is None else 1 / max(1, total - back)
        shares[use] += left * momentum
        left *= 1 - momentum
    return shares
