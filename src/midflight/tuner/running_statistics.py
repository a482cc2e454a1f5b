"""Differentiate through running statistics, such as BatchNorm's, which validation reads.

    r' = (1 - m) r + m s(theta, lambda),   s = mean and variance of the training batch at a layer

Here r are the running statistics and m is the momentum. Validation reads r', which adds to the hypergradient

    m dC2/dr' . ds/dlambda

For example, noise before a BatchNorm layer increases its variance. Most of the noise's hypergradient comes
from this term.

A layer that is used several times in one pass updates its statistics at each use. Each training pass since
the last optimiser step updates them too: a further micro-batch, a skipped step, or a forward pass for a log.
The layer's counter tells how many passes there were. Their batches are not known, so each counts as a pass of
`loss_fn` on the batch of the hyper-step.

Other buffers have no derivative here, such as those of a hand-written norm. If hyperparameters reach the
validation loss through them, the tuner warns.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from midflight._tensors import Tensors
from midflight.errors import warn


@dataclass(frozen=True)
class Layer:
    """A layer in training mode whose running statistics validation will read.

    Attributes:
        module: BatchNorm, InstanceNorm, or another that passes its `running_mean` to torch.
        counted: passes since the last optimiser step, by the layer's own counter; None without one.
        writes: how often its buffers were written in place since then; None if that is not known.
        total: passes so far if the statistics are the mean over all of them; None otherwise.
    """

    module: Any
    counted: int | None
    writes: int | None
    total: int | None

    def times(self, uses: int, passes: int) -> int:
        """Return how often the loop updated the statistics since the last optimiser step.

        Args:
            uses: how often one call of `loss_fn` uses the layer.
            passes: how often `backward` added to the gradient; used if nothing else is known.
        """
        if self.writes is None or (self.counted is None and not self.writes):
            return uses * passes
        if self.counted is None or self.counted <= 0:  # InstanceNorm does not increase its counter
            return self.writes
        loaded = self.counted > self.writes * uses  # one write loaded a state, and the counter jumped
        return self.writes - 1 if loaded else self.counted


Layers = dict[str, Layer]
Statistics = dict[str, tuple[Tensor, Tensor]]
"""Name of a layer -> (tensor shaped like its running mean, tensor shaped like its running variance)."""


class Watched:
    """Records which buffers of a model the loop changes between two optimiser steps.

    Args:
        model: the model being trained.

    Attributes:
        layers: all layers with running statistics in training mode, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._owners: dict[str, nn.Module] = {}
        """Modules with buffers of their own, by name."""
        self._before: dict[str, tuple[Tensor, int]] = {}
        """Each buffer and its version after the last optimiser step, by name."""
        self._counters: Tensors = {}
        """Copies of the counters at that time."""
        self._changed: set[str] = set()
        """Names of the floating-point buffers that the loop changed since."""
        self._read: set[str] = set()
        """Names of the layers whose running statistics an evaluation pass has read."""
        self._returned: set[str] = set()
        """Names that `others` has returned already."""
        self._said_hidden = False
        self.layers: Layers = {}

    def begin(self) -> None:
        """Begin to record, after an optimiser step."""
        self._owners = {name: m for name, m in self._model.named_modules() if len(m._buffers)}
        self._before = {name: (b, _version(b)) for name, b in self._buffers().items()}
        self._counters = {
            name: self._before[name][0].clone() for name in self._before if name.endswith(_COUNTER)
        }

    def end(self) -> None:
        """Find what changed since `begin`, just before an optimiser step."""
        buffers = {name: b for name, b in self._buffers().items() if name in self._before}
        self._changed = {n for n, b in buffers.items() if b.is_floating_point() and self._writes(n, b)}
        steps = {n: buffers[n] - before for n, before in self._counters.items() if n in buffers}
        device = next(iter(steps.values())).device if steps else None
        counts = torch.stack([n.to(device) for n in steps.values()]).tolist() if steps else []
        counted = dict(zip(steps, counts, strict=True))  # one transfer, because it waits for a GPU
        self.layers = {
            name: self._layer(f"{name}." if name else "", module, counted)
            for name, module in self._owners.items()
            if module.training and isinstance(getattr(module, "running_mean", None), Tensor)
        }

    def others(self) -> set[str]:
        """Return names of buffers that the loop changed and that have no derivative here, each only once."""
        for name, layer in self.layers.items():
            own = {f"{name}.{kind}" if name else kind for kind in ("running_mean", "running_var")}
            if name in self._read:
                self._changed -= own
            elif layer.writes:  # torch writes to them without a new version
                self._changed |= own & self._before.keys()
        found = self._changed - self._returned
        self._returned |= found
        return found

    def taken(self, passes: "Passes", found: Tensors) -> Statistics:
        """Move the gradients at running statistics out of all those that an evaluation pass found.

        Args:
            passes: what the evaluation pass read.
            found: gradients, name -> tensor; those at running statistics are removed.
        """
        taken = {name: found.pop(name) for name in passes.read if name in found}
        self._read |= {name for name in passes.layers if _MEAN + name in passes.read}
        if passes.hidden and not self._said_hidden:
            self._said_hidden = True
            warn(
                f"validation reads the running statistics of {', '.join(sorted(passes.hidden))} without a "
                "gradient, as in a reentrant checkpoint; the hypergradient leaves out what they do.",
            )
        return {
            name: (taken[_MEAN + name], taken[_VAR + name])
            for name in passes.layers
            if _MEAN + name in taken and _VAR + name in taken
        }

    @contextmanager
    def only(self, others: set[str]) -> Iterator[None]:
        """Restore all buffers except these at the end."""
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
        """Return how often a buffer was written since `begin`, at least; 1 if it was replaced."""
        buffer, version = self._before[name]
        return _version(now) - version if now is buffer else 1


