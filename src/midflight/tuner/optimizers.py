"""Find the torch optimisers in what a user passes, and the weights that they train."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from midflight.errors import UnknownName, UnsupportedOptimizer, UnsupportedParameter

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
"""One torch optimiser, a wrapper around one, or a list of those that train one model together."""

WRAPPERS = {"accelerate", "lightning", "lightning_fabric", "pytorch_lightning"}
"""Packages whose optimisers wrap a torch optimiser as `.optimizer` and step like it."""


def unwrapped(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return the torch optimisers in what a user passes, without their wrappers.

    Raises:
        UnsupportedOptimizer: there is no torch optimiser in it, or one occurs twice, or a wrapper is not from
            `WRAPPERS` and may step in its own way.
    """
    given = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    found = [_innermost(entry) for entry in given]
    if not found or len({id(o) for o in found}) < len(found):
        raise UnsupportedOptimizer(
            f"optimizer must be a torch optimiser or a list of different ones, but got {optimizer!r}."
        )
    return found


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    seen = {id(optimizer)}
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        step = getattr(type(optimizer), "step", None)
        if getattr(step, "__module__", "").partition(".")[0] not in WRAPPERS:
            raise UnsupportedOptimizer(
                f"a wrapper must come from {', '.join(sorted(WRAPPERS))}, but {type(optimizer).__name__} "
                "does not and may step in its own way; pass the torch optimiser that it holds, if that one "
                "takes every step itself."
            )
        optimizer = optimizer.optimizer
        if id(optimizer) in seen:
            break
        seen.add(id(optimizer))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UnsupportedOptimizer(
            f"optimizer must be a torch optimiser, but got {type(optimizer).__name__}; pass the torch "
            "optimiser that it holds."
        )
    return optimizer


def skips(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a fused optimiser will skip its step because a `GradScaler` found infinite gradients."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def named_parameters(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> Iterator[tuple[str, Tensor, int, int]]:
    """Yield (name, weight, index of its optimiser, index of its group) for each weight of the optimisers.

    A weight that the model does not have is named after its place in the optimiser.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for o, optimizer in enumerate(optimizers):
        for g, group in enumerate(optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                yield names.get(id(p), f"optimizer{o}.group{g}.{j}"), p, o, g


def require_real(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise `UnsupportedParameter` for a complex weight."""
    for name, p, *_ in named_parameters(model, optimizers):
        if p.is_complex():
            raise UnsupportedParameter(
                f"weights must be real, but {name} is {p.dtype}; keep it in an optimiser of its own."
            )


def trained_parameters(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """Return the optimisers' weights that require a gradient, by their names in the model.

    Raises:
        UnsupportedParameter: a weight is complex.
    """
    found = unwrapped(optimizers)
    require_real(model, found)
    return {name: p for name, p, *_ in named_parameters(model, found) if p.requires_grad}


def param_groups(model: nn.Module, per: str) -> list[dict[str, Any]]:
    """Return groups for a torch optimiser, one per layer or per tensor of the model, in its order.

    A hyperparameter with one entry per group then tunes an option of each group:

        groups = mf.param_groups(model, per="layer")
        space = mf.Space(weight_decay=mf.Float(1e-6, 1e-2, log=True, shape=(len(groups),)))
        optimizer = torch.optim.Adam(groups)

    Args:
        model: the model whose trainable parameters are grouped; a tied one is in its first group only.
        per: "layer" groups the parameters that one module itself holds; "tensor" puts each in its own group.

    Raises:
        UnknownName: `per` is neither.
    """
    if per not in ("layer", "tensor"):
        raise UnknownName("per", per, ("layer", "tensor"))
    groups: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault(name if per == "tensor" else name.rpartition(".")[0], []).append(p)
    return [{"params": params, "name": name} for name, params in groups.items()]