_MEAN, _VAR = "running mean of ", "running variance of "
_COUNTER = "num_batches_tracked"


def _version(buffer: Tensor) -> int:
    """Return how often a buffer was written in place; 0 if torch does not count that."""
    return 0 if nn.parameter.is_lazy(buffer) or buffer.is_inference() else buffer._version


@dataclass(frozen=True)
class _Call:
    """The arguments of `F.batch_norm` or `F.instance_norm` that matter here."""

    x: Tensor
    mean: Tensor | None
    var: Tensor | None
    by_batch: bool
    momentum: float
    eps: float
    each: bool
    """Whether each example has its own variance, and their mean updates the running one."""

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch's mean and variance, each of shape (channels,), in the type of `like`."""
        x = self.x.to(like)
        others = [d for d in range(x.ndim) if d != 1]
        var = x.var(others[1:], unbiased=True).mean(0) if self.each else x.var(others, unbiased=True)
        return x.mean(others), var


class _Reads(torch.autograd.Function):
    """The identity of x, which also gives running statistics their gradient when they normalise x.

    It does not use `save_for_backward`: a checkpoint recomputes without this function, and requires that the
    number of saved tensors is the same.
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


_SIGNATURES = {function: inspect.signature(function) for function in (F.batch_norm, F.instance_norm)}


def _call_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call:
    bound = _SIGNATURES[func].bind(*args, **kwargs)
    bound.apply_defaults()
    x, mean, var, _, _, by_batch, momentum, eps = bound.args  # both have this order
    return _Call(x, mean, var, by_batch, momentum, eps, each=func is F.instance_norm)


class Passes(TorchFunctionMode):
    """Records how layers use their running statistics within this block.

    A layer in training mode is recorded use by use. One in eval mode reads the statistics as leaves.

    Args:
        layers: those to record.

    Attributes:
        uses: the calls of torch in training mode, by layer.
        read: the running means and variances read in eval mode, as leaves, by names of their own.
        hidden: layers that were used in eval mode without recording a gradient.
    """

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = layers
        self._names = {id(layer.module.running_mean): name for name, layer in layers.items()}
        self.uses: dict[str, list[_Call]] = {}
        self.hidden: set[str] = set()
        self.read: Tensors = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SIGNATURES:
            call = _call_of(func, args, kwargs or {})
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
    """Return <dC2/dr', r'>, differentiable in what a training pass read; None if it used no layer.

    Args:
        layers: by name.
        passes: the record of the training pass.
        along: dC2/dr', layer -> (by the mean, by the variance).
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
    """Return the weight of each use of a layer in its final running statistics.

    The loop's last `times` uses are taken as repetitions of those in one pass.

    Args:
        momenta: of the uses in one pass, in their order.
        times: how often the loop used the layer since the last optimiser step.
        total: all uses so far if the statistics are their mean; None otherwise.
    """
    shares, left = [0.0] * len(momenta), 1.0
    for back in range(times):
        use = -1 - back % len(momenta)
        momentum = momenta[use] if total is None else 1 / max(1, total - back)
        shares[use] += left * momentum
        left *= 1 - momentum
    return shares
